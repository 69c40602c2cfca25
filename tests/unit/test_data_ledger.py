"""The ledger keeps what counted: the last generation of each step, whatever was cut off or done again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.ledger import LedgerLine, SampleLedger, check_exactly_once, committed_samples, samples_dir


def write(run_dir: Path, generation: int, dp_degree: int, steps: range, global_batch: int = 8) -> None:
    """One generation's ledgers for these steps."""
    local = global_batch // dp_degree
    for dp_rank in range(dp_degree):
        ledger = SampleLedger(run_dir, dp_rank, generation)
        for step in steps:
            ledger.append(step, (step - 1) * global_batch + dp_rank * local, local, f"{step}-{dp_rank}")


def test_an_undisturbed_run_checks(tmp_path: Path) -> None:
    """Every sample of every step once, on the ranks' own lines."""
    write(tmp_path, 0, 4, range(1, 6))
    samples = committed_samples(tmp_path)
    check_exactly_once(samples, steps=5, global_batch=8)
    assert [line.first for line in samples[2]] == [8, 10, 12, 14]


def test_a_shrunk_layout_replaces_lost_steps(tmp_path: Path) -> None:
    """Steps done again by fewer ranks count once; lines of ranks that are gone do not."""
    write(tmp_path, 0, 4, range(1, 6))
    write(tmp_path, 1, 2, range(4, 8))
    samples = committed_samples(tmp_path)
    check_exactly_once(samples, steps=7, global_batch=8)
    assert {line.generation for line in samples[3]} == {0}
    assert [(line.generation, line.count) for line in samples[4]] == [(1, 4), (1, 4)]


def test_a_step_half_written_by_a_dead_generation_does_not_count(tmp_path: Path) -> None:
    """One rank wrote its line, the others died: the next generation's lines stand alone."""
    write(tmp_path, 0, 2, range(1, 3))
    SampleLedger(tmp_path, 0, 0).append(3, 16, 4, "lost")
    write(tmp_path, 1, 2, range(3, 4))
    check_exactly_once(committed_samples(tmp_path), steps=3, global_batch=8)


def test_generations_are_never_mixed(tmp_path: Path) -> None:
    """A lost step that the next generation only began again is incomplete, not patched up with the lost lines."""
    write(tmp_path, 0, 2, range(1, 4))
    SampleLedger(tmp_path, 1, 1).append(3, 20, 4, "begun")
    samples = committed_samples(tmp_path)
    assert [(line.generation, line.dp_rank) for line in samples[3]] == [(1, 1)]
    with pytest.raises(ValueError, match="step 3: samples from 16 are missing"):
        check_exactly_once(samples, steps=3, global_batch=8)


@given(cut=st.integers(1, 60))
def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """Wherever the last line is cut off, the earlier ones stand and a later writer's line is not spoiled by it."""
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, 0, 1, range(1, 4))
    path = samples_dir(run_dir) / "dp-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    kept = committed_samples(run_dir)
    # Without its newline alone, the line is still whole.
    assert list(kept) == ([1, 2, 3] if cut == 1 else [1, 2])
    write(run_dir, 1, 1, range(3, 5))
    check_exactly_once(committed_samples(run_dir), steps=4, global_batch=8)


def line(step: int, first: int, count: int, dp_rank: int = 0) -> LedgerLine:
    return LedgerLine(step=step, generation=0, dp_rank=dp_rank, first=first, count=count, digest="")


@pytest.mark.parametrize(
    ("second_step", "message"),
    [
        ([], "step 2: no rank wrote"),
        ([line(2, 4, 2)], "step 2: its samples end before 6, not before 8"),
        ([line(2, 6, 2)], "step 2: samples from 4 are missing"),
        ([line(2, 4, 2), line(2, 5, 3, 1)], "step 2: samples from 5 are read twice"),
        ([line(2, 0, 4)], "step 2: samples from 0 are read twice"),
        ([line(2, 4, 6)], "step 2: its samples end before 10"),
    ],
)
def test_every_departure_from_exactly_once_is_found(second_step: list[LedgerLine], message: str) -> None:
    """Missing, doubled, foreign or too many samples: each is named."""
    samples = {1: [line(1, 0, 4)], 2: second_step, 3: [line(3, 8, 4)]}
    with pytest.raises(ValueError, match=message):
        check_exactly_once(samples, steps=3, global_batch=4)


def test_a_run_without_a_ledger_does_not_pass(tmp_path: Path) -> None:
    """No evidence is not a proof."""
    with pytest.raises(ValueError, match="step 1"):
        check_exactly_once(committed_samples(tmp_path), steps=1, global_batch=4)
