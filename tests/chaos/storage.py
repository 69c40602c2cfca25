"""Disks that fail: calls that end with EIO (a preloaded library), and file systems that are full or read-only."""

from __future__ import annotations

import mmap
import subprocess
import threading
import time
from collections.abc import Collection
from pathlib import Path

from tests.chaos.faults import SmallDisk

_SOURCE = Path(__file__).parent.parent / "shims" / "failing_disk.c"
_CONTROL_BYTES = 4096
_FOLDER_OFFSET = 8
_PERCENT_OFFSET = 3
_OPERATIONS = ("read", "write", "fsync")
_REMOUNT_S = 5.0


class FailingDisk:
    """Makes reads, writes and fsyncs below a folder fail in every process that has `environment`. Needs gcc.

    folder: where to keep the library and its control file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.library = folder / "failing_disk.so"
        self.control = folder / "failing_disk.control"
        command = ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(self.library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        self.control.write_bytes(bytes(_CONTROL_BYTES))
        with self.control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _CONTROL_BYTES)

    def environment(self) -> dict[str, str]:
        """For the processes that shall have such a disk."""
        return {"LD_PRELOAD": str(self.library), "EVERSTEP_TEST_DISK": str(self.control)}

    def fail(self, folder: Path, operations: Collection[str], percent: int = 100) -> None:
        """From now on, that part of these operations on files below the folder fails with EIO."""
        assert set(operations) <= set(_OPERATIONS), operations
        self.heal()
        name = str(folder.resolve()).encode()
        self._map[_FOLDER_OFFSET:] = name.ljust(_CONTROL_BYTES - _FOLDER_OFFSET, b"\0")
        self._map[_PERCENT_OFFSET] = percent
        for number, operation in enumerate(_OPERATIONS):
            self._map[number] = operation in operations

    def heal(self) -> None:
        """No call fails any more."""
        self._map[: len(_OPERATIONS)] = bytes(len(_OPERATIONS))


class Volume(SmallDisk):
    """A file system that can also be made read-only, as kernels do with one that has failed."""

    def read_only(self) -> bool:
        """Refuse all changes from now on; False if somebody kept a file open for writing all the time."""
        return self._remount("ro")

    def writable(self) -> None:
        """Take changes again."""
        assert self._remount("rw")

    def heal(self) -> None:
        """Writable, and with room."""
        self.writable()
        (self.path / "ballast").unlink(missing_ok=True)

    def _remount(self, how: str) -> bool:
        deadline, pause = time.monotonic() + _REMOUNT_S, threading.Event()
        while time.monotonic() < deadline:
            done = subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], capture_output=True)
            if done.returncode == 0:
                return True
            pause.wait(0.002)  # a file is being written at this moment
        return False
