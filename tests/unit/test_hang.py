"""The rank that keeps the others waiting is named, whatever the layout and wherever it stops; who waits never is."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from health.collectives import FlightRecord, Operation, Stage, decode_record, encode_record
from health.hang import Finding, judge_hang
from health.hang_evidence import (
    ProcessFacts,
    RankEvidence,
    facts_name,
    flight_name,
    join_looks,
    main_frames,
    read_evidence,
    stack_name,
)
from health.verdict import Cause, Certainty, Severity, Verdict
from health.waiting import find_waits
from health.watchdog import Standing
from tests.unit.programs import Program, random_program
from trainer.events import Phase
from trainer.flight import GroupRanks

ASLEEP = 'Thread 0x01 (most recent call first):\n  File "/x/loop.py", line 9 in witness\n\nThread 0x02 (most recent call first):\n  File "/x/mine.py", line 3 in sleeps\n  File "/x/main.py", line 8 in main\n'  # noqa: E501
IN_TORCH = 'Thread 0x02 (most recent call first):\n  File "/v/torch/distributed/c10d.py", line 3 in wait\n'


def standing(size: int, phase: Phase = Phase.FORWARD_BACKWARD) -> Standing:
    verdict = Verdict(
        node="", rank=-1, cause=Cause.HANG, severity=Severity.WORKERS, step=4, fingerprint="hang", evidence=("still",)
    )
    return Standing(verdict, "no rank advanced for 3.2 s", 0.0, 3.2, 3.0, 15.0, dict.fromkeys(range(size), phase))


def facts(rank: int, state: str = "S", cpu_s: float = 0.0, moved: bool = False, runnable: int = 0) -> ProcessFacts:
    return ProcessFacts(
        rank=rank, pid=100 + rank, state=state, cpu_s=cpu_s, looked_s=0.25, stack_from="faulthandler",
        record_moved=moved, runnable=runnable,
    )  # fmt: skip


def nodes_of(size: int) -> dict[int, str]:
    return {rank: f"node{rank // 2}" for rank in range(size)}


def evidence_of(program: Program, culprit: int, at: int) -> dict[int, RankEvidence]:
    """What agents would show if the culprit slept in code of its own, and all others waited in torch."""
    ranks = program.run({culprit: at})
    return {
        rank: RankEvidence(
            rank,
            facts(rank),
            program.record(rank, ranks),
            join_looks([ASLEEP, ASLEEP] if rank == culprit else [IN_TORCH, IN_TORCH]),
        )
        for rank in range(program.size)
    }


def judge(program: Program, evidence: dict[int, RankEvidence]) -> Finding:
    return judge_hang(standing(program.size), nodes_of(program.size), evidence)


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_the_rank_that_does_not_come_is_named(seed: int) -> None:
    """Promise: any mesh of PP, FSDP and TP, any order of collectives, shifts and asynchronous ones: the culprit."""
    program, culprit, at = random_program(seed)
    found = judge(program, evidence_of(program, culprit, at))
    assert (found.verdict.rank, found.verdict.node) == (culprit, f"node{culprit // 2}"), found
    assert found.sure
    assert found.verdict.severity is Severity.WORKERS
    assert "sleeps (/x/mine.py:3)" in " ".join(found.verdict.evidence)


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from("STR"))
def test_a_rank_that_cannot_answer_is_named(seed: int, state: str) -> None:
    """Promise: stopped, or with the interpreter's lock held: no record is a trace too."""
    program, culprit, at = random_program(seed)
    evidence = evidence_of(program, culprit, at)
    cpu_s = 0.25 if state == "R" else 0.0
    evidence[culprit] = RankEvidence(culprit, facts(culprit, state, cpu_s), None, join_looks([ASLEEP, ASLEEP]))
    found = judge(program, evidence)
    assert (found.verdict.rank, found.sure) == (culprit, True), found
    assert found.verdict.certainty is (Certainty.PROOF if state == "T" else Certainty.LIKELY)


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_who_waits_is_never_blamed(seed: int) -> None:
    """Promise: with the evidence of any ranks lost on the way, no rank that is known to wait is named."""
    program, culprit, at = random_program(seed)
    dice = random.Random(seed)
    evidence = evidence_of(program, culprit, at)
    kept = {rank: each for rank, each in evidence.items() if dice.random() < 0.6}
    found = judge(program, kept)
    waits = find_waits({rank: each.record for rank, each in evidence.items() if each.record is not None})
    assert found.verdict.rank not in waits.waiters & set(kept)
    if len(kept) == program.size:
        assert found.verdict.rank == culprit


@settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_a_left_out_collective_blames_no_hardware(seed: int) -> None:
    """Promise: a rank that leaves one collective out is a bug in the program: said so, and no node is named for it.
    Where nobody can see that (it was the last one), only the rank that left it out can be named."""
    dice = random.Random(seed)
    program, culprit, _ = random_program(seed)
    worlds = [at for at, event in enumerate(program.events) if event.axis == "world"]
    ranks = program.run({}, {culprit: dice.choice(worlds)})
    records = {rank: program.record(rank, ranks) for rank in range(program.size)}
    evidence = {r: RankEvidence(r, facts(r), records[r], join_looks([IN_TORCH])) for r in records}
    found = judge(program, evidence)
    assert found.verdict.rank in (-1, culprit)
    if find_waits(records).mismatches:
        assert (found.verdict.rank, found.verdict.node) == (-1, "")
        assert "disagree" in found.verdict.evidence[0]
        assert found.verdict.fingerprint != "hang"


def collective(number: int, stage: Stage, name: str = "all_reduce", sizes: int = 4) -> Operation:
    return Operation(group="g", number=number, name=name, stage=stage, sizes=((sizes,),))


def record(rank: int, *operations: Operation, size: int = 2) -> FlightRecord:
    group = GroupRanks("g", "mesh_fsdp", tuple(range(size)))
    return FlightRecord(request=1, rank=rank, groups=(group,), operations=operations)


def pair(first: tuple[Operation, ...], second: tuple[Operation, ...], **of_second: object) -> dict[int, RankEvidence]:
    other = facts(1, **of_second)  # type: ignore[arg-type]
    return {
        0: RankEvidence(0, facts(0), record(0, *first), join_looks([IN_TORCH, IN_TORCH])),
        1: RankEvidence(1, other, record(1, *second), join_looks([ASLEEP, ASLEEP])),
    }


LATE = ((collective(1, Stage.OVER), collective(2, Stage.ENTERED)), (collective(1, Stage.OVER),))


def test_a_rank_that_computes_is_slow_and_not_hung() -> None:
    """Promise: nobody is restarted for being slow before the longer bound; the late rank is named all the same."""
    for busy in ({"state": "R"}, {"cpu_s": 0.2}):
        found = judge_hang(standing(2), nodes_of(2), pair(*LATE, **busy))
        assert (found.verdict.rank, found.sure) == (1, False)
        assert "computes" in found.doubt
    found = judge_hang(standing(2), nodes_of(2), pair(*LATE, moved=True))
    assert (found.verdict.rank, found.sure) == (1, False)


def test_a_rank_without_a_processor_is_not_mute() -> None:
    """Promise: on a machine that is overrun a rank may fail to answer: that is no proof of anything."""
    evidence = pair(*LATE)
    for starved in (facts(1, "R"), facts(1, "S", runnable=1)):
        evidence[1] = RankEvidence(1, starved, None, join_looks([ASLEEP, ASLEEP]))
        found = judge_hang(standing(2), nodes_of(2), evidence)
        assert (found.verdict.rank, found.sure) == (1, False)
        assert "no processor" in found.doubt


def test_a_rank_that_waits_for_data_gets_the_longer_bound() -> None:
    evidence = pair(*LATE)
    reads = ASLEEP.replace("/x/mine.py", "/y/trainer/data.py")
    evidence[1] = RankEvidence(1, facts(1), evidence[1].record, join_looks([reads, reads]))
    found = judge_hang(standing(2, Phase.DATA), nodes_of(2), evidence)
    assert (found.verdict.rank, found.sure) == (1, False)
    assert "data" in found.doubt


