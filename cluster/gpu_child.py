"""The GPU probe's process as the agent holds it: start, read lines in time, kill."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from cluster.gpu_messages import MAX_LINE_BYTES, ProbeLine, ProbeStart, decode_line

_KILL_TIMEOUT_S = 2.0


class ProbeProcess:
    """One probe. Not for more than one thread, but for `kill`."""

    def __init__(self, node: str, start: ProbeStart) -> None:
        command = [sys.executable, "-m", "cluster.gpu_probe", msgspec.json.encode(start).decode(), node]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._rest = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def lines(self, timeout_s: float) -> list[ProbeLine] | None:
        """Whole lines that come within this time, as soon as there are any; None when the probe has ended.

        Raises:
            ValueError: if a line is none of a probe.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready:
            return []
        data = os.read(self._process.stdout.fileno(), MAX_LINE_BYTES)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError(f"a line of over {MAX_LINE_BYTES} bytes")
        return [decode_line(line) for line in lines]

    def state(self) -> str:
        """The state letters of its threads in /proc, the strangest first; "" if they cannot be read."""
        letters = set()
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                letters.add(stat.read_text().rpartition(")")[2].split()[0])
        return "".join(sorted(letters))

    def kill(self) -> bool:
        """SIGKILL it; False if the kernel does not let go of it for now. It is not waited for any longer than that."""
        self._process.kill()
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(deadline - time.monotonic())
        return self._process.poll() is not None

    def close(self) -> None:
        """Kill it and let go of its pipe."""
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
