"""The memory of nodes: a file that survives crashes and several writers, and what is concluded from it."""

from __future__ import annotations

import fcntl
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import dispatch
from cluster.events import AnyEvent, NodeEvicted, Place
from cluster.fleet import first_members
from cluster.history import (
    AnyEntry,
    Drained,
    Evicted,
    Examined,
    HistoryFile,
    Judged,
    NodeId,
    Readmitted,
    Served,
)
from cluster.lemons import Standing, standings
from cluster.remembering import Remembering, identify
from health.verdict import Cause, Certainty, Severity
from tests.unit import stories
from tests.unit.stories import verdict

HOUR_S = 3600.0
NOW_S = 1_790_000_000.0
A, B = NodeId("h1", "node0"), NodeId("h2", "node0")


def evicted(node: NodeId, at_h: float, proof: bool = False, gone: bool = False, run: str = "a") -> Evicted:
    certainty = Certainty.PROOF if proof else Certainty.LIKELY
    return Evicted(
        t_wall_s=NOW_S + at_h * HOUR_S, run=run, node=node, incident=int(at_h * 10) + 10_000, certainty=certainty,
        gone=gone, reason="why",
    )  # fmt: skip


def served(node: NodeId, at_h: float, hours: float) -> Served:
    return Served(t_wall_s=NOW_S + at_h * HOUR_S, run="a", nodes=(node,), hours=hours)


def readmitted(node: NodeId, at_h: float) -> Readmitted:
    return Readmitted(t_wall_s=NOW_S + at_h * HOUR_S, node=node, reason="new GPU", who="p")


def examined(node: NodeId, at_h: float, passed: bool) -> Examined:
    return Examined(t_wall_s=NOW_S + at_h * HOUR_S, node=node, passed=passed, reason="memory")


def drained(node: NodeId, at_h: float) -> Drained:
    return Drained(t_wall_s=NOW_S + at_h * HOUR_S, node=node, reason="fan", who="p")


def of(entries: list[AnyEntry], node: NodeId = A, burn_in_hours: float = 24.0) -> Standing:
    (found,) = [each for each in standings(entries, NOW_S + 1000 * HOUR_S, burn_in_hours) if each.node == node]
    return found


@pytest.mark.parametrize(
    ("entries", "place", "words"),
    [
        ([served(A, 10, 10)], Place.MEMBER, "nothing"),
        ([evicted(A, 1, gone=True)], Place.SPARE, "until it has served 24 h"),
        ([evicted(A, 1), served(A, 26, 30)], Place.MEMBER, "has served 25.0 h"),
        ([evicted(A, 1), served(A, 2, 23)], Place.SPARE, "1.0 h so far"),
        ([evicted(A, 1, proof=True)], Place.OUT, "readmit"),
        ([evicted(A, 1, proof=True), served(A, 100, 99)], Place.OUT, "readmit"),
        ([evicted(A, 1, proof=True), readmitted(A, 2)], Place.SPARE, "new GPU"),
        ([evicted(A, 1, proof=True), readmitted(A, 2), served(A, 27, 25)], Place.MEMBER, "served 25.0 h"),
        ([evicted(A, 1, proof=True), readmitted(A, 2), examined(A, 3, True)], Place.MEMBER, "nothing"),
        ([evicted(A, 1, proof=True), readmitted(A, 2), evicted(A, 3, proof=True)], Place.OUT, "evicted"),
        ([evicted(A, 1, proof=True), examined(A, 2, True)], Place.MEMBER, "nothing"),
        ([examined(A, 2, False)], Place.OUT, "examination"),
        ([drained(A, 1), served(A, 90, 80)], Place.OUT, "drained by p"),
        ([drained(A, 1), readmitted(A, 2)], Place.SPARE, "readmitted"),
    ],
)
def test_a_nodes_place_follows_from_what_was_done_with_it_last(
    entries: list[AnyEntry], place: Place, words: str
) -> None:
    """Promise: out until a person or an examination says better, then a spare until it is burnt in, then a member."""
    standing = of(entries)
    assert standing.place is place
    assert words in standing.reason


def test_a_lemon_is_told_from_a_node_that_had_bad_luck_once() -> None:
    """Promise: two failures in a fortnight make a lemon, also of a node that passed its burn-in each time; one failure,
    or two in a year of service, do not; hints weigh a third."""
    fleet = [served(NodeId(f"h{i}", "node0"), 400, 400.0) for i in range(10, 60)]
    burnt = served(A, 300, 300.0)
    twice = of([*fleet, evicted(A, 0), evicted(A, 1, run="b"), burnt])
    assert (twice.place, twice.evictions) == (Place.SPARE, 2)
    assert "times as often as other nodes" in twice.reason
    assert of([*fleet, evicted(A, 0), burnt]).place is Place.MEMBER
    assert of([*fleet, evicted(A, 0), evicted(A, 1, run="b"), served(A, 900, 9000.0)]).place is Place.MEMBER
    hints = [
        Judged(
            t_wall_s=NOW_S + n, run="a", node=A, incident=n, cause=Cause.HANG, severity=Severity.WORKERS,
            certainty=Certainty.HINT,
        )
        for n in range(3)
    ]  # fmt: skip
    assert of([*fleet, *hints, burnt]).place is Place.MEMBER
    ranked = standings([*fleet, evicted(A, 0), evicted(A, 1, run="b"), evicted(B, 1), burnt], NOW_S, 24.0)
    assert [each.node for each in ranked[:2]] == [A, B], "the most troublesome first"


