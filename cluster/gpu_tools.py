"""Command-line tools of GPU makers, run with a time-out that also holds for a tool which the kernel does not let go."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence

from health.dcgm import DcgmJudge, read_diagnosis, read_health
from health.gpu_facts import Carrier
from health.verdict import Verdict

_DIAG_TIMEOUT_S = {1: 120.0, 2: 600.0, 3: 3600.0}

logger = logging.getLogger("everstep.gpus")


class ToolError(Exception):
    """A tool did not answer; the message says how."""


def run_tool(command: Sequence[str], timeout_s: float) -> str:
    """What the tool prints; its exit code is not looked at.

    Raises:
        ToolError: if it is not there, or takes too long. Then it is killed, and not waited for.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise ToolError(f"{command[0]}: {error.strerror}") from error
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise ToolError(f"{' '.join(command)} took over {timeout_s:g} s") from error
    return said


def diagnose(level: int = 1, timeout_s: float | None = None) -> tuple[str, ...] | None:
    """DCGM's own active tests of all GPUs: the failures, a line each. None: there is no dcgmi here.

    level: 1 takes seconds, 2 about two minutes, 3 about a quarter of an hour. Nothing else may use the GPUs.

    Raises:
        ToolError: if dcgmi does not end in time.
        ValueError: with DCGM's words, if it could not run the tests.
    """
    if shutil.which("dcgmi") is None:
        return None
    command = ("dcgmi", "diag", "--run", str(level), "--json")
    return read_diagnosis(run_tool(command, timeout_s or _DIAG_TIMEOUT_S[level]))


class DcgmWatch:
    """Asks DCGM for its verdict now and then, in a thread. What it watches is the host's own choice: nothing is set."""

    def __init__(
        self,
        node: str,
        interval_s: float,
        timeout_s: float,
        carrier: Callable[[int], Carrier],
        accuse: Callable[[Verdict], None],
    ) -> None:
        self._judge = DcgmJudge(node)
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._carrier = carrier
        self._accuse = accuse
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin, where dcgmi is installed."""
        if self._interval_s > 0 and shutil.which("dcgmi") is not None:
            threading.Thread(target=self._run, name="dcgm", daemon=True).start()

    def stop(self) -> None:
        """End, after the check under way."""
        self._stop.set()

    def _run(self) -> None:
        complaint = ""
        while not self._stop.wait(self._interval_s):
            try:
                incidents = read_health(run_tool(("dcgmi", "health", "--check", "--json"), self._timeout_s))
            except (ToolError, OSError, ValueError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    logger.warning("DCGM gives no verdict: %s", complaint)
                continue
            for verdict in self._judge.judge(incidents, self._carrier):
                logger.warning("%s: %s", verdict.cause.value, verdict.evidence[0])
                self._accuse(verdict)
