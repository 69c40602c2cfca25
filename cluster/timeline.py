"""Wall time cut into intervals, each with one cause: a walk along the journal with a cursor that never goes back.

Everything is whole microseconds: the intervals' lengths sum exactly to the wall time. Clocks of different machines
may disagree; a time before the cursor or after the end is moved there, so no interval is ever negative.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from cluster.events import (
    ActionTaken,
    AnyEvent,
    GenerationPlanned,
    NodeFinished,
    RunStarted,
    RunStopped,
    VerdictGiven,
    WorkersReported,
)
from cluster.jobstate import HARMLESS_ACTIONS
from health.verdict import Severity
from trainer.events import Fact, FactKind, StepRecord


class TimeCause(enum.StrEnum):
    """What wall time went into; only `productive` is good."""

    PRODUCTIVE = "productive"
    STARTUP = "startup"
    SNAPSHOT_STALL = "snapshot_stall"
    DATA_WAIT = "data_wait"
    VALIDATION = "validation"
    BETWEEN_STEPS = "between_steps"
    LOST = "lost"
    NOTICING = "noticing"
    DECIDING = "recovery_deciding"
    RESTARTING = "recovery_restarting"
    FINISHING = "finishing"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


class Interval(msgspec.Struct, frozen=True):
    """A stretch of wall time, in microseconds since the epoch. incident: 0 if it belongs to none."""

    start_us: int
    end_us: int
    cause: TimeCause
    incident: int = 0


class LostSteps(msgspec.Struct, frozen=True):
    """Finished steps of a generation that a later one computes again, charged to the incident that ended it."""

    incident: int
    generation: int
    steps: int


@dataclass(frozen=True)
class Timeline:
    """The partition, and the steps that were lost."""

    intervals: tuple[Interval, ...]
    lost: tuple[LostSteps, ...]


@dataclass
class _Generation:
    """What one generation's workers did. survives_to: the last step that no later generation computed again (None:
    all of them survived so far). ended_by: the incident that ended it, 0 if none did."""

    number: int
    records: list[StepRecord] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    finished_step: int = 0
    survives_to: int | None = None
    is_last: bool = False
    ended_by: int = 0

    @property
    def first_step(self) -> int | None:
        """The first step that it computed, or will compute; None if not known."""
        first = [fact.step for fact in self.facts if fact.kind is FactKind.FIRST_STEP]
        if self.records:
            first.append(self.records[0].step)
        if first:
            return min(first)
        # A generation that loaded and failed before its first step computed nothing again.
        loaded = [fact.step for fact in self.facts if fact.kind is FactKind.LOADED and self.is_last]
        return max(loaded) + 1 if loaded else None

    @property
    def last_step(self) -> int:
        """The last step known to have been finished."""
        finished = (FactKind.FIRST_STEP, FactKind.SNAPSHOT_COMMITTED)
        steps = [fact.step for fact in self.facts if fact.kind in finished]
        return max([self.finished_step, *(record.step for record in self.records), *steps])

    @property
    def begin_us(self) -> int | None:
        """When its first step began."""
        first = self.first_step
        ends = [_us(fact.t_wall_s) for fact in self.facts if fact.kind is FactKind.FIRST_STEP]
        if self.records and first is not None:
            record = self.records[0]
            if record.step == first or not ends:
                steps_s = record.step_s * (record.step - first + 1)
                return _us(record.t_wall_s - record.validation_s - steps_s)
        return min(ends) - self.typical_step_us if ends else None

    @property
    def last_sign_us(self) -> int:
        """When its last recorded step ended; 0 if there is none."""
        return _us(max((record.t_wall_s for record in self.records), default=0.0))

    @property
    def typical_step_us(self) -> int:
        """The median length of its recorded steps."""
        return _us(statistics.median(record.step_s for record in self.records)) if self.records else 0

    def survivors(self, after: int, upto: int) -> int:
        """How many of the steps in (after, upto] were not computed again."""
        limit = upto if self.survives_to is None else min(upto, self.survives_to)
        return max(0, limit - after)


def cut(events: Sequence[AnyEvent], steps: Iterable[StepRecord], now_wall_s: float | None) -> Timeline:
    """Cut the time from the first RunStarted to the last RunStopped, or to now_wall_s if the run goes on.

    now_wall_s None: a run without an end ends with its last sign of life.
    """
    harmless = _harmless(events)
    generations = _gather(events, steps, harmless)
    start = next((_us(event.t_wall_s) for event in events if isinstance(event, RunStarted)), None)
    if start is None:
        return Timeline((), ())
    walker = _Walker(start, generations, harmless)
    for event in events:
        walker.meet(event)
    walker.close(None if now_wall_s is None else _us(now_wall_s))
    return Timeline(tuple(walker.intervals), tuple(walker.lost))


def _harmless(events: Iterable[AnyEvent]) -> set[int]:
    """Incidents that did not touch training: only noted, or about a node without ranks."""
    acted: dict[int, set[str]] = {}
    noted = set()
    for event in events:
        match event:
            case ActionTaken() if event.action != "grow":
                acted.setdefault(event.incident, set()).add(event.action)
            case VerdictGiven() if event.verdict.severity is Severity.NOTICE:
                noted.add(event.incident)
    nothing = {incident for incident, actions in acted.items() if actions <= set(HARMLESS_ACTIONS)}
    return nothing | (noted - acted.keys())


def _gather(events: Sequence[AnyEvent], steps: Iterable[StepRecord], harmless: set[int]) -> dict[int, _Generation]:
    generations: dict[int, _Generation] = {}
    for event in events:
        match event:
            case GenerationPlanned():
                generations.setdefault(event.generation, _Generation(event.generation))
            case WorkersReported() if event.fact.generation in generations:
                generations[event.fact.generation].facts.append(event.fact)
            case NodeFinished() if event.generation in generations:
                known = generations[event.generation]
                known.finished_step = max(known.finished_step, event.step)
            case VerdictGiven() if event.generation in generations and event.incident not in harmless:
                known = generations[event.generation]
                known.ended_by = known.ended_by or event.incident
    for record in steps:
        if record.generation in generations:
            generations[record.generation].records.append(record)
    for known in generations.values():
        by_step = {record.step: record for record in known.records}
        known.records = [by_step[step] for step in sorted(by_step)]
    if generations:
        generations[max(generations)].is_last = True
    limit: int | None = None
    for number in sorted(generations, reverse=True):
        known = generations[number]
        known.survives_to = limit
        first = known.first_step
        if first is not None:
            limit = first - 1 if limit is None else min(limit, first - 1)
    return generations


class _Walker:
    """The cursor, and what the run was doing when it came there."""

    def __init__(self, start_us: int, generations: dict[int, _Generation], harmless: set[int]) -> None:
        self.intervals: list[Interval] = []
        self.lost: list[LostSteps] = []
        self._generations = generations
        self._harmless = harmless
        self._at = start_us
        self._waiting_for: TimeCause = TimeCause.STARTUP
        self._incident = 0
        self._running: _Generation | None = None
        self._begun = False
        self._saving = False
        self._alive = False
        self._last_event_us = start_us

    def meet(self, event: AnyEvent) -> None:
        """Go on to one event of the journal."""
        at = _us(event.t_wall_s)
        match event:
            case RunStarted():
                self._run_started(at)
            case GenerationPlanned():
                self._planned(event.generation, at)
            case ActionTaken(action="grow"):
                self._saving = True
            case VerdictGiven() if event.incident not in self._harmless:
                self._verdict(event, at)
            case RunStopped():
                self._run_stopped(at)
        self._last_event_us = max(self._last_event_us, at)

    def close(self, now_us: int | None) -> None:
        """Account for the time since the last event."""
        if not self._alive:
            return
        running = self._running
        if running is None:
            self._spend(self._last_event_us if now_us is None else now_us, self._waiting_for, self._incident)
            return
        end = max(self._last_event_us, running.last_sign_us) if now_us is None else now_us
        self._run_steps(end)
        if not self._begun:
            self._spend(end, self._waiting_for, self._incident)
            return
        # The step in flight: as good as done while it takes no longer than the window before it.
        self._spend(min(end, self._at + self._window_us(running) * 3 // 2), TimeCause.PRODUCTIVE)
        self._spend(end, TimeCause.UNKNOWN)

    def _run_started(self, at: int) -> None:
        if self._alive:
            running = self._running
            if running is None:
                self._spend(self._last_event_us, self._waiting_for, self._incident)
            elif running.last_sign_us > at:
                return  # its workers outlived the supervisor, and the new one took them over
            else:
                self._leave_steps(max(self._last_event_us, running.last_sign_us), TimeCause.LOST)
        self._spend(at, TimeCause.STOPPED)
        self._alive, self._running, self._incident = True, None, 0
        self._waiting_for = TimeCause.STARTUP

    def _planned(self, generation: int, at: int) -> None:
        saving, self._saving = self._saving, False
        if self._running is not None:
            # A job that grows loses nothing: all had saved.
            self._leave_steps(at, TimeCause.FINISHING if saving else TimeCause.LOST)
            self._waiting_for = TimeCause.RESTARTING
            self._incident = 0 if self._begun else self._incident
        self._spend(at, self._waiting_for, self._incident)
        if self._waiting_for is TimeCause.DECIDING:
            self._waiting_for = TimeCause.RESTARTING
        self._running, self._begun = self._generations[generation], False

    def _verdict(self, event: VerdictGiven, at: int) -> None:
        running = self._running
        if running is not None and event.generation == running.number:
            # Records are fresher than the heartbeats that date the failure.
            self._leave_steps(min(at, max(_us(event.t_failed_wall_s), running.last_sign_us)), TimeCause.LOST)
            self._spend(at, TimeCause.NOTICING, event.incident)
            self._running = None
            self._waiting_for, self._incident = TimeCause.DECIDING, event.incident
        elif running is None and self._waiting_for is TimeCause.DECIDING:
            self._spend(at, TimeCause.DECIDING, self._incident)
            self._incident = event.incident

    def _run_stopped(self, at: int) -> None:
        if not self._alive:
            return
        if self._running is None:
            self._spend(at, self._waiting_for, self._incident)
        else:
            self._leave_steps(at, TimeCause.FINISHING)
        self._alive, self._running = False, None

    def _leave_steps(self, until: int, rest: TimeCause) -> None:
        """The running generation ends: its steps, those finished but not recorded, and the rest of the time."""
        running = self._running
        assert running is not None
        self._run_steps(until)
        if not self._begun:
            self._spend(until, self._waiting_for, self._incident)
            return
        recorded = running.records[-1].step if running.records else (running.first_step or 1) - 1
        # A later generation that went on behind the last record shows that steps in between were finished.
        finished = max(running.last_step, running.survives_to or 0)
        unrecorded = running.survivors(recorded, finished)
        self._spend(min(until, self._at + unrecorded * running.typical_step_us), TimeCause.PRODUCTIVE)
        self._spend(until, rest, running.ended_by if rest is TimeCause.LOST else 0)
        first = running.first_step
        if first is not None and running.last_step >= first:
            lost = running.last_step - first + 1 - running.survivors(first - 1, running.last_step)
            if lost > 0:
                self.lost.append(LostSteps(running.ended_by, running.number, lost))

    def _run_steps(self, until: int) -> None:
        """Walk over the running generation's records; what a faster clock put behind until ends at until."""
        running = self._running
        assert running is not None
        if not self._begun:
            begin = running.begin_us
            if begin is None:
                return
            self._spend(min(begin, until), self._waiting_for, self._incident)
            self._begun = True
        before = (running.first_step or 1) - 1
        for record in running.records:
            self._step(running, before, record, until)
            before = record.step

    def _step(self, running: _Generation, before: int, record: StepRecord, until: int) -> None:
        """The window of one record: the steps since the one before, of which the last was measured."""
        count = record.step - before
        end = max(self._at, min(_us(record.t_wall_s), until))
        if count == 1:
            self._spend(end - _us(record.step_s + record.validation_s), TimeCause.BETWEEN_STEPS)
        validation = min(_us(record.validation_s), end - self._at)
        kept = running.survivors(before, record.step)
        kept_end = self._at + (end - self._at - validation) * kept // count
        waits = ((record.data_s, TimeCause.DATA_WAIT), (record.stall_s, TimeCause.SNAPSHOT_STALL))
        for seconds, cause in waits:
            self._spend(min(kept_end, self._at + _us(max(0.0, seconds)) * kept), cause)
        self._spend(kept_end, TimeCause.PRODUCTIVE)
        if kept == count:  # what was measured after a step that is lost is lost with it
            self._spend(end, TimeCause.VALIDATION)
        self._spend(end, TimeCause.LOST, running.ended_by)

    def _window_us(self, running: _Generation) -> int:
        records = running.records
        if len(records) > 1:
            return max(running.typical_step_us, _us(records[-1].t_wall_s) - _us(records[-2].t_wall_s))
        return running.typical_step_us

    def _spend(self, until: int, cause: TimeCause, incident: int = 0) -> None:
        """Give the time from the cursor to until to a cause; nothing if until is in the past."""
        if until <= self._at:
            return
        last = self.intervals[-1] if self.intervals else None
        if last is not None and (last.cause, last.incident) == (cause, incident):
            self.intervals[-1] = Interval(last.start_us, until, cause, incident)
        else:
            self.intervals.append(Interval(self._at, until, cause, incident))
        self._at = until


def _us(seconds: float) -> int:
    return round(seconds * 1_000_000)
