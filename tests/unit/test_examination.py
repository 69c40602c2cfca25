"""Promise: a node fails for what is its own fault, with the reason, and is held against its peers robustly."""

from __future__ import annotations

import random
import statistics
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from health.examination import (
    Check,
    Examination,
    Figure,
    Grade,
    Machine,
    Version,
    node_checks,
    notable_versions,
    odd_versions,
    preflight_verdict,
    slow_devices,
)
from health.node import HUNG, DiskFacts, MemoryFacts, NodeFacts, Place
from health.verdict import Cause, Certainty, Severity

GIB = 1 << 30


def of(*checks: Check) -> Examination:
    return Examination(node="node1", t_wall_s=0.0, seconds=1.0, checks=checks, machine=Machine())


@pytest.mark.parametrize(
    ("place", "changes", "grade"),
    [
        (Place.NODE, {}, Grade.PASS),
        (Place.NODE, {"error": "ENOSPC"}, Grade.FAIL),
        (Place.RAM, {"error": "ENOSPC"}, Grade.FAIL),
        (Place.NODE, {"error": HUNG}, Grade.FAIL),
        (Place.NODE, {"read_only": True}, Grade.FAIL),
        (Place.NODE, {"free_bytes": 1 << 20}, Grade.FAIL),
        (Place.NODE, {"free_bytes": 1 << 29}, Grade.NOTE),
        (Place.RUN, {"free_bytes": 1 << 20}, Grade.NOTE),
        (Place.RUN, {"error": "ENOSPC"}, Grade.NOTE),
        (Place.RUN, {"error": HUNG}, Grade.NOTE),
    ],
)
def test_a_disk_of_its_own_keeps_a_node_out(place: Place, changes: dict[str, object], grade: Grade) -> None:
    """One that all nodes share does not: then all would be out, and its trouble is told elsewhere."""
    disk = DiskFacts(place=place, path="/x", free_bytes=50 * GIB, total_bytes=100 * GIB, write_s=0.01)
    memory = MemoryFacts(total_bytes=64 * GIB, available_bytes=32 * GIB)
    facts = NodeFacts(t_mono_s=0.0, disks=(msgspec.structs.replace(disk, **changes),), memory=memory)
    checks = list(node_checks(facts))
    assert [check.grade for check in checks] == [grade, Grade.PASS]
    assert of(*checks).grade is grade
    assert bool(checks[0].detail) is (grade is not Grade.PASS)


def test_the_accusation_names_the_first_failure_and_all_others() -> None:
    """Notes accuse nobody; failures do, with proof."""
    note = Check(name="memory", grade=Grade.NOTE, detail="low")
    bad = Check(name="matmul float32", grade=Grade.FAIL, device="cuda:3", detail="1 of 9 results are wrong")
    full = Check(name="disk", grade=Grade.FAIL, device="node_dir", value="full")
    assert preflight_verdict(of(note)) is None
    verdict = preflight_verdict(of(note, bad, full))
    assert verdict is not None
    assert (verdict.cause, verdict.severity, verdict.certainty) == (
        Cause.PREFLIGHT_FAILED, Severity.NODE, Certainty.PROOF,
    )  # fmt: skip
    assert verdict.device == "cuda:3"
    assert verdict.evidence == (
        "node1 failed its examination: matmul float32 cuda:3: 1 of 9 results are wrong",
        "disk node_dir: full",
    )


def versions(**texts: str) -> Machine:
    return Machine(versions=tuple(Version(name, text) for name, text in texts.items()))


