"""Promise: what is wrong with a node is said once, with its device; what a healthy node shows is never called wrong."""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import HealthConfig
from health.clock import LIMIT_S, SAMPLES, ClockFilter
from health.node import (
    CORRECTED_AN_HOUR,
    HUNG,
    SYMBOL_ERRORS_AN_HOUR,
    WINDOW_S,
    DiskFacts,
    Load,
    MemoryController,
    MemoryFacts,
    NodeFacts,
    NodeJudge,
    Place,
    Port,
    PortKind,
    describe_facts,
)
from health.verdict import Cause, Certainty, Severity, Verdict

GIB = 1 << 30
CONFIG = HealthConfig(foreign_load_pct=50.0)
WELL = NodeFacts(
    t_mono_s=0.0,
    disks=tuple(
        DiskFacts(place=place, path=f"/{place}", free_bytes=50 * GIB, total_bytes=100 * GIB, write_s=0.01)
        for place in Place
    ),
    memory=MemoryFacts(total_bytes=64 * GIB, available_bytes=32 * GIB, stalled_pct=0.0),
    controllers=(MemoryController(device="mc0", corrected=5, uncorrected=1),),
    ports=(
        Port(device="eth0", kind=PortKind.ETHERNET, up=True, downs=3, errors=17),
        Port(device="mlx5_0/1", kind=PortKind.INFINIBAND, up=True, downs=2, errors=40, recoveries=9),
        Port(device="eth1", kind=PortKind.ETHERNET, up=False),
    ),
    load=Load(cores=8, foreign_cores=0.5),
)


def judged(readings: Iterable[NodeFacts], every_s: float = 10.0) -> list[Verdict]:
    judge = NodeJudge("node1", CONFIG)
    found: list[Verdict] = []
    for i, facts in enumerate(readings):
        found += judge.judge(msgspec.structs.replace(facts, t_mono_s=i * every_s), step=5)
    return found


def disk(place: Place, **changes: object) -> NodeFacts:
    disks = [msgspec.structs.replace(each, **changes) if each.place is place else each for each in WELL.disks]
    return msgspec.structs.replace(WELL, disks=tuple(disks))


def port(device: str, **changes: object) -> NodeFacts:
    ports = [msgspec.structs.replace(each, **changes) if each.device == device else each for each in WELL.ports]
    return msgspec.structs.replace(WELL, ports=tuple(ports))


def controller(corrected: int, uncorrected: int = 1) -> NodeFacts:
    counts = MemoryController(device="mc0", corrected=corrected, uncorrected=uncorrected)
    return msgspec.structs.replace(WELL, controllers=(counts,))


@given(st.integers(0, 999))
def test_a_healthy_day_says_nothing(seed: int) -> None:
    """Old counts, a port that was never up, the odd error, busy disks: a day of these without one verdict."""
    dice = random.Random(seed)
    errors = corrected = 0
    readings = []
    for i in range(300):
        errors += dice.random() < 0.1
        corrected += dice.random() < 0.02
        facts = msgspec.structs.replace(
            port("mlx5_0/1", errors=40 + errors), controllers=controller(corrected).controllers
        )
        slow = dice.random() < 0.02 and i % 2 == 0
        disks = [msgspec.structs.replace(each, write_s=8.0 if slow else dice.random()) for each in facts.disks]
        readings.append(msgspec.structs.replace(facts, disks=tuple(disks)))
    assert judged(readings, every_s=288.0) == []


