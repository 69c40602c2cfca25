"""The local scheduler: every node is an agent process in a session of its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import psutil

from cluster.rundir import RunDir, safe_name
from health.verdict import Verdict

_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.01
_SEMAPHORES = Path("/dev/shm")

logger = logging.getLogger("everstep.local")


class LocalScheduler:
    """See `cluster.scheduler.Scheduler`. A handle is `pid:start time`, so that a recycled pid is never mistaken.

    wrap: what a node's agent is started by, a command that becomes it (`nsenter`, say); by default nothing.
    """

    def __init__(self, run_dir: RunDir, ram_dir: str, wrap: Callable[[str], Sequence[str]] = lambda node: ()) -> None:
        self.run_dir = run_dir
        self.wrap = wrap
        self.ram_root = run_dir.ram_root(ram_dir)
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def node_names(
        self, count: int, usable: Callable[[Sequence[str]], int] = len, stopped: Callable[[], bool] = bool
    ) -> list[str]:
        """See `Scheduler`: this machine has as many as are wanted."""
        return [f"node{index}" for index in range(count)]

    def start(self, node: str) -> str:
        """Start `cluster.agent_main` detached, its output in `logs/<node>/agent.log`."""
        logs = self.run_dir.logs(safe_name(node, "node"))
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "agent.log").open("ab") as log:
            child = subprocess.Popen(
                [*self.wrap(node), sys.executable, "-m", "cluster.agent_main", str(self.run_dir.path), node],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )
        self._children[child.pid] = child
        return f"{child.pid}:{_start_ticks(child.pid)}"

    def alive(self, handle: str) -> bool:
        """Whether the agent's process exists and is no zombie."""
        process = self._find(handle)
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE

    def ended(self, handle: str) -> int | None:
        """How an agent that this process started has ended, as `subprocess` says it; None while it runs."""
        child = self._children.get(int(handle.split(":")[0]))
        return child.poll() if child is not None else None

    def kill(self, node: str, handle: str, for_good: bool = False) -> None:
        """SIGKILL the whole session, wait until it is gone, and free the node's shared memory."""
        session = int(handle.split(":")[0])
        # The kernel keeps a session's id from being reused while it has members; a new process under the agent's
        # pid therefore means that nobody of ours is left.
        if self._find(handle) is not None or not psutil.pid_exists(session):
            self._kill_session(session)
        child = self._children.pop(session, None)
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_KILL_TIMEOUT_S)
        shutil.rmtree(self.ram_root / safe_name(node, "node"), ignore_errors=True)
        _remove_semaphores(self.run_dir.semaphore_prefix(node))

    def appeared(self) -> Sequence[str]:
        """See `Scheduler`: nodes of this machine do not come by themselves."""
        return ()

    def verdicts(self, step: int, nodes: Collection[str]) -> Sequence[Verdict]:
        """See `Scheduler`: nobody else looks at these nodes."""
        return ()

    def report_bad(self, node: str, reason: str) -> None:
        """Nobody else owns this machine; the runs' own history of nodes has it."""

    def close(self) -> None:
        """Free the run's folder in shared memory."""
        shutil.rmtree(self.ram_root, ignore_errors=True)
        _remove_semaphores(self.run_dir.semaphore_prefix())

    def last_words(self, node: str) -> tuple[str, ...]:
        """Last lines of the agent's log."""
        log = self.run_dir.logs(node) / "agent.log"
        return tuple(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ()

    def _kill_session(self, session: int) -> None:
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while members := [p for p in self._members(session) if p.status() != psutil.STATUS_ZOMBIE]:
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(members, timeout=_POLL_S)
            if time.monotonic() > deadline:
                logger.warning("processes %s survive SIGKILL: the kernel holds them", [p.pid for p in members])
                return

    def _members(self, session: int) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == session:
                    yield process

    @staticmethod
    def _find(handle: str) -> psutil.Process | None:
        pid, started = handle.split(":")
        try:
            return psutil.Process(int(pid)) if str(_start_ticks(int(pid))) == started else None
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            return None


def _remove_semaphores(prefix: str) -> None:
    """Remove named semaphores that killed processes left behind; this is where the C library keeps them."""
    for path in _SEMAPHORES.glob(f"sem.{prefix}*"):
        path.unlink(missing_ok=True)


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: unlike a wall time, it does not move when clocks are set."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