@given(st.integers(3, 20), st.integers(0, 99))
def test_the_odd_ones_out_are_a_minority(count: int, seed: int) -> None:
    """Of any mixture, those with what most have are left alone; a version that is missing is another one."""
    dice = random.Random(seed)
    odd = set(dice.sample(range(count), dice.randint(0, (count - 1) // 2)))
    machines = {
        f"n{i:02d}": versions(torch="2.13.0", python="3.11.9", **({} if i in odd else {"nccl": "2.29"}))
        for i in range(count)
    }
    accused = odd_versions(machines)
    assert {each.node for each in accused} == {f"n{i:02d}" for i in odd}
    assert all("nccl is not there on" in each.evidence[0] for each in accused)


def test_kernels_may_differ() -> None:
    """What decides no number is only worth a line."""
    machines = {"a": versions(torch="2", kernel="5"), "b": versions(torch="2", kernel="6"), "c": versions(torch="2")}
    assert odd_versions(machines) == []
    assert notable_versions(machines) == ["kernel: not there (1), 5 (1), 6 (1)"]


def test_of_two_the_first_is_right() -> None:
    """Nobody can say who is right of two; somebody must be, and always the same."""
    machines = {"b": versions(torch="2.12"), "a": versions(torch="2.13")}
    assert [each.node for each in odd_versions(machines)] == ["b"]


@given(st.integers(4, 16), st.integers(0, 99), st.floats(0.0, 0.7))
def test_a_slow_gpu_is_found_among_noisy_ones(nodes: int, seed: int, part: float) -> None:
    """30% below the median fails at a limit of 20%; noise of 5% does not, however many nodes there are."""
    dice = random.Random(seed)
    slow = f"n{dice.randrange(nodes):02d}"
    machines = {}
    for i in range(nodes):
        node = f"n{i:02d}"
        values = [dice.uniform(0.95, 1.0) * 700.0 * (part if node == slow and gpu == 2 else 1.0) for gpu in range(4)]
        figures = [
            Figure(name="matmul speed", device=f"cuda:{gpu}", model="H100", value=value, unit="TFLOP/s")
            for gpu, value in enumerate(values)
        ]
        busy = Figure(name="matmul speed", device="cpu", model="cpu", value=dice.uniform(0.01, 1.0), unit="TFLOP/s")
        other = Figure(name="matmul speed", device="cuda:4", model="L4", value=100.0, unit="TFLOP/s")
        machines[node] = Machine(figures=(*figures, busy, *([other] if i == 0 else [])))
    (accused,) = slow_devices(machines, 20.0)
    assert (accused.node, accused.device) == (slow, "cuda:2")
    assert "below the" in accused.evidence[0]
    assert slow_devices(machines, 0.0) == []


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([1.0, 2.0, 5.0, 9.0])), max_size=24))
def test_a_node_is_held_against_the_median_of_the_others(found: list[tuple[str, float]]) -> None:
    """Promise: exactly those are slow that are below the limit of what all other nodes' devices reach."""
    machines = {
        node: Machine(
            figures=tuple(
                Figure(name="matmul", device=f"cuda:{i}", model="H100", value=value, unit="T")
                for i, (owner, value) in enumerate(found)
                if owner == node
            )
        )
        for node in "abcdef"
    }
    slow = set()
    for node, value in found:
        others = [other for peer, other in found if peer != node]
        if len(others) >= 3 and value < 0.8 * statistics.median(others):
            slow.add(node)
    assert {each.node for each in slow_devices(machines, 20.0)} == slow


def test_a_large_fleet_is_compared_in_no_time() -> None:
    """Promise: it is done at each restart, and nobody is heard meanwhile."""
    machines = {
        f"n{i:04d}": Machine(
            figures=tuple(
                Figure(name=name, device=f"cuda:{gpu}", model="H100", value=700.0 + gpu, unit="T")
                for name in ("matmul", "memory")
                for gpu in range(8)
            )
        )
        for i in range(1024)
    }
    begun_s = time.process_time()
    assert slow_devices(machines, 20.0) == []
    assert time.process_time() - begun_s < 2.0


def test_too_few_make_no_median() -> None:
    """Of two machines, the slower one is not slow."""
    one = Figure(name="matmul speed", device="cuda:0", model="H100", value=700.0, unit="TFLOP/s")
    machines = {"a": Machine(figures=(one,)), "b": Machine(figures=(msgspec.structs.replace(one, value=100.0),))}
    assert slow_devices(machines, 20.0) == []
