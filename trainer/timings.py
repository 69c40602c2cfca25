"""Where the time of a rank's last steps went, in memory that its agent reads: a ring of `StepTimes` a rank. No torch.

Written like a heartbeat (see `trainer.events`): plain stores, and a number that is odd meanwhile and is repeated at the
end, by which a reader knows a torn entry.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from trainer.events import StepTimes

RING_STEPS = 16
_ENTRY = struct.Struct("<Qqq7dQ")
_ENTRY_BYTES = 128


class TimesFile:
    """The rings of one node: RING_STEPS entries of 128 bytes for each of `local_ranks`, in one mapped file."""

    def __init__(self, path: Path, local_ranks: int) -> None:
        self.path = path
        self.local_ranks = local_ranks
        self._map: mmap.mmap | None = None

    def open(self) -> TimesFile:
        """Create the file if it is absent, and map it."""
        size_bytes = self.local_ranks * RING_STEPS * _ENTRY_BYTES
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, size_bytes)
            self._map = mmap.mmap(fd, size_bytes)
        finally:
            os.close(fd)
        return self

    def close(self) -> None:
        """Unmap."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def write(self, local_rank: int, generation: int, times: StepTimes) -> None:
        """Put a step in the place of the oldest one. One writer a rank."""
        assert self._map is not None
        offset = self._offset(local_rank, times.step % RING_STEPS)
        sequence = struct.unpack_from("<Q", self._map, offset)[0] | 1
        struct.pack_into("<Q", self._map, offset, sequence)
        _ENTRY.pack_into(
            self._map, offset, sequence, generation, times.step, times.data_s, times.forward_s, times.backward_s,
            times.wait_s, times.optimizer_s, times.snapshot_s, times.total_s, sequence + 1,
        )  # fmt: skip
        struct.pack_into("<Q", self._map, offset, sequence + 1)

    def read(self, local_rank: int, generation: int, after: int = -1) -> tuple[StepTimes, ...]:
        """The generation's steps behind step `after` that are still in the ring, oldest first.

        An entry that is just being written is left out: it is whole the next time.
        """
        assert self._map is not None
        found = []
        for place in range(RING_STEPS):
            offset = self._offset(local_rank, place)
            before, written_by, step, *seconds, tail = _ENTRY.unpack_from(self._map, offset)
            after_it = struct.unpack_from("<Q", self._map, offset)[0]
            whole = before == after_it == tail and before % 2 == 0 and before > 0
            if whole and written_by == generation and step > after:
                data_s, forward_s, backward_s, wait_s, optimizer_s, snapshot_s, total_s = seconds
                found.append(
                    StepTimes(
                        step=step, data_s=data_s, forward_s=forward_s, backward_s=backward_s, wait_s=wait_s,
                        optimizer_s=optimizer_s, snapshot_s=snapshot_s, total_s=total_s,
                    )
                )  # fmt: skip
        return tuple(sorted(found, key=lambda times: times.step))

    @staticmethod
    def _offset(local_rank: int, place: int) -> int:
        return (local_rank * RING_STEPS + place) * _ENTRY_BYTES


class NewSteps:
    """The agent's side: what each report has to say, so that one lost report loses no step."""

    def __init__(self, file: TimesFile) -> None:
        self.file = file
        self._told: dict[int, tuple[int, int]] = {}
        self._generation = 0

    def read(self, local_rank: int, generation: int) -> tuple[StepTimes, ...]:
        """Steps that were not in the report before the last one."""
        if generation != self._generation:
            self._generation = generation
            self._told.clear()
        before_last, last = self._told.get(local_rank, (-1, -1))
        steps = self.file.read(local_rank, generation, before_last)
        self._told[local_rank] = (last, steps[-1].step if steps else last)
        return steps
