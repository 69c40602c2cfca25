"""The kernel's counts of processes that it killed for want of memory, in the control groups of a node's workers.

A worker that ends by SIGKILL was killed by somebody, or by the kernel. Only the kernel's own counters tell: version 1
counts in the group of the process alone, version 2 in all groups above it too. A group may be a part of a container or
of a job step, and workers may have been put into groups of their own.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_COUNTERS = ("memory.events", "memory.oom_control")
_MACHINE = Path("/proc/vmstat")
_LINE = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_OCTAL = re.compile(r"\\([0-7]{3})")
_MOST_GROUPS = 1000
RECENT_S = 5.0


@dataclass(frozen=True)
class Mounts:
    """Where the memory controller is: mount point by what of the hierarchy is mounted there. v1: the older version."""

    v1: bool
    points: Mapping[str, str]


def find_mounts(mountinfo: str) -> Mounts | None:
    """The memory controller's mounts, from the text of /proc/<pid>/mountinfo; None if there are none.

    A machine may have both versions mounted; memory belongs to the older one then, if that has it.
    """
    found: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        if (kind[0] == "cgroup" and "memory" in kind[2].split(",")) or kind[0] == "cgroup2":
            found[kind[0] == "cgroup"].setdefault(_plain(fields[3]), _plain(fields[4]))
    for v1 in (True, False):
        if found[v1]:
            return Mounts(v1, found[v1])
    return None


def memory_group(cgroup: str, mounts: Mounts) -> Path | None:
    """Folder of the memory group that the text of /proc/<pid>/cgroup names; None if it cannot be seen from here."""
    for line in cgroup.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(",") if mounts.v1 else (number == "0" and not controllers):
            return _folder(path, mounts.points)
    return None


def _folder(path: str, points: Mapping[str, str]) -> Path | None:
    if not path.startswith("/") or ".." in path.split("/"):
        return None
    for root in sorted(points, key=len, reverse=True):
        if path == root or path.startswith(root.rstrip("/") + "/"):
            return Path(points[root]) / path[len(root.rstrip("/")) :].lstrip("/")
    # A container without a namespace of its own sees its group at the mount point, under a name that it does not know.
    return Path(next(iter(points.values())))


def _plain(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


class OomWatch:
    """What the counters say now: of this process' group and those below, and of the groups of workers.

    A worker that the kernel ended is looked at within moments. A kill that was counted longer ago, and that all
    workers survived, was somebody else's: only what rose since the look before the last counts. recent_s: looks are at
    least so far apart. Used by the threads of an agent: what they share is replaced, never changed in place.
    """

    def __init__(self, recent_s: float = RECENT_S) -> None:
        self._mounts = find_mounts(Path("/proc/self/mountinfo").read_text())
        self._recent_s = recent_s
        self._before: dict[Path, int] = {}
        self._last: dict[Path, int] = {}
        self._looked_s = float("-inf")

    def begin(self) -> None:
        """From now on, for new workers."""
        self._looked_s = time.monotonic()
        self._before = self._last = self._read_all(self._own())

    def follow(self, pids: Iterable[int]) -> None:
        """The workers run: look at the groups of these processes too, wherever they were put."""
        paths = {path for pid in pids if (path := self._counter(str(pid))) is not None}
        if new := paths - self._last.keys():
            counts = {path: _read(path) or 0 for path in new}
            self._before, self._last = {**counts, **self._before}, {**self._last, **counts}
        if time.monotonic() - self._looked_s >= self._recent_s:
            self._looked_s = time.monotonic()
            self._before, self._last = self._last, self._read_all([*self._last, *self._own()])

    def scope(self) -> str:
        """Where kills were counted of late, in words; "" for nowhere."""
        before = self._before
        for path in dict.fromkeys([*before, *self._own()]):
            count = _read(path)
            if count is not None and count > before.get(path, 0):
                return "this machine" if path == _MACHINE else f"cgroup {path.parent}"
        return ""

    @staticmethod
    def _read_all(paths: Iterable[Path]) -> dict[Path, int]:
        return {path: count for path in paths if (count := _read(path)) is not None}

    def _own(self) -> list[Path]:
        counter = self._counter("self")
        if counter is None:
            # No group whose count could be read: the machine's own is the best there is.
            return [_MACHINE]
        if counter.name == "memory.events":
            return [counter]
        below = (Path(folder) / counter.name for folder, _, _ in os.walk(counter.parent))
        return [path for path, _ in zip(below, range(_MOST_GROUPS), strict=False)]

    def _counter(self, pid: str) -> Path | None:
        try:
            text = Path(f"/proc/{pid}/cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        group = memory_group(text, self._mounts) if self._mounts else None
        if group is None:
            return None
        return next((group / name for name in _COUNTERS if (group / name).exists()), None)


def _read(path: Path) -> int | None:
    try:
        found = _LINE.search(path.read_text())
    except OSError:
        # The group was removed meanwhile, and its count with it.
        return None
    return int(found[1]) if found else None
