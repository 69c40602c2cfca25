"""Records of a fixed size in a file that a worker and its agent both map: writing one is a store, no system call.

A number that is odd during a write, and is repeated behind the record, lets the reader reject a torn one.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

_NUMBER = struct.Struct("<Q")
_TRIES = 100


class MappedSlots:
    """`count` slots of `slot_bytes` each. fields: what a record holds, in the letters of the module `struct`."""

    def __init__(self, path: Path, count: int, fields: str, slot_bytes: int) -> None:
        self.path = path
        self.slot_bytes = slot_bytes
        self._record = struct.Struct(f"<Q{fields}Q")
        assert self._record.size <= slot_bytes
        self._size_bytes = count * slot_bytes
        self._map: mmap.mmap | None = None

    def open(self) -> None:
        """Create the file if it is absent, and map it."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, self._size_bytes)
            self._map = mmap.mmap(fd, self._size_bytes)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Unmap."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def write(self, slot: int, *values: float) -> None:
        """Publish a record. One writer a slot."""
        assert self._map is not None
        offset = slot * self.slot_bytes
        number = _NUMBER.unpack_from(self._map, offset)[0] | 1
        _NUMBER.pack_into(self._map, offset, number)
        self._record.pack_into(self._map, offset, number, *values, number + 1)
        _NUMBER.pack_into(self._map, offset, number + 1)

    def read(self, slot: int) -> tuple[Any, ...] | None:
        """The latest whole record; None if there is none yet, or a write does not end."""
        assert self._map is not None
        offset = slot * self.slot_bytes
        for _ in range(_TRIES):
            before, *values, tail = self._record.unpack_from(self._map, offset)
            after = _NUMBER.unpack_from(self._map, offset)[0]
            if before == 0:
                return None
            if before == after == tail and before % 2 == 0:
                return tuple(values)
        return None
