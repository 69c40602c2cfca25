"""A slow rank is named soon and rightly, whatever slows everybody is told from it, and noise alone is never blamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ClusterConfig, HealthConfig, ParallelismConfig
from health.changes import ladder_for
from health.straggler import Stragglers, peer_groups
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.unit.noisysteps import Machine, Slow
from tests.unit.stories import job
from trainer.events import StepTimes

RANKS = range(4)
RAW = Machine.recorded()
QUIET = RAW.quiet(0.01)
BEGIN = 300
"""When something becomes slow: by then the noise is known."""


def detector(groups: dict[int, int] | None = None, **health: float) -> Stragglers:
    config = HealthConfig(**health)  # type: ignore[arg-type]
    return Stragglers({r: f"node{r // 2}" for r in RANKS}, groups or dict.fromkeys(RANKS, 0), config)


def live(watch: Stragglers, steps: Iterable[dict[int, StepTimes]], may_replace: bool = False) -> list[Verdict]:
    """Everything that is told in the order of steps."""
    verdicts = []
    for by_rank in steps:
        for rank, times in by_rank.items():
            watch.feed(rank, [times])
        verdicts += watch.judge(may_replace)
    return verdicts


def found(machine: Machine, *slow: Slow, steps: int = BEGIN + 60, seed: int = 0) -> list[Verdict]:
    return live(detector(), machine.steps(steps, seed, *slow))


@pytest.mark.parametrize(("machine", "seed"), [(QUIET, 0), (RAW, 1)], ids=["quiet", "raw"])
def test_noise_alone_is_no_alarm_in_ten_thousand_steps(machine: Machine, seed: int) -> None:
    """Promise: no false alarm in 10,000 steps with recorded noise, as it was and as it is on a quiet machine."""
    assert live(detector(), machine.steps(10_000, seed)) == []


def test_a_rank_that_becomes_a_fifth_slower_is_named_within_three_steps() -> None:
    """Promise: on a quiet machine 20% is noticed in 3 steps, the rank, its node and its slow part are named."""
    for seed in range(12):
        slow = seed % 4
        part = ("forward", "backward")[seed % 2]
        usual = QUIET.usual_s[slow]
        factor = 1.0 + 0.2 * sum(usual.values()) / usual[part]
        verdicts = found(QUIET, Slow(BEGIN, (slow,), part, factor), steps=BEGIN + 10, seed=seed)
        assert [(each.cause, each.rank, each.node) for each in verdicts] == [
            (Cause.STRAGGLER, slow, f"node{slow // 2}")
        ]
        assert verdicts[0].step <= BEGIN + 2
        assert (verdicts[0].severity, verdicts[0].certainty) == (Severity.NOTICE, Certainty.HINT)
        assert f"slow is its {part}" in verdicts[0].evidence[1]
        assert 0.05 < verdicts[0].slowdown < 0.3


def test_raw_noise_is_measured_and_a_rank_that_stands_out_of_it_is_named() -> None:
    """Promise: where noise hides 20%, the detector says from what on it sees, and sees that: later, but rightly."""
    watch = detector()
    live(watch, RAW.steps(BEGIN, 5))
    floor = watch.floors()[0]
    assert floor.noise > 0.1
    assert floor.steps > 3
    hits = []
    for seed in range(6):
        verdicts = found(RAW, Slow(BEGIN, (seed % 4,), "all", 2.5), seed=seed)
        hits += [each for each in verdicts if each.rank == seed % 4 and each.cause is Cause.STRAGGLER][:1]
        assert {each.rank for each in verdicts if each.cause is Cause.STRAGGLER} <= {seed % 4}
    assert len(hits) == 6


@pytest.mark.parametrize(
    ("slow", "cause"),
    [
        (Slow(BEGIN, (), "exchange", 2.5), Cause.SLOW_NETWORK),
        (Slow(BEGIN, tuple(RANKS), "data", more_s=0.04), Cause.SLOW_DATA),
        (Slow(BEGIN, (0, 1, 3), "data", more_s=0.04), Cause.SLOW_DATA),
        (Slow(BEGIN, tuple(RANKS), "all", 1.3), Cause.SLOW_JOB),
        (Slow(BEGIN, tuple(RANKS), "backward", 1.5), Cause.SLOW_JOB),
    ],
    ids=["network", "data", "data-of-most", "everything", "all-backwards"],
)
def test_what_slows_everybody_is_told_by_its_own_name_and_once(slow: Slow, cause: Cause) -> None:
    """Promise: a slow network, data source or everything is no straggler, and none of them is another."""
    for seed in range(3):
        verdicts = found(QUIET, slow, seed=seed)
        assert [each.cause for each in verdicts] == [cause], verdicts
        assert verdicts[0].step <= BEGIN + (25 if cause is Cause.SLOW_JOB else 5)
        assert (verdicts[0].node, verdicts[0].rank, verdicts[0].severity) == ("", -1, Severity.NOTICE)


@pytest.mark.parametrize(
    "slow",
    [
        Slow(1, tuple(RANKS), "all", 8.0, until=2),
        Slow(BEGIN, tuple(RANKS), "all", 4.0, until=BEGIN + 1),
        Slow(BEGIN, (2,), "all", 20.0, until=BEGIN + 1),
        Slow(BEGIN, (2,), "all", 3.0, until=BEGIN + 2),
    ],
    ids=["first-step", "one-step", "one-step-of-a-rank", "two-steps-of-a-rank"],
)
def test_a_slow_step_is_no_slow_rank(slow: Slow) -> None:
    """Promise: a first step, a pause, one or two bad steps raise no alarm, however long they were."""
    assert found(QUIET, slow) == []


def test_every_tenth_steps_snapshot_is_no_alarm() -> None:
    """Promise: what is slow at regular steps, on all ranks or on one node alone, is no alarm."""
    on_all = [Slow(step, tuple(RANKS), "snapshot", more_s=0.1, until=step + 1) for step in range(10, BEGIN, 10)]
    on_one = [Slow(step, (2, 3), "snapshot", more_s=0.1, until=step + 1) for step in range(10, BEGIN, 10)]
    assert found(QUIET, *on_all, steps=BEGIN) == found(QUIET, *on_one, steps=BEGIN) == []


def test_an_imbalance_from_the_first_steps_is_told_once_and_evicts_nobody() -> None:
    """Promise: work that is unequal from the beginning is told as that, once, and never replaces a node."""
    verdicts = live(detector(), QUIET.steps(1000, 0, Slow(1, (1,), "all", 1.15)), may_replace=True)
    assert [(each.cause, each.rank, each.severity) for each in verdicts] == [(Cause.STRAGGLER, 1, Severity.NOTICE)]
    assert "from the first steps on" in verdicts[0].evidence[0]


def test_what_became_slow_while_noise_hid_it_is_told_in_the_end() -> None:
    """Promise: a rank that slows in a stretch too noisy to tell is found by its past, in a few hundred steps."""
    slow = Slow(30, (2,), "forward", 1.6)
    loud, calm = RAW.quiet(0.6).steps(60, 3, slow), RAW.quiet(0.05).steps(700, 3, slow)
    verdicts = live(detector(), itertools.chain(loud, itertools.islice(calm, 60, None)))
    assert [(each.cause, each.rank) for each in verdicts] == [(Cause.STRAGGLER, 2)]
    assert "of late" in verdicts[0].evidence[0]


def test_a_rank_that_stays_slow_may_be_replaced_but_only_by_a_spare_and_once() -> None:
    """Promise: a notice first; after straggler_persist_steps of it, with a spare, a likely verdict on the node."""
    slow = Slow(BEGIN, (3,), "all", 1.5)
    alone = live(detector(straggler_persist_steps=20), QUIET.steps(BEGIN + 100, 0, slow), may_replace=False)
    assert [each.severity for each in alone] == [Severity.NOTICE]
    verdicts = live(detector(straggler_persist_steps=20), QUIET.steps(BEGIN + 100, 0, slow), may_replace=True)
    assert [(each.severity, each.certainty) for each in verdicts] == [
        (Severity.NOTICE, Certainty.HINT),
        (Severity.NODE, Certainty.LIKELY),
    ]
    assert (verdicts[1].node, verdicts[1].rank, verdicts[1].step - verdicts[0].step) == ("node1", 3, 20)


def test_a_rank_that_recovered_is_not_accused_and_is_noticed_again() -> None:
    """Promise: a passing slowness leads to no action, and does not hide the next one."""
    slow = [Slow(BEGIN, (0,), "all", 1.5, until=BEGIN + 30), Slow(BEGIN + 100, (0,), "all", 1.5)]
    verdicts = live(detector(), QUIET.steps(BEGIN + 130, 0, *slow), may_replace=True)
    assert [(each.rank, each.severity) for each in verdicts] == [(0, Severity.NOTICE), (0, Severity.NOTICE)]
    assert verdicts[1].step >= BEGIN + 100


def test_ranks_are_compared_with_those_that_do_the_same_work() -> None:
    """Promise: peers are the ranks of one pipeline stage; a rank that has none is compared with all others."""
    pipelined = ParallelismConfig(pp=4, dp_shard=2)
    eight = msgspec.structs.replace(job(), parallelism=pipelined, cluster=ClusterConfig(nodes=2, ranks_per_node=4))
    assert peer_groups(eight) == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3}
    # Stages differ by half from the first step on, which is no imbalance; then one rank becomes slow.
    stages = Slow(1, (2, 3), "all", 1.5)
    for groups in ({0: 0, 1: 0, 2: 1, 3: 1}, {rank: rank for rank in RANKS}):
        verdicts = live(detector(groups), QUIET.steps(BEGIN + 10, 0, stages, Slow(BEGIN, (2,), "all", 1.4)))
        assert [(each.cause, each.rank) for each in verdicts] == [(Cause.STRAGGLER, 2)]


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(0, 3))
def test_how_reports_come_changes_nothing(seed: int, burst: int, late: int) -> None:
    """Promise: steps that are repeated, come in bursts, or late from one rank are judged as if told at once."""
    steps = list(QUIET.steps(BEGIN + 6, seed, Slow(BEGIN, (1,), "all", 1.5)))[BEGIN - 60 :]
    at_once = live(detector(), steps)
    watch, verdicts = detector(), []
    for end in range(burst, len(steps) + burst, burst):
        told = steps[max(0, end - 2 * burst) : end]
        for rank in RANKS:
            watch.feed(rank, [by_rank[rank] for by_rank in (told[:-1] if rank == late else told)])
        verdicts += watch.judge(False)
    for by_rank in steps[-1:]:
        watch.feed(late, [by_rank[late]])
    verdicts += watch.judge(False)
    assert verdicts == at_once


def test_a_rank_that_tells_nothing_does_not_stop_the_judging_of_others() -> None:
    """Promise: a step that a rank never tells of is judged without it, once others are 16 steps further."""
    watch, verdicts = detector(), []
    for by_rank in QUIET.steps(BEGIN + 30, 0, Slow(BEGIN, (1,), "all", 1.5)):
        for rank in (0, 1, 2):
            watch.feed(rank, [by_rank[rank]])
        verdicts += watch.judge(False)
    assert [each.rank for each in verdicts] == [1]


@given(st.floats(0.0, 0.6), st.integers(1, 8))
def test_bounds_ask_for_as_many_steps_as_they_were_told_to_at_least(noise: float, steps: int) -> None:
    """Promise: fewer steps than asked for never ring, and noise makes bounds wider, never narrower."""
    bounds = ladder_for(0.182, steps, noise)[0]
    assert (steps - 1) * (bounds.cap - bounds.drift) < bounds.bound
    assert bounds.steps >= steps
    assert bounds.change >= 0.182
    assert ladder_for(0.182, steps, noise + 0.1)[0].change >= bounds.change


@pytest.mark.parametrize(("machine", "factor"), [(QUIET, 1.3), (RAW, 4.0)], ids=["quiet", "raw"])
def test_a_rank_whose_part_in_collectives_is_slow_too_is_no_slow_network(machine: Machine, factor: float) -> None:
    """Promise: a rank that does all things slower, the exchange too, and waits longer itself, is to blame."""
    for seed in range(4):
        slow = Slow(BEGIN, (seed,), "all", factor), Slow(BEGIN, (), "exchange", 2 * factor)
        verdicts = found(machine, *slow, steps=BEGIN + 40, seed=seed)
        assert [(each.cause, each.rank) for each in verdicts] == [(Cause.STRAGGLER, seed)], verdicts


def test_judging_a_large_job_in_pieces_finds_the_same() -> None:
    """Promise: a supervisor of many ranks, which has others to listen to, says what one look at them all would."""
    ranks, found = range(1100), []
    for ranks_at_once in (0, 600):
        watch = Stragglers(dict.fromkeys(ranks, "node0"), dict.fromkeys(ranks, 0), HealthConfig())
        verdicts: list[Verdict] = []
        for step in range(1, 80):
            for rank in ranks:
                forward_s = (
                    1.0 + (rank * 7919 + step * 104729) % 100 / 1e4 + (0.8 if rank == 700 and step > 60 else 0.0)
                )
                times = StepTimes(
                    step=step, data_s=0.01, forward_s=forward_s, backward_s=2.0, wait_s=0.1, optimizer_s=0.1,
                    snapshot_s=0.0, total_s=3.5,
                )  # fmt: skip
                watch.feed(rank, [times])
            calls = 0
            while watch.due:
                verdicts += watch.judge(False, ranks_at_once)
                calls += 1
        assert (calls > 1) == (ranks_at_once > 0)
        found.append(verdicts)
    assert found[0] == found[1]
    assert [verdict.rank for verdict in found[0] if verdict.cause is Cause.STRAGGLER] == [700]
