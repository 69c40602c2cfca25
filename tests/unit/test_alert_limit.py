"""No flood of alerts, and none that is silently lost."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.alert_limit import HOUR_S, AlertLimit

PAUSES = st.lists(st.tuples(st.floats(0, 2 * HOUR_S), st.sampled_from("abc"), st.booleans(), st.booleans()))


@given(st.integers(1, 6), PAUSES)
def test_any_hour_has_at_most_so_many_and_nothing_is_lost(per_hour: int, steps: list) -> None:  # type: ignore[type-arg]
    """Promise: in every window of an hour there are at most n messages, and each alert is sent, summed up, or held."""
    limit = AlertLimit(per_hour)
    now, sent = 0.0, []
    offered: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for pause, kind, urgent, tick in steps:
        now += pause
        if tick and (summary := limit.summary(now)):
            sent.append(now)
            told.update(summary)
        offered[kind] += 1
        if limit.admit(now, kind, urgent):
            sent.append(now)
            told[kind] += 1
    assert all(sum(begin <= each < begin + HOUR_S for each in sent) <= per_hour for begin in sent)
    told.update(limit.held)
    assert told == offered


@given(st.integers(1, 6), st.integers(1, 40))
def test_a_flood_ends_in_one_summary_and_does_not_hide_the_end(per_hour: int, count: int) -> None:
    """Promise: one place is kept for the run's end, and what was held back is told after an hour at the latest."""
    limit = AlertLimit(per_hour)
    admitted = sum(limit.admit(float(at), "small") for at in range(count))
    assert admitted == min(count, max(1, per_hour - 1))
    if per_hour > 1:
        assert limit.admit(float(count), "the end", urgent=True)
    held = count - admitted
    assert sum(limit.held.values()) == held
    assert limit.summary(count + HOUR_S) == ({"small": held} if held else {})
    assert not limit.held


def test_what_is_held_can_be_told_along() -> None:
    """Promise: a message that goes out anyway may carry it; it is then not told again."""
    limit = AlertLimit(1)
    assert limit.admit(0.0, "a")
    assert not limit.admit(1.0, "b")
    assert limit.take_held() == {"b": 1}
    assert limit.summary(2 * HOUR_S) == {}


def test_none_an_hour_is_refused() -> None:
    """Promise: an alert that nobody would ever get is an error."""
    with pytest.raises(ValueError, match="set 1 or more"):
        AlertLimit(0)
