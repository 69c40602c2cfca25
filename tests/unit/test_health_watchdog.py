"""A hang is noticed within its bound, named, and never seen where training only has slow steps."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import HealthConfig
from configs.timeouts import last_hang_bound_s
from health.verdict import Cause, Verdict
from health.watchdog import Attention, Progress, hang_bound_s, lost_nodes
from trainer.events import Beat, Phase

CONFIG = HealthConfig(hang_factor=10.0, hang_floor_s=10.0, heartbeat_interval_s=1.0, startup_timeout_s=60.0)
NODES = {0: "node0", 1: "node0", 2: "node1", 3: "node1"}
STEP_PHASES = (Phase.DATA, Phase.FORWARD_BACKWARD, Phase.VOTE, Phase.OPTIMIZER, Phase.SNAPSHOT)


@dataclass(frozen=True)
class Seen:
    rank: int
    beat: Beat | None
    process_state: str = "S"


def beat(step: int, phase: Phase = Phase.FORWARD_BACKWARD, last_s: float = 1.0, generation: int = 1) -> Beat:
    return Beat(step=step, phase=phase, monotonic_s=1e6 + step + phase / 10, last_step_s=last_s, generation=generation)


def tell(progress: Progress, now_s: float, beats: dict[int, Beat | None], states: dict[int, str] | None = None) -> None:
    for node in ("node0", "node1"):
        mine = [Seen(r, b, (states or {}).get(r, "S")) for r, b in beats.items() if NODES[r] == node]
        progress.feed(now_s, node, mine)


def stand_still(
    progress: Progress,
    beats: dict[int, Beat | None],
    since_s: float,
    until_s: float,
    states: dict[int, str] | None = None,
) -> tuple[float, Verdict] | None:
    """Heartbeats go on arriving, but say the same; returns when and how the watchdog judged."""
    now_s = since_s
    while now_s <= until_s:
        tell(progress, now_s, beats, states)
        verdict = progress.judge(now_s)
        if verdict is not None:
            return now_s, verdict
        now_s += 0.5
    return None


def moving(beats: dict[int, Beat | None], now_s: float = 100.0) -> Progress:
    """A generation that has finished a step of one second and then came to these beats."""
    progress = Progress(1, NODES, CONFIG, now_s - 2)
    tell(progress, now_s - 1, dict.fromkeys(NODES, beat(1, Phase.DATA, last_s=0.0)))
    tell(progress, now_s, beats)
    return progress


def test_the_bound_follows_from_the_slowest_recent_step() -> None:
    assert hang_bound_s([], CONFIG) == 60.0
    assert hang_bound_s([0.2, 0.1], CONFIG) == 10.0
    assert hang_bound_s([2.0, 3.0, 1.0], CONFIG) == 30.0
    assert hang_bound_s([100.0, *[2.0] * 40], CONFIG) == 20.0


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.05, 5.0),
    st.lists(st.floats(0.0, 1.0), min_size=5, max_size=60),
    st.floats(0.1, 1.0),
    st.integers(0, 2**32),
)
def test_noisy_steps_raise_no_alarm_and_a_stop_always_does(
    base_s: float, noise: list[float], interval_s: float, seed: int
) -> None:
    """Steps take anything up to hang_factor times the shortest, a slow first step included: no verdict. Then all stop:
    a verdict within the bound and one heartbeat of the last one that brought news."""
    config = HealthConfig(
        heartbeat_interval_s=interval_s, heartbeat_timeout_s=5 * interval_s, hang_factor=10.0, hang_floor_s=1.0,
        startup_timeout_s=100.0,
    )  # fmt: skip
    pick = random.Random(seed)
    lengths_s = [base_s * (1 + 9 * part) for part in noise]
    lengths_s[0] = min(90.0, 9 * max(lengths_s))
    events: list[tuple[float, Beat]] = []
    now_s, last_s = 0.0, 0.0
    for step, length_s in enumerate(lengths_s, start=1):
        cuts = sorted(pick.random() for _ in STEP_PHASES[1:])
        for phase, part in zip(STEP_PHASES, [0.0, *cuts], strict=True):
            events.append((now_s + part * length_s, beat(step, phase, last_s)))
        now_s, last_s = now_s + length_s, length_s
    end_s = now_s
    events.append((end_s, beat(len(noise) + 1, Phase.DATA, last_s)))

    progress = Progress(1, NODES, config, 0.0)
    tick_s, told_at, last_news_s = 0.0, 0, 0.0
    while tick_s <= end_s + interval_s:
        while told_at < len(events) and events[told_at][0] <= tick_s:
            told_at, last_news_s = told_at + 1, tick_s
        current = events[told_at - 1][1] if told_at else None
        tell(progress, tick_s, dict.fromkeys(NODES, current))
        assert progress.judge(tick_s) is None
        tick_s += interval_s
    judged = None
    deadline_s = last_news_s + progress.bound_s() + 2 * interval_s
    while judged is None and tick_s <= deadline_s:
        tell(progress, tick_s, dict.fromkeys(NODES, events[-1][1]))
        judged = progress.judge(tick_s)
        tick_s += interval_s
    assert judged is not None
    assert judged.cause is Cause.HANG
    assert (judged.node, judged.rank) == ("", -1)


def test_a_stopped_process_is_named_and_needs_no_long_bound() -> None:
    """SIGSTOP: the state letter is proof, even in the first step, where the bound is startup_timeout_s."""
    beats: dict[int, Beat | None] = dict.fromkeys(NODES, beat(1, last_s=0.0))
    progress = Progress(1, NODES, CONFIG, 0.0)
    at_s, verdict = stand_still(progress, beats, 1.0, 60.0, {2: "T"}) or pytest.fail("no verdict")
    assert at_s <= 1.0 + CONFIG.hang_floor_s + CONFIG.heartbeat_interval_s + 1.0
    assert (verdict.cause, verdict.node, verdict.rank) == (Cause.HANG, "node1", 2)
    assert "stopped" in verdict.evidence[0]
    assert any("rank 2 on node1: step 1 forward_backward" in line and "state T" in line for line in verdict.evidence)


def test_the_rank_furthest_behind_is_the_culprit() -> None:
    beats: dict[int, Beat | None] = dict.fromkeys(NODES, beat(2, Phase.VOTE))
    beats[1] = beat(2, Phase.DATA)
    _, verdict = stand_still(moving(beats), beats, 100.5, 130.0) or pytest.fail("no verdict")
    assert (verdict.cause, verdict.node, verdict.rank, verdict.step) == (Cause.HANG, "node0", 1, 2)


def test_half_of_the_ranks_is_no_minority() -> None:
    """When no rank stands out, nobody is blamed: a node must not be evicted on a guess."""
    beats: dict[int, Beat | None] = {r: beat(2, Phase.VOTE if r < 2 else Phase.DATA) for r in NODES}
    _, verdict = stand_still(moving(beats), beats, 100.5, 130.0) or pytest.fail("no verdict")
    assert (verdict.node, verdict.rank) == ("", -1)
    assert "all ranks wait" in verdict.evidence[0]


def test_everybody_in_uninterruptible_wait_blames_nobody() -> None:
    beats: dict[int, Beat | None] = dict.fromkeys(NODES, beat(2))
    _, verdict = stand_still(moving(beats), beats, 100.5, 130.0, dict.fromkeys(NODES, "D")) or pytest.fail("none")
    assert verdict.node == ""


def test_a_first_step_that_never_ends_is_a_startup_timeout() -> None:
    beats: dict[int, Beat | None] = dict.fromkeys(NODES, beat(1, last_s=0.0))
    progress = Progress(1, NODES, CONFIG, 0.0)
    at_s, verdict = stand_still(progress, beats, 1.0, 100.0) or pytest.fail("no verdict")
    assert 60.0 < at_s < 64.0
    assert verdict.cause is Cause.STARTUP_TIMEOUT


def test_beats_of_an_older_generation_are_not_progress() -> None:
    progress = Progress(2, NODES, CONFIG, 0.0)
    verdict = None
    for second in range(1, 70):
        tell(progress, float(second), dict.fromkeys(NODES, beat(second, generation=1)))
        verdict = verdict or progress.judge(float(second))
    assert verdict is not None
    assert progress.newest_step == -1


def test_a_long_save_that_keeps_beating_is_no_hang() -> None:
    progress = moving(dict.fromkeys(NODES, beat(2)))
    for second in range(101, 200):
        alive = Beat(step=2, phase=Phase.SNAPSHOT, monotonic_s=float(second), last_step_s=1.0, generation=1)
        tell(progress, float(second), dict.fromkeys(NODES, alive))
        assert progress.judge(float(second)) is None


def test_ranks_that_finished_may_take_their_time_to_leave() -> None:
    beats: dict[int, Beat | None] = dict.fromkeys(NODES, beat(9, Phase.FINISHED))
    progress = moving(beats)
    assert stand_still(progress, beats, 100.5, 155.0, dict.fromkeys(NODES, "Z")) is None
    assert stand_still(progress, beats, 155.5, 170.0) is not None


def test_a_silent_node_is_not_a_hang() -> None:
    progress = moving(dict.fromkeys(NODES, beat(2)))
    for second in range(101, 140):
        progress.feed(float(second), "node0", [Seen(0, beat(2)), Seen(1, beat(2))])
        assert progress.judge(float(second)) is None


def test_an_agent_that_is_late_again_and_again_hides_no_hang_for_ever() -> None:
    """Promise: past the last bound the others are judged, and nothing old is held against the late one's ranks."""
    beats: dict[int, Beat | None] = dict.fromkeys(NODES, beat(2, Phase.VOTE))
    beats[2] = beat(2, Phase.DATA)
    progress = moving(beats)
    last_s = last_hang_bound_s(CONFIG, CONFIG.hang_floor_s) + CONFIG.heartbeat_timeout_s
    found: tuple[float, Verdict] | None = None
    for half in range(2 * int(last_s + 10)):
        now_s = 100.5 + half / 2
        progress.feed(now_s, "node0", [Seen(0, beats[0]), Seen(1, beats[1])])
        verdict = progress.judge(now_s)
        if verdict is not None:
            found = (now_s, verdict)
            break
    at_s, verdict = found or pytest.fail("no verdict")
    assert last_s < at_s - 100.0 <= last_s + 1.5
    assert (verdict.node, verdict.rank) == ("", -1)
    assert progress.hushed(at_s) == ["node1"]


