"""The state is a fold of the journal, and the journal survives what a crash leaves behind."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.events import AgentStarted, AnyEvent, NodeEvicted, NodeFinished, SupervisorTookOver
from cluster.jobstate import JobState, NodeStatus
from cluster.journal import Journal, read_events, read_steps, tail, tail_steps
from cluster.state import apply, replay
from health.verdict import Cause, Severity
from tests.unit import stories
from tests.unit.stories import verdict
from trainer.events import FactKind, append_line

NODES = st.sampled_from(["node0", "node1", "node2"])
ORDERS = st.sampled_from([("node0", "node1"), ("node2", "node1")])
T = {"t_wall_s": 1.0, "t_mono_s": 1.0}
EVENTS = st.lists(
    st.one_of(
        st.builds(stories.started, st.integers(1, 3), st.just(1.0)),
        st.builds(SupervisorTookOver, supervisor_pid=st.integers(1, 9), t_wall_s=st.just(1.0), t_mono_s=st.just(1.0)),
        st.builds(AgentStarted, node=NODES, handle=st.just("1"), t_wall_s=st.just(1.0), t_mono_s=st.just(1.0)),
        st.builds(stories.ready, NODES, st.just(1.0)),
        st.builds(stories.planned, st.integers(1, 9), st.just(1.0), ORDERS),
        st.builds(stories.fact, st.sampled_from(list(FactKind)), st.integers(1, 9), st.integers(0, 50), st.just(1.0)),
        st.builds(
            stories.given,
            st.builds(verdict, st.sampled_from(list(Cause)), NODES, severity=st.sampled_from(list(Severity))),
            st.integers(1, 9), st.integers(1, 5), st.just(1.0),
        ),
        st.builds(
            stories.action, st.sampled_from(["restart", "replace", "stop", "nothing"]), st.integers(1, 5), st.just(1.0),
            NODES, NODES,
        ),
        st.builds(NodeEvicted, node=NODES, reason=st.just("x"), t_wall_s=st.just(1.0), t_mono_s=st.just(1.0)),
        st.builds(
            NodeFinished, node=NODES, generation=st.integers(1, 9), step=st.integers(0, 50), t_wall_s=st.just(1.0),
            t_mono_s=st.just(1.0),
        ),
        st.builds(stories.stopped, st.sampled_from([0, 1, 2, 75, 93]), st.just(1.0), st.integers(0, 50)),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(0, 30))
def test_replaying_a_journal_in_two_parts_is_replaying_it_at_once(events: list[AnyEvent], cut: int) -> None:
    """A supervisor that dies anywhere and is restarted knows what the old one knew; no order of events fails."""
    state = replay(events[:cut])
    kept = msgspec.json.encode(state)
    for event in events[cut:]:
        state = apply(state, event)
    assert state == replay(events)
    assert replay(events[:cut]) == msgspec.json.decode(kept, type=JobState), "an earlier state was changed in place"


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_an_evicted_node_never_comes_back_by_itself(events: list[AnyEvent]) -> None:
    state = apply(replay(events), NodeEvicted(node="node2", reason="x", **T))
    state = apply(state, stories.ready("node2", 1.0))
    state = apply(state, AgentStarted(node="node2", handle="2", **T))
    state = apply(state, stories.started(2, 1.0))
    assert state.status("node2") is NodeStatus.EVICTED
    assert "node2" not in state.spares


def test_the_life_of_an_incident() -> None:
    state = replay([stories.started(1, 0.0), stories.ready("node2", 0.0), stories.planned(1, 1.0)])
    state = apply(state, stories.given(verdict(Cause.NODE_LOST, "node1", -1), 1, state.next_incident, 5.0, 4.0))
    assert state.open_incidents[0].action == ""
    assert state.status("node1") is NodeStatus.LOST
    state = apply(state, stories.action("replace", 1, 5.0, "node1", "node2"))
    state = apply(state, stories.planned(2, 6.0, ("node0", "node2")))
    assert state.open_incidents[0].action == "replace"
    assert (state.restarts_used, state.next_incident) == (1, 2)
    state = apply(state, stories.fact(FactKind.FIRST_STEP, 1, 3, 6.0))
    assert state.open_incidents, "a late word of the old generation does not close it"
    state = apply(state, stories.fact(FactKind.FIRST_STEP, 2, 8, 7.0))
    assert state.open_incidents == ()


def test_a_node_that_holds_ranks_is_no_spare_while_its_agent_comes_back() -> None:
    state = replay([stories.ready("node2", 0.0), stories.planned(1, 1.0)])
    state = apply(state, AgentStarted(node="node1", handle="2", **T))
    state = apply(state, stories.ready("node1", 2.0))
    assert state.spares == ("node2",)


def test_the_newest_snapshot_is_one_that_was_not_rejected() -> None:
    facts = [stories.fact(FactKind.SNAPSHOT_COMMITTED, 1, step, 1.0) for step in (10, 20)]
    assert replay(facts).newest_snapshot == 20
    assert replay([*facts, stories.fact(FactKind.SNAPSHOT_REJECTED, 2, 20, 2.0)]).newest_snapshot == 10
    assert replay([]).newest_snapshot == -1


def test_snapshots_beyond_the_one_loaded_count_no_more() -> None:
    """A run directory that was lost, and a bucket that was older: memory's later steps must not look old beside it."""
    facts = [stories.fact(FactKind.SNAPSHOT_COMMITTED, 1, step, 1.0) for step in (10, 20)]
    assert replay([*facts, stories.fact(FactKind.LOADED, 2, 10, 2.0)]).newest_snapshot == 10
    assert replay([*facts, stories.fact(FactKind.LOADED, 2, 24, 2.0)]).newest_snapshot == 20


