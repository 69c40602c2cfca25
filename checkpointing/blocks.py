"""Reads a verified file a second time, and sees to it that it gives the same bytes again.

A file is verified as a whole before a byte of it is used, and read again to be used; a medium may rot, and a file be
written, in between. So the first reading notes a digest of each block, and the second one compares.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import xxhash

BLOCK_BYTES = 2**20


class Reader(Protocol):
    """Gives a file's bytes."""

    def read_into(self, buffer: memoryview, start_bytes: int) -> None:
        """Fill the buffer. OSError if the file does not give it."""


class BlockDigests:
    """A digest of each block of a file, taken while it is read from its start to its end."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._digests: list[int] = []
        self._running = xxhash.xxh3_64()

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        done = 0
        while done < len(data):
            count = min(len(data) - done, BLOCK_BYTES - self.size_bytes % BLOCK_BYTES)
            self._running.update(data[done : done + count])
            done += count
            self.size_bytes += count
            if self.size_bytes % BLOCK_BYTES == 0:
                self._digests.append(self._running.intdigest())
                self._running = xxhash.xxh3_64()

    def matches(self, block: int, data: memoryview) -> bool:
        """Whether these are the bytes of a block."""
        known = self._digests[block] if block < len(self._digests) else self._running.intdigest()
        return xxhash.xxh3_64_intdigest(data) == known


class PlainReader:
    """An open file, taken as it is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read_into(self, buffer: memoryview, start_bytes: int) -> None:
        """See `Reader`."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], start_bytes + done)
            if count == 0:
                raise OSError(errno.EIO, "a shard that had been verified ended early")
            done += count


class VerifiedReader:
    """A file that must give what it gave when the digests were taken. Keeps one block in memory."""

    def __init__(self, path: Path, digests: BlockDigests) -> None:
        self._path = path
        self._digests = digests
        self._fd = os.open(path, os.O_RDONLY)
        self._plain = PlainReader(self._fd)
        self._kept = memoryview(bytearray(min(BLOCK_BYTES, max(digests.size_bytes, 1))))
        self._kept_block = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)

    def read_into(self, buffer: memoryview, start_bytes: int) -> None:
        """See `Reader`; bytes that differ from the first reading are an OSError."""
        end_bytes, position = start_bytes + len(buffer), start_bytes
        while position < end_bytes:
            block = position // BLOCK_BYTES
            begin = block * BLOCK_BYTES
            end = min(begin + BLOCK_BYTES, self._digests.size_bytes)
            upto = min(end, end_bytes)
            into = buffer[position - start_bytes : upto - start_bytes]
            if (position, upto) == (begin, end):
                self._read(into, block)
            else:
                if block != self._kept_block:
                    self._kept_block = -1
                    self._read(self._kept[: end - begin], block)
                    self._kept_block = block
                into[:] = self._kept[position - begin : upto - begin]
            position = upto

    def _read(self, into: memoryview, block: int) -> None:
        self._plain.read_into(into, block * BLOCK_BYTES)
        if not self._digests.matches(block, into):
            raise OSError(errno.EIO, "the file has changed since it was verified", str(self._path))
