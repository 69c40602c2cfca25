"""Where a rank's time went reaches the agent whole: no torn entry, no other generation's, none lost with a report."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from trainer.events import StepTimes
from trainer.timings import ENTRY_BYTES, RING_STEPS, NewSteps, TimesFile


def times(step: int) -> StepTimes:
    return StepTimes(
        step=step, data_s=step + 0.1, forward_s=step + 0.2, backward_s=step + 0.3, wait_s=step + 0.4,
        optimizer_s=step + 0.5, snapshot_s=step + 0.6, total_s=step + 0.7,
    )  # fmt: skip


def open_file(folder: Path, ranks: int = 2) -> TimesFile:
    return TimesFile(folder / "times", ranks).open()


def test_the_last_steps_of_each_rank_come_back_in_order(tmp_path: Path) -> None:
    """Promise: as many steps as the ring holds, each rank's own, through another mapping of the file."""
    writer, reader = open_file(tmp_path), open_file(tmp_path)
    for step in range(1, 41):
        writer.write(0, 1, times(step))
        writer.write(1, 1, times(100 + step))
    assert reader.read(0, 1) == tuple(times(step) for step in range(41 - RING_STEPS, 41))
    assert reader.read(1, 1, after=138) == (times(139), times(140))
    writer.close()
    reader.close()


def test_an_earlier_generations_steps_are_not_read(tmp_path: Path) -> None:
    """Promise: what was left by workers of before a restart is not taken for this generation's."""
    file = open_file(tmp_path)
    for step in range(1, 11):
        file.write(0, 1, times(step))
    file.write(0, 2, times(6))
    assert file.read(0, 2) == (times(6),)
    file.close()


def test_an_entry_whose_writer_died_half_way_is_left_out(tmp_path: Path) -> None:
    """Promise: a torn entry is not read, and is written over whole by the next worker."""
    file = open_file(tmp_path)
    file.write(0, 1, times(1))
    file.write(0, 1, times(2))
    with file.path.open("r+b") as raw:
        raw.seek(2 * ENTRY_BYTES)
        sequence = raw.read(1)[0]
        raw.seek(2 * ENTRY_BYTES)
        raw.write(bytes([sequence | 1]))
    assert file.read(0, 1) == (times(1),)
    file.write(0, 1, times(2))
    assert file.read(0, 1) == (times(1), times(2))
    file.close()


@given(
    burst=st.lists(st.tuples(st.integers(0, RING_STEPS // 2), st.booleans()), max_size=30).filter(
        lambda reports: all(a[1] or b[1] for a, b in itertools.pairwise(reports))
    )
)
def test_one_lost_report_loses_no_step(burst: list[tuple[int, bool]], tmp_path_factory: object) -> None:
    """Promise: however many steps fall between reports (up to half the ring), each is told though a report is lost."""
    folder = tmp_path_factory.mktemp("ring")  # type: ignore[attr-defined]
    file = open_file(folder)
    agent, heard, written = NewSteps(file), set(), 0
    for steps, arrives in [*burst, (0, True), (0, True)]:
        for _ in range(steps):
            written += 1
            file.write(0, 1, times(written))
        told = agent.read(0, 1)
        heard |= {each.step for each in told} if arrives else set()
    assert heard == set(range(1, written + 1))
    assert agent.read(0, 1) == ()
    file.close()
