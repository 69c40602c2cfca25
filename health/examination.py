"""The examination of a node: single checks become a grade, and nodes are held against each other. Pure.

A node fails when a known answer comes out wrong, when something does not answer in time, or when it cannot hold what it
must. It fails against the fleet when its versions differ from the others', or a GPU of its is much slower.
"""

from __future__ import annotations

import enum
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from health.node import LEAST_ROOM_BYTES, NodeFacts, Place, disk_troubles
from health.verdict import Cause, Certainty, Severity, Verdict

PEERS_FOR_A_MEDIAN = 3
LOW_MEMORY_BYTES = 1 << 30
_MUST_AGREE = frozenset({"python", "torch", "torchao", "transformer-engine", "cuda", "nccl", "driver", "everstep"})
_SHOWN = 6


class Grade(enum.StrEnum):
    """note: a person should know, the node may join all the same."""

    PASS = "pass"
    NOTE = "note"
    FAIL = "fail"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. device: `gpu3`, `run_dir`, `eth0`; value: what was measured, in words."""

    name: str
    grade: Grade
    device: str = ""
    value: str = ""
    detail: str = ""


class Version(msgspec.Struct, frozen=True):
    """What of something is installed, or its name."""

    name: str
    text: str


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A throughput. device: `gpu3`, `cpu`. model: figures of the same model of device compare."""

    name: str
    device: str
    model: str
    value: float
    unit: str


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What of a node is held against the others'."""

    versions: tuple[Version, ...] = ()
    figures: tuple[Figure, ...] = ()


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """A node's examination. seconds: how long it took."""

    node: str
    t_wall_s: float
    seconds: float
    checks: tuple[Check, ...]
    machine: Machine

    @property
    def grade(self) -> Grade:
        """The worst of the checks."""
        return max((check.grade for check in self.checks), key=list(Grade).index, default=Grade.PASS)


def node_checks(facts: NodeFacts) -> Iterator[Check]:
    """Disks and memory of one reading, as checks."""
    for disk in facts.disks:
        # A folder that all nodes share, or one that is only nearly full, keeps nobody out.
        worst, detail = Grade.PASS, ""
        for trouble in disk_troubles(disk):
            no_room = 0 <= disk.free_bytes < LEAST_ROOM_BYTES
            own = disk.place is not Place.RUN
            worst = Grade.FAIL if own and (disk.error or disk.read_only or no_room) else Grade.NOTE
            detail = trouble.line
        value = f"{disk.free_bytes / 2**30:,.1f} GiB free" if disk.free_bytes >= 0 else disk.error
        if disk.write_s >= 0:
            value += f", write {disk.write_s * 1e3:,.1f} ms"
        yield Check(name="disk", device=disk.place.value, grade=worst, value=value, detail=detail)
    if facts.memory is not None:
        memory = facts.memory
        low = memory.available_bytes < LOW_MEMORY_BYTES
        value = f"{memory.available_bytes / 2**30:,.1f} of {memory.total_bytes / 2**30:,.1f} GiB available"
        yield Check(
            name="memory", grade=Grade.NOTE if low else Grade.PASS, value=value,
            detail="less than 1 GiB is available" if low else "",
        )  # fmt: skip
    for controller in facts.controllers:
        lost = controller.uncorrected
        value = f"{controller.corrected} corrected, {lost} uncorrected errors since it was booted"
        yield Check(name="ecc", device=controller.device, grade=Grade.NOTE if lost else Grade.PASS, value=value)
    for port in facts.ports:
        speed = f", {port.gbit_per_s:g} Gbit/s" if port.gbit_per_s > 0 else ""
        value = f"{'up' if port.up else 'down'}{speed}, {port.downs} downs, {port.errors} errors since it was booted"
        yield Check(name=port.kind.value, device=port.device, grade=Grade.PASS, value=value)


def preflight_verdict(examination: Examination) -> Verdict | None:
    """The accusation of a node that failed; None for one that may join."""
    failed = [check for check in examination.checks if check.grade is Grade.FAIL]
    if not failed:
        return None
    lines = [f"{check.name} {check.device}".strip() + f": {check.detail or check.value}" for check in failed]
    head = f"{examination.node} failed its examination: {lines[0]}"
    return _verdict(examination.node, failed[0].device, f"preflight: {failed[0].name}", (head, *lines[1:_SHOWN]))