@settings(max_examples=30, deadline=None)
@given(EVENTS, st.integers(0, 10_000))
def test_a_journal_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, events: list[AnyEvent], cut: int
) -> None:
    """A torn last line is ignored, and the next event begins on a line of its own."""
    path = tmp_path_factory.mktemp("journal") / "events.jsonl"
    journal = Journal(path)
    for event in events:
        journal.append(event)
    assert read_events(path) == events
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    # A line that lost nothing but its newline is whole.
    whole = data.count(b"\n") + (data[-1:] == b"}" and data.rsplit(b"\n", 1)[-1] in map(msgspec.json.encode, events))
    journal = Journal(path)
    journal.append(stories.stopped(0, 9.0))
    assert read_events(path) == [*events[:whole], stories.stopped(0, 9.0)]


def test_what_a_newer_version_wrote_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    journal.append(stories.started(1, 0.0))
    with path.open("ab") as file:
        file.write(b'{"event":"from_the_future","t_wall_s":1,"t_mono_s":1}\n{"half\n\xff\xfe\n')
    journal.append(stories.stopped(0, 1.0))
    lines = tail(path, 0)
    assert lines.records == [stories.started(1, 0.0), stories.stopped(0, 1.0)]
    assert lines.skipped == 3


def test_a_follower_gets_every_event_once_and_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert tail(path, 0).records == []
    journal = Journal(path)
    journal.append(stories.started(1, 0.0))
    first = tail(path, 0)
    line = msgspec.json.encode(stories.stopped(0, 1.0)) + b"\n"
    with path.open("ab") as file:
        file.write(line[:20])
        file.flush()
        second = tail(path, first.offset)
        file.write(line[20:])
    third = tail(path, second.offset)
    assert first.records == [stories.started(1, 0.0)]
    assert (second.records, second.skipped) == ([], 0)
    assert third.records == [stories.stopped(0, 1.0)]


def test_a_full_disk_delays_the_journal_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(path)
    assert "No space left" in str(journal.append(stories.started(1, 0.0)))
    path.unlink()
    assert journal.append(stories.stopped(0, 1.0)) is None
    assert read_events(path) == [stories.started(1, 0.0), stories.stopped(0, 1.0)]


def test_storage_that_only_fails_to_keep_what_it_took_ends_no_supervisor(tmp_path: Path) -> None:
    """Promise: an error of fsync, by which shared storage often tells that it is full, is returned as any other."""
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/null")  # takes every line, and refuses fsync
    assert isinstance(Journal(path).append(stories.started(1, 0.0)), OSError)


def test_metrics_are_read_past_a_torn_row_and_without_a_finite_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = stories.record(1, 1, 10.0, 1.0, 0.1, 0.0)
    nan = msgspec.structs.replace(row, step=2, loss_avg=float("nan"), grad_norm=None)
    append_line(path, row)
    append_line(path, nan)
    with path.open("ab") as file:
        file.write(b'{"step": 3, "st')
    assert read_steps(path) == [row, msgspec.structs.replace(nan, loss_avg=None)]
    assert tail_steps(path, 0).offset < path.stat().st_size
