"""A node's disks, memory, ports and load: readings in, verdicts out, each trouble said once while it lasts.

Counters that only rise (corrected memory errors, symbol errors, link downs) are judged by how much they rose within the
last hour of this judge's life: what a machine counted before the run is history, not evidence.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from configs.schema import HealthConfig
from health.verdict import Cause, Certainty, Severity, Verdict

HUNG = "HUNG"
WINDOW_S = 3600.0
LOW_DISK_BYTES = 1 << 30
LEAST_ROOM_BYTES = 16 << 20
LOW_DISK_PART = 0.02
LOW_MEMORY_PART = 0.02
SLOW_WRITE_S = 5.0
STALLED_PCT = 20.0
CORRECTED_AN_HOUR = 60
PORT_ERRORS_AN_HOUR = 1000
SYMBOL_ERRORS_AN_HOUR = 100
RECOVERIES_AN_HOUR = 3
FLAPS_AN_HOUR = 3
_QUIET_S = 600.0
_SUSTAINED = 3
_DISK_BROKEN = frozenset({"EIO", "EROFS", "ENXIO", "ENODEV", "ESTALE", HUNG})


class Place(enum.StrEnum):
    """Which folder of the job a disk is looked at for. The run directory is everybody's, the others are the node's."""

    RUN = "run_dir"
    NODE = "node_dir"
    RAM = "ram_dir"


class DiskFacts(msgspec.Struct, frozen=True, kw_only=True, tag="disk"):
    """One folder's file system. write_s: a small write with fsync. error: errno's name, `HUNG` for no answer in time,
    "" for none. -1 means not known."""

    place: Place
    path: str
    free_bytes: int = -1
    total_bytes: int = -1
    read_only: bool = False
    write_s: float = -1.0
    error: str = ""


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """stalled_pct: part of the last 10 s in which everything waited for memory (PSI `full`), -1 where not known."""

    total_bytes: int
    available_bytes: int
    swap_used_bytes: int = 0
    stalled_pct: float = -1.0


class MemoryController(msgspec.Struct, frozen=True, kw_only=True):
    """EDAC's counts of one memory controller since it was loaded."""

    device: str
    corrected: int
    uncorrected: int


