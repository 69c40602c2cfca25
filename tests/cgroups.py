"""Memory control groups for tests, where this machine lets one make them: real limits, and real OOM kills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.oom import find_mounts, memory_group


class MemoryGroup:
    """A control group of its own below this process' one, with a limit; gone after the `with`.

    beside: next to this process' group, not below it. Skips the test, and says why, where that cannot be had: it takes
    root, and memory must not be handed out elsewhere.
    """

    def __init__(self, name: str, limit_bytes: int, beside: bool = False) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.beside = beside

    def __enter__(self) -> MemoryGroup:
        mounts = find_mounts(Path("/proc/self/mountinfo").read_text())
        above = memory_group(Path("/proc/self/cgroup").read_text(), mounts) if mounts else None
        if mounts is None or above is None:
            pytest.skip("NO OOM KILL WAS CAUSED: this machine has no memory control groups")
        if self.beside and Path("/proc/self/cgroup").read_text().find(above.name) < 0:
            pytest.skip("NO OOM KILL WAS CAUSED: this process is in the topmost control group")
        self.path = (above.parent if self.beside else above) / self.name
        limit = "memory.limit_in_bytes" if mounts.v1 else "memory.max"
        try:
            self.path.mkdir()
            (self.path / limit).write_text(str(self.limit_bytes))
        except OSError as error:
            if self.path.exists():
                self.path.rmdir()
            pytest.skip(f"NO OOM KILL WAS CAUSED: a memory control group cannot be made here ({error})")
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever is still in it goes back, or it could not be removed.
        for pid in (self.path / "cgroup.procs").read_text().split():
            (self.path.parent / "cgroup.procs").write_text(pid)
        self.path.rmdir()

    def add(self, pid: int) -> None:
        """Put a process in. What it has already still counts where it came from."""
        os.stat(f"/proc/{pid}")
        (self.path / "cgroup.procs").write_text(str(pid))
