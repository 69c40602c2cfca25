"""One rank's unfinished push: its buffer file, how much of it is there, and whose turn it is to write."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from checkpointing.checksum import Checksum
from checkpointing.segment import CONTROL_BYTES, Control, SlotState, write_control, write_state

_PIECE_BYTES = 2**20  # still in the cache when it is checksummed and written


class Incoming:
    """What is there of a push. `turn` is held by whoever writes; all but enter, leave, cut and busy need it.

    Bytes are read into a small buffer and written with plain writes: faster than into a mapping, whose pages would
    all have to be brought in first, and a disappearing file is an error here, no SIGBUS.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.control: Control | None = None
        self.received_bytes = 0
        self._running = Checksum()
        self._fd = -1
        self._cut: Callable[[], None] | None = None

    @property
    def busy(self) -> bool:
        """Whether somebody is at it, or waits for a turn."""
        return self._cut is not None

    @property
    def checksum(self) -> str:
        """Of the bytes that are there."""
        return self._running.hex()

    def enter(self, cut: Callable[[], None]) -> None:
        """Ask for the turn: who is at it now is cut off."""
        self.cut()
        self._cut = cut

    def leave(self, cut: Callable[[], None]) -> None:
        """Whoever entered with `cut` is done; another one who has entered since stays."""
        if self._cut is cut:
            self._cut = None

    def cut(self) -> None:
        """Cut off who is at it, if anybody is."""
        if self._cut is not None:
            self._cut()

    def begin(self, path: Path, control: Control) -> None:
        """Start anew in the segment file at `path`, which fits and loses what it held."""
        self._fd = os.open(path, os.O_RDWR)
        write_state(self._fd, SlotState.STAGING)
        self._running = Checksum()
        self.received_bytes = 0
        self.control = control

    def fill(self, end_bytes: int, read_into: Callable[[memoryview], int]) -> None:
        """Read and write until end_bytes of the shard are there, or the stream ends."""
        piece = memoryview(bytearray(min(_PIECE_BYTES, max(0, end_bytes - self.received_bytes))))
        while self.received_bytes < end_bytes:
            count = read_into(piece[: end_bytes - self.received_bytes])
            if count == 0:
                return
            write_at(self._fd, piece[:count], CONTROL_BYTES + self.received_bytes)
            self._running.update(piece[:count])
            self.received_bytes += count

    def complete(self) -> None:
        """Write the control block: the file is a whole segment from here on."""
        assert self.control is not None
        write_control(self._fd, self.control)

    def end(self) -> None:
        """Let go of the file; what was received is forgotten."""
        if self._fd >= 0:
            os.close(self._fd)
        self.control, self.received_bytes, self._fd = None, 0, -1


def write_at(fd: int, data: memoryview, offset_bytes: int) -> None:
    """Write everything at an offset, however the kernel cuts it."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset_bytes + done)