def test_one_incident_is_one_failure() -> None:
    judged = Judged(
        t_wall_s=NOW_S, run="a", node=A, incident=10_000, cause=Cause.GPU_FAULT, severity=Severity.NODE,
        certainty=Certainty.PROOF,
    )  # fmt: skip
    assert of([judged, evicted(A, 0, proof=True)]).failures == 1.0


def test_other_hardware_is_another_node() -> None:
    """Promise: a machine whose GPUs were all exchanged begins anew; one that kept some does not."""
    old, new, mixed = (NodeId("h1", "node0", gpus) for gpus in (("u1", "u2"), ("u3", "u4"), ("u2", "u3")))
    assert of([evicted(old, 1, proof=True), served(new, 2, 1)], new).place is Place.MEMBER
    assert of([evicted(old, 1, proof=True), served(mixed, 2, 1)], mixed).place is Place.OUT


def test_what_is_old_is_forgotten_but_for_what_a_person_said() -> None:
    late_s = NOW_S + 91 * 86400
    assert not standings([evicted(A, 0, proof=True)], late_s, 24.0)
    (standing,) = standings([drained(A, 0)], late_s, 24.0)
    assert standing.place is Place.OUT


HOURS = st.floats(0, 900)
ENTRIES = st.lists(
    st.one_of(
        st.builds(evicted, st.sampled_from([A, B]), HOURS, st.booleans(), st.booleans()),
        st.builds(served, st.sampled_from([A, B]), HOURS, st.floats(0, 100)),
        st.builds(readmitted, st.sampled_from([A, B]), HOURS),
        st.builds(examined, st.sampled_from([A, B]), HOURS, st.booleans()),
        st.builds(drained, st.sampled_from([A, B]), HOURS),
    ),
    max_size=15,
)


@settings(max_examples=200, deadline=None)
@given(ENTRIES, st.floats(1, 48))
def test_any_past_gives_every_node_one_place(entries: list[AnyEntry], burn_in_hours: float) -> None:
    """Promise (property): total; a person's last word holds; more failures never lower the rate that is expected."""
    entries = sorted(entries, key=lambda each: each.t_wall_s)
    found = standings(entries, NOW_S + 1000 * HOUR_S, burn_in_hours)
    rates = [each.failures_per_day for each in found]
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates, reverse=True)
    for each in found:
        words = [e for e in entries if isinstance(e, Drained | Readmitted) and e.node == each.node]
        back_s = max((e.t_wall_s for e in words if isinstance(e, Readmitted)), default=0.0)
        if any(isinstance(e, Drained) and e.t_wall_s > back_s for e in words):
            assert each.place is Place.OUT
        worse = of([*entries, evicted(each.node, 950, run="z")], each.node, burn_in_hours)
        assert worse.failures_per_day > each.failures_per_day
        assert worse.place is not Place.MEMBER


def test_doubtful_nodes_train_only_where_there_are_no_others() -> None:
    nodes = ["node0", "node1", "node2", "node10"]
    assert first_members(nodes, 2, {"node0"}) == ("node1", "node2")
    assert first_members(nodes, 3, {"node0", "node1"}) == ("node2", "node10", "node0")


# The file ---------------------------------------------------------------------------------------------------------


def test_torn_and_unknown_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    """Promise: whatever a crash or a newer version left in it, the rest is read, and the next entry is whole."""
    file = HistoryFile(tmp_path / "sub" / "nodes.jsonl")
    assert file.read().entries == ()
    assert file.append([drained(A, 0)])
    with file.path.open("ab") as raw:
        raw.write(b'{"record":"from_the_future","t_wall_s":1}\n\xff\xfe\n{"record":"drained","t_wall')
    assert file.append([readmitted(A, 1)])
    history = file.read()
    assert history.entries == (drained(A, 0), readmitted(A, 1))
    assert history.skipped == 3


def append_many(path: Path, who: str, count: int) -> None:
    file = HistoryFile(path)
    for number in range(count):
        while not file.append([drained(NodeId(who, f"n{number}"), 0.0)]):
            pass


def test_several_writers_lose_and_mix_nothing(tmp_path: Path) -> None:
    """Promise: the supervisors of many runs write one file."""
    path = tmp_path / "nodes.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, f"h{i}", 30)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    history = HistoryFile(path).read()
    assert (len(history.entries), history.skipped) == (90, 0)


