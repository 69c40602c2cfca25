"""What the benchmarks share: a place to work in that is always cleaned up, a quiet machine, jobs, tables."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.results import Ratio, Result, Series
from trainer.prepare import PrepareSettings, prepare

REPO = Path(__file__).parent.parent
QUIET_LOAD = 0.7
POLL_S = 0.01

JOB = """
[run]
name = "benchmark"
seed = 7

[model]
family = "llama3"
flavor = "debugmodel"
layers = {layers}
vocab_size = {vocab_size}

[data]
tokenizer = "{corpus}/tokenizer.json"

[[data.sets]]
path = "{corpus}/corpus"

[training]
steps = {steps}
seq_len = {seq_len}
global_batch_size = {global_batch_size}
microbatch_size = {microbatch_size}

[optimizer]
lr = 1e-3
schedule = "constant"

[parallelism]
dp_shard = {ranks}

[cluster]
nodes = 1
ranks_per_node = {ranks}
"""

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class Workspace:
    """A folder on disk, one in shared memory, and the processes that were started from here."""

    def __init__(self, disk: Path, memory: Path) -> None:
        self.disk = disk
        self.memory = memory
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
        """Start a Python program in a session of its own, its output in `log`; returns its pid."""
        with log.open("ab") as out:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPO,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**child_environment(self.disk), **(environment or {})},
            )
        self._children.append(child)
        return child.pid

    def ended(self, pid: int) -> int | None:
        """Exit code of a child, None while it runs."""
        return next(child for child in self._children if child.pid == pid).poll()

    def close(self) -> None:
        """Kill what still runs: every session that was started here, and whoever carries a folder of ours around."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        self._children.clear()
        while mine := self._strays():
            for process in mine:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(mine, timeout=1.0)

    def _strays(self) -> list[psutil.Process]:
        """Processes whose command line or output names our folders (agents live in sessions of their own)."""
        ours = tuple(str(folder) for folder in (self.disk, self.memory))
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                named = [*process.cmdline(), os.readlink(f"/proc/{process.pid}/fd/1")]
                if any(text.startswith(ours) for text in named):
                    found.append(process)
        return found


@contextlib.contextmanager
def workspace(name: str) -> Iterator[Workspace]:
    """Folders and processes that are gone when this ends, also on Ctrl-C and SIGTERM."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    disk = Path(tempfile.mkdtemp(prefix=f"everstep-bench-{name}-"))
    memory = Path(tempfile.mkdtemp(prefix=f"everstep-bench-{name}-", dir="/dev/shm"))
    place = Workspace(disk, memory)
    try:
        yield place
    finally:
        # A second signal must not leave half of it behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        place.close()
        shutil.rmtree(disk, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def child_environment(temporary: Path) -> dict[str, str]:
    """The environment for all sides: one thread a rank, and byte code cached, which restarts of the peer live on."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)}


def wait_for_quiet(longest_s: float = 240.0) -> float:
    """Wait until the machine has little else to do, at most so long; returns the load average then."""
    deadline = time.monotonic() + longest_s
    with console.status("waiting for the machine to be quiet") as status:
        while (load := os.getloadavg()[0]) >= QUIET_LOAD and time.monotonic() < deadline:
            status.update(f"waiting for the machine to be quiet: load {load:.2f}, should be below {QUIET_LOAD}")
            time.sleep(1.0)
    if load >= QUIET_LOAD:
        console.print(f"[yellow]the load is {load:.2f}: the figures will be noisy[/]")
    return load


def small_corpus(folder: Path, vocab_size: int = 2048) -> Path:
    """A corpus of a few megabytes of this Python's own library, made in seconds."""
    prepare((), folder, PrepareSettings(vocab_size=vocab_size, library_max_bytes=4 << 20))
    return folder


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, poll_s: float = POLL_S) -> None:
    """Wait for a condition. TimeoutError, saying what did not happen, if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen in {timeout_s:g} s")
        time.sleep(poll_s)


def tail(log: Path, lines: int = 20) -> str:
    """Last lines of a program's output."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def show(result: Result, order: Sequence[Series] | None = None) -> None:
    """The figures as a table, ratios below them."""
    table = Table(title=f"{result.benchmark}: {result.taken_at}", title_justify="left")
    for column in ("side", "figure"):
        table.add_column(column)
    for column in ("median", "min", "max", "n", "unit"):
        table.add_column(column, justify="left" if column == "unit" else "right")
    previous = ""
    for each in order or result.series:
        if previous and each.side != previous:
            table.add_section()
        spread = each.summary
        table.add_row(
            each.side if each.side != previous else "", each.name,
            f"{spread.median:.4g}", f"{spread.minimum:.4g}", f"{spread.maximum:.4g}", str(spread.n), each.unit,
        )  # fmt: skip
        previous = each.side
    console.print(table)
    for found in result.ratios:
        _show_ratio(found)
    for note in result.notes:
        console.print(f"[dim]- {note}[/]", highlight=False)


def _show_ratio(each: Ratio) -> None:
    console.print(f"[bold]{each.name}: {each.value:.3f}[/]  ({each.numerator} / {each.denominator})", highlight=False)