def odd_versions(machines: Mapping[str, Machine]) -> list[Verdict]:
    """An accusation for each node whose versions are not those of most nodes.

    Where as many have one as the other, those of the node that comes first in order are right.
    """
    verdicts = []
    usual = {name: _most_common(machines, name) for name in sorted(_MUST_AGREE)}
    for node in sorted(machines):
        lines = [
            f"{name} is {text or 'not there'} on {node}, {usual[name] or 'not there'} on most nodes"
            for name in usual
            if (text := _version(machines[node], name)) != usual[name]
        ]
        if lines:
            verdicts.append(_verdict(node, "", "preflight: versions", tuple(lines)))
    return verdicts


def notable_versions(machines: Mapping[str, Machine]) -> list[str]:
    """Lines about what differs and may differ: kernels, card names."""
    names = sorted({version.name for machine in machines.values() for version in machine.versions} - _MUST_AGREE)
    lines = []
    for name in names:
        found = Counter(_version(machine, name) for machine in machines.values())
        if len(found) > 1:
            lines.append(
                f"{name}: " + ", ".join(f"{text or 'not there'} ({count})" for text, count in sorted(found.items()))
            )
    return lines


def slow_devices(machines: Mapping[str, Machine], slow_pct: float) -> list[Verdict]:
    """An accusation for each node with a GPU that is slower than the median of its model by more than slow_pct.

    CPUs are left out: what they reach depends on who else is on the machine. At least PEERS_FOR_A_MEDIAN devices of
    other nodes make a median. 0 accuses nobody.
    """
    if not slow_pct:
        return []
    every = [
        (node, figure) for node, machine in machines.items() for figure in machine.figures if figure.device != "cpu"
    ]
    alike: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for node, figure in every:
        alike.setdefault((figure.name, figure.model), []).append((figure.value, node))
    medians = {key: _medians_of_others(found) for key, found in alike.items()}
    lines: dict[str, list[tuple[str, str]]] = {}
    for node, figure in every:
        count, median = medians[figure.name, figure.model][node]
        if count >= PEERS_FOR_A_MEDIAN and figure.value < (1 - slow_pct / 100) * median:
            share = 100 * (1 - figure.value / median)
            words = (
                f"{figure.device}: {figure.name} {figure.value:,.1f} {figure.unit}, {share:.0f}% below the "
                f"{median:,.1f} {figure.unit} of {count} others (limit {slow_pct:g}%)"
            )
            lines.setdefault(node, []).append((figure.device, words))
    return [
        _verdict(node, lines[node][0][0], "preflight: slow device", tuple(words for _, words in lines[node]))
        for node in sorted(lines)
    ]


def _medians_of_others(found: Sequence[tuple[float, str]]) -> dict[str, tuple[int, float]]:
    """For each node, how many of these values are other nodes', and the median of those; 0 where there are none.

    Sorted once for all: in a large fleet, leaving each node out by itself would take minutes.
    """
    values = sorted(found)
    own: dict[str, list[int]] = {}
    for place, (_, node) in enumerate(values):
        own.setdefault(node, []).append(place)
    medians = {}
    for node, places in own.items():
        count = len(values) - len(places)
        middle = [_without(places, at) for at in {(count - 1) // 2, count // 2}] if count else []
        medians[node] = (count, statistics.fmean(values[at][0] for at in middle) if middle else 0.0)
    return medians


def _without(places: Sequence[int], at: int) -> int:
    """Where the element stands that would be number `at` if those at these places, in rising order, were not there."""
    for place in places:
        if place <= at:
            at += 1
    return at


def _verdict(node: str, device: str, mark: str, evidence: Sequence[str]) -> Verdict:
    return Verdict(
        node=node, rank=-1, cause=Cause.PREFLIGHT_FAILED, severity=Severity.NODE, step=-1, fingerprint=mark,
        evidence=tuple(evidence), certainty=Certainty.PROOF, device=device,
    )  # fmt: skip


def _most_common(machines: Mapping[str, Machine], name: str) -> str:
    found = Counter(_version(machines[node], name) for node in sorted(machines))
    return max(found, key=lambda text: found[text], default="")


def _version(machine: Machine, name: str) -> str:
    return next((version.text for version in machine.versions if version.name == name), "")
