"""One evaluation, as a process of its own: export the snapshot that a folder holds, run the user's command on it.

`python -m cluster.evaluate RUN/evaluations/step-N-gG`, started by `cluster.evaluations`. Whatever happens is in the
folder afterwards: `result.json`, and `log.txt` with all that was said. The exported model and the held snapshot go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from cluster.evaluations import HELD, LOG, MODEL, RESULT, TASK, Result, Task, read_result
from cluster.rundir import write_atomically

_NICE = 10
_LONGEST_LINE = 200


class _FailedError(Exception):
    """What was to be run did not do it; the text says why."""


def evaluate(folder: Path) -> None:
    """Do what task.json in `folder` says, once: of several processes the later ones find the result of the first."""
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        task = msgspec.json.decode((folder / TASK).read_bytes(), type=Task)
        done = read_result(folder)
        if done is not None and done.generation == task.generation:
            return
        began_s = time.monotonic()
        try:
            detail, ok = _run(folder, task), True
        except _FailedError as error:
            detail, ok = str(error), False
        seconds = time.monotonic() - began_s
        result = Result(step=task.step, generation=task.generation, ok=ok, seconds=seconds, detail=detail)
        write_atomically(folder / RESULT, msgspec.json.encode(result))
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        shutil.rmtree(folder / HELD, ignore_errors=True)


def _run(folder: Path, task: Task) -> str:
    """Export and evaluate; returns the last line that the command said. Raises _FailedError."""
    config, model = task.evaluation, folder / MODEL
    deadline_s = time.monotonic() + config.timeout_s
    shutil.rmtree(model, ignore_errors=True)
    _call("the export", export_command(folder, task), folder, {}, deadline_s, config.timeout_s)
    told = {"EVERSTEP_RUN": task.run, "EVERSTEP_STEP": str(task.step), "EVERSTEP_MODEL": str(model)}
    return _call(config.command[0], config.command, folder, told, deadline_s, config.timeout_s)


def export_command(folder: Path, task: Task) -> list[str]:
    """What exports the snapshot that a folder holds to its `model`."""
    wanted = ["--format", task.evaluation.format, *(["--ema"] if task.evaluation.ema else [])]
    export = [sys.executable, "-m", "cluster.cli", "checkpoint", "export", str(folder), "--step", str(task.step)]
    return [*export, *wanted, "--output", str(folder / MODEL)]


def _call(
    what: str, argv: Sequence[str], folder: Path, told: Mapping[str, str], deadline_s: float, timeout_s: float
) -> str:
    """Run one program to its end; returns its last line."""
    log = folder / LOG
    with log.open("ab") as out:
        begin = os.fstat(out.fileno()).st_size
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, **told},
            )  # fmt: skip
        except OSError as error:
            raise _FailedError(f"{what} cannot be run ({error.strerror})") from error
    try:
        code = process.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise _FailedError(f"{what} did not end: evaluation.timeout_s = {timeout_s:g} is over") from None
    finally:
        # What it left running, too. The group's number is its own as long as one of it lives.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = _last_line(log, begin)
    if code:
        raise _FailedError(f"{what} ended with {code}{': ' if last else ''}{last}; all of it is in {log}")
    return last


def _last_line(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:_LONGEST_LINE] if lines else ""


def main() -> None:
    """Entry point. Training on this machine comes first."""
    os.nice(_NICE)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    evaluate(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