def test_a_supervisor_that_was_itself_stopped_blames_nobody() -> None:
    """After a pause of its own (SIGSTOP, swap), neither hang nor lost nodes until it has watched long enough."""
    beats: dict[int, Beat | None] = dict.fromkeys(NODES, beat(2))
    progress = moving(beats)
    assert progress.judge(100.5) is None
    tell(progress, 500.0, beats)
    assert progress.judge(500.0) is None
    attention = Attention(100.0, longest_break_s=2.0)
    assert attention.tick(101.0) == 100.0
    since_s = attention.tick(500.0)
    assert lost_nodes(500.0, {"node0": 101.0}, CONFIG, watching_since_s=since_s) == []
    assert lost_nodes(506.0, {"node0": 101.0}, CONFIG, watching_since_s=since_s) != []


@given(st.dictionaries(st.sampled_from(["node0", "node1", "node2"]), st.floats(0, 100)))
def test_exactly_the_silent_nodes_are_lost(heard_s: dict[str, float]) -> None:
    lost = lost_nodes(100.0, heard_s, CONFIG, step=4)
    assert [each.node for each in lost] == sorted(
        node for node, at_s in heard_s.items() if 100.0 - at_s > CONFIG.heartbeat_timeout_s
    )
    assert all(each.cause is Cause.NODE_LOST and each.step == 4 and each.evidence for each in lost)
