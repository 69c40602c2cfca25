"""Where the time of a rank's last steps went, in memory that its agent reads: a ring of `StepTimes` a rank."""

from __future__ import annotations

from pathlib import Path

from trainer.events import StepTimes
from trainer.mappedslots import MappedSlots

RING_STEPS = 16
ENTRY_BYTES = 128


class TimesFile:
    """The rings of one node: RING_STEPS entries of 128 bytes for each of `local_ranks`, in one mapped file."""

    def __init__(self, path: Path, local_ranks: int) -> None:
        self.path = path
        self.local_ranks = local_ranks
        self._slots = MappedSlots(path, local_ranks * RING_STEPS, "qq7d", ENTRY_BYTES)

    def open(self) -> TimesFile:
        """Create the file if it is absent, and map it."""
        self._slots.open()
        return self

    def close(self) -> None:
        """Unmap."""
        self._slots.close()

    def write(self, local_rank: int, generation: int, times: StepTimes) -> None:
        """Put a step in the place of the oldest one. One writer a rank."""
        self._slots.write(
            local_rank * RING_STEPS + times.step % RING_STEPS, generation, times.step, times.data_s, times.forward_s,
            times.backward_s, times.wait_s, times.optimizer_s, times.snapshot_s, times.total_s,
        )  # fmt: skip

    def read(self, local_rank: int, generation: int, after: int = -1) -> tuple[StepTimes, ...]:
        """The generation's steps behind step `after` that are still in the ring, oldest first.

        An entry whose writer was cut off is left out.
        """
        found = []
        for place in range(RING_STEPS):
            entry = self._slots.read(local_rank * RING_STEPS + place)
            if entry is None:
                continue
            written_by, step, data_s, forward_s, backward_s, wait_s, optimizer_s, snapshot_s, total_s = entry
            if written_by == generation and step > after:
                found.append(
                    StepTimes(
                        step=step, data_s=data_s, forward_s=forward_s, backward_s=backward_s, wait_s=wait_s,
                        optimizer_s=optimizer_s, snapshot_s=snapshot_s, total_s=total_s,
                    )
                )  # fmt: skip
        return tuple(sorted(found, key=lambda times: times.step))


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
