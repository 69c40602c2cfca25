"""One checksum for every tier: xxh3-128, written as 32 hex digits.

It finds bit rot, torn writes and mixed-up files; it is no defence against a forger, who could write a matching one.
xxhash lets go of the GIL while it works on large buffers.
"""

from __future__ import annotations

import os

import xxhash

# Small enough to be still in the cache when it is read a second time, for the sum.
CHUNK_BYTES = 2**20


class Checksum:
    """A running checksum: the same value however the bytes are cut into updates."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes."""
        self._hash.update(data)

    def hex(self) -> str:
        """The checksum of all bytes so far."""
        return str(self._hash.hexdigest())


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Checksum of one buffer."""
    return str(xxhash.xxh3_128_hexdigest(data))


def checksum_range(fd: int, start_bytes: int, size_bytes: int) -> str:
    """Checksum of a part of an open file, read in bounded pieces.

    Plain reads and no mapping: a medium that fails gives an OSError here, where a mapping would give SIGBUS. A file
    that ends early gives the checksum of what is there.
    """
    running = Checksum()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(size_bytes, 1))))
    done = 0
    while done < size_bytes:
        count = os.preadv(fd, [buffer[: min(len(buffer), size_bytes - done)]], start_bytes + done)
        if count == 0:
            break
        running.update(buffer[:count])
        done += count
    return running.hex()
