"""Benchmarks: the arithmetic of what they report, and that the figures in the repository can be read back."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.processor import ROLES, used_between
from benchmarks.recovery_sides import Step, between, recovered
from benchmarks.results import (
    RESULTS,
    Result,
    machine,
    now,
    ratio,
    read_result,
    series,
    settings,
    summarise,
    versions,
    write_result,
)

VALUES = st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=20)


@given(VALUES)
def test_summary_keeps_every_value_and_its_spread(values: list[float]) -> None:
    """Nothing is dropped as an outlier, and the median is the middle of all that was measured."""
    found = summarise(values)
    assert list(found.values) == values
    assert (found.n, found.median) == (len(values), statistics.median(values))
    assert found.minimum == min(values)
    assert found.maximum == max(values)


def test_nothing_measured_is_no_figure() -> None:
    """A side that was never measured does not become a zero."""
    with pytest.raises(ValueError, match="nothing was measured"):
        summarise([])


@given(VALUES, VALUES)
def test_ratio_is_median_over_median(ours: list[float], theirs: list[float]) -> None:
    """Not the mean of ratios and not best over worst; it names both of its ends."""
    found = ratio("x", series("a", "time", "s", ours), series("b", "time", "s", theirs))
    assert found.value == statistics.median(ours) / statistics.median(theirs)
    assert (found.numerator, found.denominator) == ("a: time", "b: time")


def test_ratios_of_unlike_things_are_refused() -> None:
    """Milliseconds over seconds, or anything over nothing."""
    with pytest.raises(ValueError, match="ms over s"):
        ratio("x", series("a", "t", "ms", [1.0]), series("b", "t", "s", [1.0]))
    with pytest.raises(ValueError, match="b: t is zero"):
        ratio("x", series("a", "t", "s", [1.0]), series("b", "t", "s", [0.0]))


@given(st.lists(st.floats(min_value=0.0, max_value=10.0), min_size=1, max_size=8), st.floats(0.0, 100.0))
def test_phases_sum_to_the_whole(lengths: list[float], begin_s: float) -> None:
    """The phases of a recovery leave no second without a name."""
    marks: dict[str, float] = {}
    at_s = begin_s
    for number, length in enumerate(lengths):
        at_s += length
        marks[str(number)] = at_s
    found = between(marks, begin_s)
    assert list(found) == list(marks)
    assert sum(found.values()) == pytest.approx(at_s - begin_s)


def test_recovery_ends_past_the_step_in_flight() -> None:
    """A step that is computed again is the first one, but only one that was not finished before is new.

    A step whose line came after the kill still belongs to the old workers.
    """
    old = [Step(1, 7, 10.0), Step(1, 8, 11.0), Step(1, 9, 12.01)]
    again = Step(2, 9, 14.0)
    assert recovered([*old], killed_s=12.0) is None
    assert recovered([*old, again], killed_s=12.0) is None
    new = Step(2, 10, 15.0)
    assert recovered([*old, again, new], killed_s=12.0) == (old[-1], again, new)


def test_processor_time_counts_those_that_came_and_not_what_was_before() -> None:
    """A role's share is what its processes used in between; every role is named, also one that used nothing."""
    before = {1: ("ranks", 5.0), 2: ("ranks", 1.0), 3: ("agents", 2.0)}
    after = {1: ("ranks", 6.0), 3: ("agents", 2.5), 4: ("ranks", 0.25)}
    assert used_between(before, after) == {**dict.fromkeys(ROLES, 0.0), "ranks": 1.25, "agents": 0.5}


def _result() -> Result:
    one = series("everstep", "time", "s", [1.0, 2.0])
    return Result(
        benchmark="example",
        taken_at=now(),
        seconds=1.0,
        machine=machine(),
        versions=versions(),
        settings=settings({"steps": 3}),
        series=(one,),
        ratios=(ratio("x", one, one),),
        notes=("a note",),
    )


def test_a_result_reads_back_as_written(tmp_path: Path) -> None:
    """The file holds all there is, machine and versions included, and no half-written one is left beside it."""
    result = _result()
    path = write_result(result, tmp_path)
    assert read_result(path) == result
    assert [each.name for each in tmp_path.iterdir()] == ["example.json"]
    assert result.machine.cores > 0
    assert result.versions.packages["torch"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_hold_to_the_schema(path: Path) -> None:
    """Figures that pages quote can be read, and their medians and ratios follow from the values beside them."""
    result = msgspec.json.decode(path.read_bytes(), type=Result, strict=True)
    assert result.benchmark == path.stem
    scale = {"ms": 1e-3}
    medians = {f"{each.side}: {each.name}": each.summary.median * scale.get(each.unit, 1.0) for each in result.series}
    for each in result.series:
        assert summarise(each.summary.values) == each.summary
    for found in result.ratios:
        assert found.value == pytest.approx(medians[found.numerator] / medians[found.denominator])