def test_a_collective_that_all_entered_blames_nobody() -> None:
    """Promise: a network that stands still is no rank's fault, and may only be slow."""
    both = (collective(1, Stage.OVER), collective(2, Stage.ENTERED))
    found = judge_hang(standing(2), nodes_of(2), pair(both, both))
    assert (found.verdict.rank, found.verdict.node, found.sure) == (-1, "", False)
    assert "all ranks came to all_reduce number 2 of FSDP (ranks 0, 1)" in found.verdict.evidence[0]


def test_a_device_that_never_begins_what_the_others_run_is_late() -> None:
    """Promise: on GPUs all ranks may have asked for a collective; the one whose device does not get to it is late."""
    found = judge_hang(standing(2), nodes_of(2), pair((collective(2, Stage.STARTED),), (collective(2, Stage.ENTERED),)))
    assert found.verdict.rank == 1


@pytest.mark.parametrize("other", [collective(2, Stage.ENTERED, sizes=8), collective(2, Stage.ENTERED, "all_gather")])
def test_different_collectives_under_one_number_are_a_bug(other: Operation) -> None:
    found = judge_hang(standing(2), nodes_of(2), pair((collective(2, Stage.ENTERED),), (other,)))
    assert (found.verdict.rank, found.sure) == (-1, True)
    assert "disagree on collective number 2 of FSDP" in found.verdict.evidence[0]
    assert "all_reduce of 4" in found.verdict.evidence[0]


def test_without_any_record_the_beats_are_a_hint() -> None:
    """Promise: where nothing could be collected, what the beats say is still said, and acted on at the longer bound."""
    found = judge_hang(standing(2), nodes_of(2), {})
    assert (found.verdict.certainty, found.sure) == (Certainty.HINT, False)


@given(st.integers(0, 2**32), st.integers(400, 4000))
def test_a_shortened_record_keeps_what_is_judged_by(seed: int, limit: int) -> None:
    """Promise: cut to any size, a record is well-formed, within it, and has the open operations before all others."""
    program, culprit, at = random_program(seed)
    whole = program.record(0, program.run({culprit: at}))
    data = encode_record(whole, limit)
    assert len(data) <= limit
    cut = decode_record(data)
    assert set(cut.operations) <= set(whole.operations)
    if len(cut.operations) >= len(whole.open):
        assert cut.open == whole.open


def test_evidence_reads_back_and_nonsense_is_passed_over() -> None:
    """Promise: what an agent sends is data: a malformed or misnamed file takes nothing else down."""
    mine = record(3, collective(1, Stage.ENTERED), size=4)
    files = {
        flight_name(3): encode_record(mine, 1 << 16),
        facts_name(3): msgspec.json.encode(facts(3)),
        stack_name(3): join_looks([ASLEEP, ASLEEP.replace("line 3", "line 4")]).encode(),
        flight_name(4): b"{nonsense",
        facts_name(5): msgspec.json.encode(facts(6)),
        "../../rank-1.stack.txt": b"x",
    }
    read = read_evidence(files)
    assert sorted(read) == [3, 4, 5]
    assert (read[3].record, read[3].facts) == (mine, facts(3))
    assert read[3].stack_moved
    assert (read[4].record, read[5].facts) == (None, None)


def test_main_threads_are_found_in_both_formats() -> None:
    assert main_frames(ASLEEP) == ("sleeps (/x/mine.py:3)", "main (/x/main.py:8)")
    py_spy = 'Process 7: python\nPython v3.11\n\nThread 7 (idle): "MainThread"\n    wait (a/b.py:3)\n\nThread 8 (idle): "w"\n    run (c.py:1)\n'  # noqa: E501
    assert main_frames(py_spy) == ("wait (a/b.py:3)",)
    assert main_frames("") == ()