@pytest.mark.parametrize(
    ("facts", "cause", "severity", "device", "words"),
    [
        (disk(Place.NODE, error="EIO"), Cause.NODE_FAULT, Severity.NODE, "node_dir", "cannot be written (EIO)"),
        (disk(Place.NODE, read_only=True, error="EROFS"), Cause.NODE_FAULT, Severity.NODE, "node_dir", "read-only"),
        (disk(Place.RAM, error=HUNG), Cause.NODE_FAULT, Severity.NODE, "ram_dir", "does not answer"),
        (disk(Place.RUN, error=HUNG), Cause.NODE_FAULT, Severity.NOTICE, "run_dir", "does not answer"),
        (disk(Place.RUN, error="ENOSPC"), Cause.NODE_DEGRADED, Severity.NOTICE, "run_dir", "is full"),
        (disk(Place.NODE, free_bytes=GIB // 2), Cause.NODE_DEGRADED, Severity.NOTICE, "node_dir", "512 of 102,400 MiB"),
        (port("eth0", up=False), Cause.LINK_FAULT, Severity.NODE, "eth0", "was up and is down"),
        (port("eth0", downs=6), Cause.LINK_FAULT, Severity.NODE, "eth0", "lost its link 3 times"),
        (port("eth0", downs=4), Cause.LINK_FAULT, Severity.NOTICE, "eth0", "lost its link once"),
        (port("mlx5_0/1", errors=40 + SYMBOL_ERRORS_AN_HOUR), Cause.LINK_FAULT, Severity.NOTICE, "mlx5_0/1", "symbol"),
        (port("mlx5_0/1", recoveries=12), Cause.LINK_FAULT, Severity.NOTICE, "mlx5_0/1", "train its link anew 3 times"),
        (controller(5, 2), Cause.NODE_DEGRADED, Severity.NODE, "mc0", "1 uncorrected errors"),
        (controller(5 + CORRECTED_AN_HOUR), Cause.NODE_DEGRADED, Severity.NOTICE, "mc0", "60 corrected errors"),
        (
            msgspec.structs.replace(WELL, load=Load(cores=8, foreign_cores=4.5, top=("miner (7) 4.5",))),
            Cause.NODE_DEGRADED, Severity.NOTICE, "processors", "4.5 of 8 processors: miner (7) 4.5",
        ),
        (
            msgspec.structs.replace(WELL, memory=MemoryFacts(total_bytes=64 * GIB, available_bytes=GIB)),
            Cause.NODE_DEGRADED, Severity.NOTICE, "memory", "1,024 of 65,536 MiB available",
        ),
    ],
)  # fmt: skip
def test_each_trouble_is_said_once(facts: NodeFacts, cause: Cause, severity: Severity, device: str, words: str) -> None:
    """Within three readings, and not again however long it lasts; the device and what was read are in it."""
    found = judged([WELL, WELL, *[facts] * 3])
    assert [(each.node, each.cause, each.severity, each.device, each.step) for each in found] == [
        ("node1", cause, severity, device, 5)
    ]
    assert words in found[0].evidence[0]
    assert judged([WELL, WELL, *[facts] * 50]) == found


def test_what_is_everybodys_is_only_hinted_at() -> None:
    """A dead run directory may be any node's or nobody's fault, and without its own disk a node still trains; an
    uncorrected memory error is a proof."""
    assert judged([WELL, disk(Place.NODE, error="EIO")])[0].certainty is Certainty.HINT
    assert judged([WELL, disk(Place.RUN, error="EIO")])[0].certainty is Certainty.HINT
    assert judged([WELL, controller(5, 2)])[0].certainty is Certainty.PROOF


def test_counters_are_judged_by_their_rate() -> None:
    """Many errors over a day are none; as many within an hour are; one that was reset starts anew."""
    step = SYMBOL_ERRORS_AN_HOUR // 2
    slowly = [port("mlx5_0/1", errors=40 + step * i) for i in range(20)]
    assert judged(slowly, every_s=WINDOW_S) == []
    assert len(judged(slowly, every_s=10.0)) == 1
    assert judged([port("mlx5_0/1", errors=10**6), *slowly[:2]], every_s=10.0) == []


def test_a_trouble_that_comes_back_is_said_again() -> None:
    """After ten quiet minutes it is news."""
    broken = disk(Place.NODE, error="EIO")
    assert len(judged([broken, *[WELL] * 100, broken])) == 2
    assert len(judged([broken, WELL, broken])) == 1


def test_a_reading_has_words() -> None:
    """Each part of a reading is one line of an incident's evidence."""
    lines = list(describe_facts(WELL))
    assert len(lines) == len(WELL.disks) + 1 + len(WELL.controllers) + len(WELL.ports) + 1
    assert "run_dir /run_dir: well, 50.0 GiB free, a small write took 10.0 ms" in lines


@given(st.floats(-30.0, 30.0), st.integers(0, 999))
def test_the_clock_is_measured_through_slow_messages(off_s: float, seed: int) -> None:
    """The true offset lies within the error that is given, whatever the messages' ways took, and is judged by it."""
    dice, clock = random.Random(seed), ClockFilter()
    for i in range(40):
        sent = 1000.0 + i
        there, back = dice.expovariate(20.0), dice.expovariate(20.0)
        clock.see(sent + off_s, sent + there, sent + there + back + off_s)
    best = clock.offset
    assert best is not None
    assert abs(best.seconds + off_s) <= best.error_s + 1e-9
    verdict = clock.judge("node1")
    if abs(off_s) < LIMIT_S:
        assert verdict is None
    if abs(off_s) > LIMIT_S + 5.0:
        assert verdict is not None
        assert ("ahead of" if off_s > 0 else "behind") in verdict.evidence[0]
        assert clock.judge("node1") is None, "said twice"


def test_one_odd_round_trip_is_no_clock_that_is_off() -> None:
    """A clock that is set while a message is on its way, or a supervisor of an older protocol, says nothing."""
    clock = ClockFilter()
    clock.see(100.0, 0.0, 100.1)
    clock.see(100.0, 100.05, 90.0)
    assert clock.offset is None
    for i in range(SAMPLES):
        clock.see(100.0 + i, 100.05 + i + (60.0 if i == 5 else 0.0), 100.1 + i)
    assert clock.judge("node1") is None