class PortKind(enum.StrEnum):
    """What sort of port."""

    ETHERNET = "ethernet"
    INFINIBAND = "infiniband"


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """A network port and its counts since it came up.

    downs: how often it lost its link. errors: damaged or lost frames (ethernet), symbol errors (InfiniBand).
    recoveries: links that InfiniBand had to train anew. gbit_per_s: -1 where not known.
    """

    device: str
    kind: PortKind
    up: bool
    gbit_per_s: float = -1.0
    downs: int = 0
    errors: int = 0
    recoveries: int = 0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Processors taken by processes that are not the run's, since the reading before. top: the greediest, in words."""

    cores: int
    foreign_cores: float
    top: tuple[str, ...] = ()


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True, tag="node"):
    """One reading of a node. t_mono_s: the node's own monotonic clock. unread: why nothing could be read at all."""

    t_mono_s: float
    unread: str = ""
    disks: tuple[DiskFacts, ...] = ()
    memory: MemoryFacts | None = None
    controllers: tuple[MemoryController, ...] = ()
    ports: tuple[Port, ...] = ()
    load: Load | None = None


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong with a node now. times: how many readings in a row must show it."""

    cause: Cause
    severity: Severity
    certainty: Certainty
    device: str
    fingerprint: str
    line: str
    times: int = 1


class NodeJudge:
    """Judges one node's readings. Bound on latency: one interval between readings, `times` of them where a single
    reading proves nothing."""

    def __init__(self, node: str, config: HealthConfig) -> None:
        self.node = node
        self._config = config
        self._counts: dict[tuple[str, str], deque[tuple[float, int]]] = {}
        self._was_up: set[str] = set()
        self._in_a_row: dict[tuple[str, str], int] = {}
        self._last_seen_s: dict[tuple[str, str], float] = {}

    def judge(self, facts: NodeFacts, step: int = -1) -> list[Verdict]:
        """What this reading shows that was not said yet, or not for ten minutes. step: the one the node is in."""
        verdicts = []
        found = list(self.troubles(facts))
        keys = {(trouble.device, trouble.fingerprint) for trouble in found}
        self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in keys}
        for trouble in found:
            key = (trouble.device, trouble.fingerprint)
            if self._in_a_row[key] < trouble.times:
                continue
            last_s = self._last_seen_s.get(key)
            self._last_seen_s[key] = facts.t_mono_s
            if last_s is None or facts.t_mono_s - last_s > _QUIET_S:
                verdicts.append(as_verdict(trouble, self.node, step))
        return verdicts

    def troubles(self, facts: NodeFacts) -> Iterator[Trouble]:
        """All that is wrong in this reading, judged with the ones before it."""
        if facts.unread:
            yield Trouble(
                cause=Cause.NODE_DEGRADED, severity=Severity.NODE, certainty=Certainty.HINT, device="",
                fingerprint="node not watched", times=_SUSTAINED,
                line=f"it cannot be looked at: {facts.unread}",
            )  # fmt: skip
        for disk in facts.disks:
            yield from disk_troubles(disk)
        if facts.memory is not None:
            yield from _memory_troubles(facts.memory)
        for controller in facts.controllers:
            yield from self._controller_troubles(facts.t_mono_s, controller)
        for port in facts.ports:
            yield from self._port_troubles(facts.t_mono_s, port)
        if facts.load is not None and self._config.foreign_load_pct:
            yield from _load_troubles(facts.load, self._config.foreign_load_pct)

    def _controller_troubles(self, now_s: float, controller: MemoryController) -> Iterator[Trouble]:
        name = controller.device
        lost = self._rise(name, "uncorrected", now_s, controller.uncorrected)
        if lost:
            yield Trouble(
                cause=Cause.NODE_DEGRADED, severity=Severity.NODE, certainty=Certainty.PROOF, device=name,
                fingerprint="uncorrected memory error", line=f"memory controller {name}: {lost} uncorrected errors",
            )  # fmt: skip
        corrected = self._rise(name, "corrected", now_s, controller.corrected)
        if corrected >= CORRECTED_AN_HOUR:
            line = f"memory controller {name}: {corrected} corrected errors within an hour (limit {CORRECTED_AN_HOUR})"
            yield _impaired(name, "corrected memory errors", line)

    def _port_troubles(self, now_s: float, port: Port) -> Iterator[Trouble]:
        name = port.device
        downs = self._rise(name, "downs", now_s, port.downs)
        if port.up:
            self._was_up.add(name)
        elif name in self._was_up:
            yield _link(name, "port down", f"{port.kind} port {name} was up and is down", Severity.NODE, times=2)
        if downs >= FLAPS_AN_HOUR:
            line = f"{port.kind} port {name} lost its link {downs} times within an hour (limit {FLAPS_AN_HOUR - 1})"
            yield _link(name, "port flaps", line, Severity.NODE)
        elif downs:
            line = f"{port.kind} port {name} lost its link {'once' if downs == 1 else f'{downs} times'} within an hour"
            yield _link(name, "port went down", line, Severity.NOTICE)
        infiniband = port.kind is PortKind.INFINIBAND
        limit = SYMBOL_ERRORS_AN_HOUR if infiniband else PORT_ERRORS_AN_HOUR
        errors = self._rise(name, "errors", now_s, port.errors)
        if errors >= limit:
            word = "symbol errors" if infiniband else "damaged or lost frames"
            line = f"{port.kind} port {name}: {errors} {word} within an hour (limit {limit})"
            yield _link(name, "port errors", line, Severity.NOTICE)
        recoveries = self._rise(name, "recoveries", now_s, port.recoveries)
        if recoveries >= RECOVERIES_AN_HOUR:
            line = f"{port.kind} port {name} had to train its link anew {recoveries} times within an hour"
            yield _link(name, "port recoveries", line, Severity.NOTICE)

    def _rise(self, device: str, counter: str, now_s: float, value: int) -> int:
        """By how much a counter rose within the last WINDOW_S; a smaller value is one that was reset."""
        seen = self._counts.setdefault((device, counter), deque())
        if seen and value < seen[-1][1]:
            seen.clear()
        if not seen or value != seen[-1][1]:
            seen.append((now_s, value))
        # The last value from before the window is what the rise is measured from.
        while len(seen) > 1 and seen[1][0] <= now_s - WINDOW_S:
            seen.popleft()
        return seen[-1][1] - seen[0][1]


def as_verdict(trouble: Trouble, node: str, step: int) -> Verdict:
    """A trouble of this node, as a verdict."""
    return Verdict(
        node=node, rank=-1, cause=trouble.cause, severity=trouble.severity, step=step,
        fingerprint=trouble.fingerprint, evidence=(f"{node}: {trouble.line}",), certainty=trouble.certainty,
        device=trouble.device,
    )  # fmt: skip


def disk_troubles(disk: DiskFacts) -> Iterator[Trouble]:
    """What is wrong with one folder.

    Troubles of the run directory, which all nodes share, are no node's fault. Without its own disk a node goes on
    training, with one tier of snapshots less: that speaks against it, but is no reason to stop anything.
    """
    own = disk.place is not Place.RUN
    where = f"{disk.place} ({disk.path})"
    if disk.read_only or disk.error in _DISK_BROKEN:
        if disk.read_only or disk.error == "EROFS":
            mark, what = "disk read-only", "is mounted read-only: the kernel does so when a disk fails"
        elif disk.error == HUNG:
            mark, what = "disk hung", "does not answer"
        else:
            mark, what = f"disk error {disk.error}", f"cannot be written ({disk.error})"
        yield Trouble(
            cause=Cause.NODE_FAULT, severity=Severity.NODE if own else Severity.NOTICE,
            certainty=Certainty.LIKELY if disk.place is Place.RAM else Certainty.HINT, device=disk.place.value,
            fingerprint=mark, line=f"{where} {what}",
        )  # fmt: skip
    elif disk.error:
        full = disk.error in ("ENOSPC", "EDQUOT")
        mark = "disk full" if full else f"disk error {disk.error}"
        yield _impaired(disk.place, mark, f"{where} {'is full' if full else f'cannot be written ({disk.error})'}")
    elif 0 <= disk.free_bytes < max(LEAST_ROOM_BYTES, min(LOW_DISK_BYTES, LOW_DISK_PART * disk.total_bytes)):
        free = f"{disk.free_bytes / 2**20:,.0f} of {disk.total_bytes / 2**20:,.0f} MiB free"
        yield _impaired(disk.place, "disk nearly full", f"{where} is nearly full: {free}")
    elif disk.write_s > SLOW_WRITE_S:
        line = f"{where} is slow: {disk.write_s:.1f} s for a small write with fsync (limit {SLOW_WRITE_S:g} s)"
        yield _impaired(disk.place, "disk slow", line, times=2)


def _memory_troubles(memory: MemoryFacts) -> Iterator[Trouble]:
    if memory.available_bytes < LOW_MEMORY_PART * memory.total_bytes:
        free = f"{memory.available_bytes / 2**20:,.0f} of {memory.total_bytes / 2**20:,.0f} MiB available"
        yield _impaired("memory", "memory nearly used up", f"memory is nearly used up: {free}", times=2)
    if memory.stalled_pct >= STALLED_PCT:
        line = f"everything waited for memory for {memory.stalled_pct:.0f}% of 10 s (limit {STALLED_PCT:g}%)"
        if memory.swap_used_bytes:
            line += f"; {memory.swap_used_bytes / 2**20:,.0f} MiB are swapped out"
        yield _impaired("memory", "memory stalls", line, times=_SUSTAINED)


def _load_troubles(load: Load, limit_pct: float) -> Iterator[Trouble]:
    if load.foreign_cores * 100 >= limit_pct * load.cores:
        who = f": {', '.join(load.top)}" if load.top else ""
        line = f"others' processes take {load.foreign_cores:.1f} of {load.cores} processors{who}"
        yield _impaired("processors", "foreign load", line, times=_SUSTAINED)


def _impaired(device: str, fingerprint: str, line: str, times: int = 1) -> Trouble:
    return Trouble(
        cause=Cause.NODE_DEGRADED, severity=Severity.NOTICE, certainty=Certainty.LIKELY, device=str(device),
        fingerprint=fingerprint, line=line, times=times,
    )  # fmt: skip


def _link(device: str, fingerprint: str, line: str, severity: Severity, times: int = 1) -> Trouble:
    return Trouble(
        cause=Cause.LINK_FAULT, severity=severity, certainty=Certainty.LIKELY, device=device, fingerprint=fingerprint,
        line=line, times=times,
    )  # fmt: skip


def describe_facts(facts: NodeFacts) -> Iterable[str]:
    """A reading in lines for a person, for the evidence of an incident."""
    for disk in facts.disks:
        free = f"{disk.free_bytes / 2**30:,.1f} GiB free" if disk.free_bytes >= 0 else "room not known"
        wrote = f", a small write took {disk.write_s * 1e3:.1f} ms" if disk.write_s >= 0 else ""
        yield f"{disk.place} {disk.path}: {disk.error or 'well'}, {free}{wrote}"
    if facts.memory is not None:
        memory = facts.memory
        yield f"memory: {memory.available_bytes / 2**30:,.1f} of {memory.total_bytes / 2**30:,.1f} GiB available"
    for controller in facts.controllers:
        yield f"{controller.device}: {controller.corrected} corrected, {controller.uncorrected} uncorrected errors"
    for port in facts.ports:
        state = "up" if port.up else "down"
        yield f"{port.kind} {port.device}: {state}, {port.downs} downs, {port.errors} errors"
    if facts.load is not None:
        load = facts.load
        yield f"others take {load.foreign_cores:.2f} of {load.cores} processors {', '.join(load.top)}".rstrip()
