"""A pod's log shows what is written to files of the run, and the run keeps what the pod's log shows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 16


class Follower:
    """Copies what is appended to a file, in a thread; nobody waits for it but `stop`."""

    def __init__(self, path: Path, to: IO[bytes]) -> None:
        self.path = path
        self.to = to
        self._offset = path.stat().st_size if path.exists() else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Copy what is there, and no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        # A shared volume may be away for a while; what was written comes later.
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self._offset)
            while data := file.read(_CHUNK_BYTES):
                self.to.write(data)
                self._offset += len(data)
            self.to.flush()


@contextlib.contextmanager
def copied(source: IO[bytes], to: IO[bytes], also: Path) -> Iterator[None]:
    """While this lasts, everything from source goes to both; on leaving, until source has ended."""
    thread = threading.Thread(target=_copy_both, args=(source, to, also), name="copy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _copy_both(source: IO[bytes], to: IO[bytes], also: Path) -> None:
    for line in source:
        to.write(line)
        to.flush()
        # Opened for each line: they are few, and a full or absent volume must not stop the others.
        with contextlib.suppress(OSError), also.open("ab") as file:
            file.write(line)
