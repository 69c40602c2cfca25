"""Keeps one watchdog of the batch host going, on some other node of the allocation."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from cluster import slurm_steps
from cluster.rundir import RunDir

_AGAIN_S = 5.0
_END_S = 2.0

logger = logging.getLogger("everstep.slurm")


class Watchdog:
    """`tend` is cheap and may be called often: it starts the step, and starts it elsewhere when it has failed.

    names: the nodes of the allocation. The last ones are preferred: they are the spares.
    """

    def __init__(self, run_dir: RunDir, names: Sequence[str], batch_host: str, environ: Mapping[str, str]) -> None:
        self.run_dir = run_dir
        self.batch_host = batch_host
        self.environ = slurm_steps.bare_environment(environ)
        self._nodes = [name for name in reversed(names) if name != batch_host]
        self._open = False
        self._child: subprocess.Popen[bytes] | None = None
        self._node = ""
        self._not_before_s = 0.0
        self._leaving: list[tuple[subprocess.Popen[bytes], float]] = []

    def open(self) -> None:
        """There is something to watch over."""
        self._open = True

    def avoid(self, node: str) -> None:
        """This node is lost or bad; if the watchdog runs there, it moves."""
        self._nodes = [name for name in self._nodes if name != node]
        if self._node == node:
            self._dismiss()
            self._not_before_s = 0.0

    def tend(self) -> None:
        """Have a watchdog, if it is open and there is a node for it."""
        now_s = time.monotonic()
        self._reap(now_s)
        if self._child is not None and self._child.poll() is None:
            return
        if not self._open or not self._nodes or now_s < self._not_before_s:
            return
        if self._child is not None and self._child.returncode:
            logger.warning("the watchdog on %s ended with %s", self._node, self._child.returncode)
            self._nodes = [*self._nodes[1:], self._nodes[0]]
        self._not_before_s = now_s + _AGAIN_S
        self._node = self._nodes[0]
        with (self.run_dir.path / "slurm-watch.log").open("ab") as log:
            self._child = subprocess.Popen(
                slurm_steps.watchdog_command(self.run_dir, self._node, self.batch_host),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environ,
            )

    def close(self) -> None:
        """End it."""
        self._open = False
        self._dismiss()
        for child, deadline_s in self._leaving:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline_s - time.monotonic()))
        self._reap(float("inf"))

    def _dismiss(self) -> None:
        if self._child is not None and self._child.poll() is None:
            # srun passes SIGTERM on to its step; from a dead node it hears nothing, and waits.
            self._child.terminate()
            self._leaving.append((self._child, time.monotonic() + _END_S))
        self._child, self._node = None, ""

    def _reap(self, now_s: float) -> None:
        for child, deadline_s in self._leaving:
            if child.poll() is None and now_s >= deadline_s:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait(_END_S)
        self._leaving = [each for each in self._leaving if each[0].poll() is None]