def test_nobody_waits_for_a_file_that_is_held(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "nodes.jsonl")
    file.append([drained(A, 0)])
    with file.path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not file.append([readmitted(A, 1)])
    assert file.append([readmitted(A, 1)])


# A run's part -----------------------------------------------------------------------------------------------------


class Deaf:
    """Nobody watches."""

    def open(self) -> None: ...
    def on_event(self, event: AnyEvent) -> None: ...
    def on_tick(self) -> None: ...


def test_a_run_writes_what_its_journal_says_of_nodes(tmp_path: Path) -> None:
    """Promise: verdicts on nodes, evictions and hours reach the history; the application's own errors, nodes that are
    taken away, and what was only noted do not speak against anybody."""
    file = HistoryFile(tmp_path / "nodes.jsonl")
    memory = Remembering(Deaf(), file, "story")
    lost = verdict(Cause.NODE_LOST, "node1", -1, 7, Severity.NODE)
    killed = verdict(Cause.WORKER_KILLED, "node0")
    taken = verdict(Cause.PREEMPTED, "node2", -1, 9, Severity.NODE)
    noted = verdict(Cause.GPU_DEGRADED, "node0", -1, 7, Severity.NOTICE, "xid 43", Certainty.HINT)
    for event in (
        *(stories.ready(f"node{i}", NOW_S) for i in range(3)),
        stories.given(noted, 1, 0, NOW_S + 1700),
        stories.action("nothing", 0, NOW_S + 1700, "node0"),
        stories.given(lost, 1, 1, NOW_S + 1800, others=(killed, noted)),
        stories.action("replace", 1, NOW_S + 1800, "node1", "node2"),
        NodeEvicted(t_wall_s=NOW_S + 1800, t_mono_s=0.0, node="node1", reason="x"),
        stories.given(verdict(Cause.USER_ERROR, "node0"), 2, 2, NOW_S + 1900),
        stories.action("restart", 2, NOW_S + 1900, "node0"),
        stories.given(taken, 2, 3, NOW_S + 2000),
        stories.action("replace", 3, NOW_S + 2000, "node2", "node3"),
        NodeEvicted(t_wall_s=NOW_S + 2000, t_mono_s=0.0, node="node2", reason="x"),
        stories.stopped(0, NOW_S + 3600),
    ):
        memory.on_event(event)
    entries = file.read().entries
    judged = [(each.node.name, each.cause, each.certainty) for each in entries if isinstance(each, Judged)]
    assert judged == [
        ("node1", Cause.NODE_LOST, Certainty.LIKELY),
        ("node0", Cause.WORKER_KILLED, Certainty.HINT),
    ]
    (eviction,) = [each for each in entries if isinstance(each, Evicted)]
    assert (eviction.node, eviction.gone) == (identify("node1"), True)
    hours = {each.nodes[0].name: each.hours for each in entries if isinstance(each, Served)}
    assert hours == {"node1": 0.5, "node2": pytest.approx(2000 / 3600), "node0": 1.0}


def test_a_history_that_cannot_be_written_holds_up_nothing(tmp_path: Path) -> None:
    """Promise: its lines wait, and come when there is room."""
    path = tmp_path / "nodes.jsonl"
    path.symlink_to("/dev/full")
    memory = Remembering(Deaf(), HistoryFile(path), "story")
    memory.on_event(stories.ready("node0", NOW_S))
    memory.on_event(NodeEvicted(t_wall_s=NOW_S + 60, t_mono_s=0.0, node="node0", reason="x"))
    path.unlink()
    memory.on_event(stories.stopped(0, NOW_S + 3600))
    assert [type(each) for each in HistoryFile(path).read().entries] == [Served]


# The command line -------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = dispatch([*words])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_person_drains_and_readmits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise: a drained node is shown as out with the reason; names that could be paths, or several nodes, are
    refused."""
    monkeypatch.chdir(tmp_path)
    for refused, why in (
        (("drain", "../etc", "--reason", "x"), "letters"),
        (("drain", "h1/../x", "--reason", "x"), "letters"),
        (("drain", "h1/node0"), "--reason"),
        (("drain", "node0", "--reason", "x"), "knows no node"),
    ):
        code, said = told(capsys, *refused)
        assert (code, why in said) == (2, True), said
    assert told(capsys, "drain", "h1/node0", "--reason", "loud fan")[0] == 0
    _, said = told(capsys, "nodes")
    assert "h1/node0" in said
    assert "loud fan" in said
    assert " out " in said
    assert told(capsys, "drain", "h2/node0", "--reason", "x")[0] == 0
    assert "say which" in told(capsys, "readmit", "node0", "--reason", "mended")[1]
    assert told(capsys, "readmit", "h1", "--reason", "mended")[0] == 0
    _, said = told(capsys, "nodes")
    assert "mended" in said
    assert " spare " in said
