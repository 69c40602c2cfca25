"""Nodes that come back, or come up for the first time, while a job runs: their agents are started, and they are spares.

A node that this run evicted comes back when a person readmits it, or, if it was only lost or taken away, when the owner
of the machines has it again. Whoever owns them may also have nodes that were not there before. Reading a file of the
site's and asking for an agent may take long, so both are done in a thread; the supervisor hears of it when it is done.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from cluster import events
from cluster.history import HistoryFile
from cluster.jobstate import JobState, life_of
from cluster.lemons import Standing, standings
from cluster.messages import AgentReport
from cluster.noticing import Noticing
from cluster.remembering import remembered
from cluster.scheduler import Scheduler
from configs.schema import JobConfig

LOOK_EVERY_S = 2.0
_PROBATION_EVERY_S = 60.0
_AGAIN_S = 60.0
_Event = TypeVar("_Event", bound=events.AnyEvent)

logger = logging.getLogger("everstep.supervisor")


class Run(Protocol):
    """What it needs of the supervisor. handles: of all agents ever started."""

    config: JobConfig
    state: JobState
    evicted: frozenset[str]
    handles: dict[str, str]
    noticing: Noticing
    scheduler: Scheduler

    def emit(self, kind: Callable[..., _Event], **fields: object) -> _Event:
        """Write an event to the journal, and only then believe it."""


@dataclass(frozen=True)
class Question:
    """What the thread must know. evicted: when each node was evicted; lost: those of them that nothing is held
    against. used: whose agents run. free: how many more may. probation: whose past may have been lived down."""

    evicted: Mapping[str, float]
    lost: frozenset[str]
    used: frozenset[str]
    free: int
    probation: tuple[str, ...]


@dataclass(frozen=True)
class Back:
    """An agent that was started, and why; standing: what earlier runs know of the node."""

    node: str
    handle: str
    reason: str
    standing: Standing | None


@dataclass(frozen=True)
class Answer:
    """What was found. cleared: nodes that have served their time on probation."""

    back: tuple[Back, ...] = ()
    cleared: Mapping[str, Standing] = field(default_factory=dict)


class Returning:
    """Looks for such nodes every LOOK_EVERY_S while any could be used. history: the file of nodes."""

    def __init__(self, run: Run, history: Path) -> None:
        self._run = run
        self._history = HistoryFile(history)
        self._asked: concurrent.futures.Future[Answer] | None = None
        self._look_at_s = 0.0
        self._probation_at_s = 0.0
        self._refused: dict[str, float] = {}
        self._seen: tuple[int, int] = (0, 0)
        self._known: list[Standing] = []

    def is_former(self, report: AgentReport) -> bool:
        """Whether this is the agent that a node had before it was evicted: it is nobody's any more."""
        former = self._run.state.former
        return bool(former) and (report.node, life_of(report)) in former

    def look(self, now_s: float) -> None:
        """Take in what was found, and look again if it is time to. now_s: monotonic."""
        if self._asked is not None and self._asked.done():
            asked, self._asked = self._asked, None
            self._take(asked.result(), now_s)
        if self._asked is None and now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_EVERY_S
            question = self._question(now_s)
            if question is not None:
                self._asked = concurrent.futures.Future()
                # A daemon: asking for an agent may take long, and no end of a run shall wait for it without bound.
                threading.Thread(
                    target=self._answer, name="returning", args=(self._asked, question), daemon=True
                ).start()

    def close(self, timeout_s: float) -> None:
        """Look no more; whoever was started meanwhile is among the handles, if that is known in time."""
        asked, self._asked, self._look_at_s = self._asked, None, float("inf")
        if asked is None:
            return
        if concurrent.futures.wait([asked], timeout_s).done:
            for back in asked.result().back:
                self._run.handles[back.node] = back.handle
        else:
            logger.warning("an agent that was asked for may still come up; it ends when it finds no supervisor")

    def _question(self, now_s: float) -> Question | None:
        """None: nobody could be used. Cheap, however large the fleet is, as long as nobody is missing."""
        state, cluster = self._run.state, self._run.config.cluster
        lost = sum(name in self._run.handles for name in self._run.evicted)
        free = cluster.nodes + cluster.spares - (len(self._run.handles) - lost)
        probation: tuple[str, ...] = ()
        if now_s >= self._probation_at_s:
            self._probation_at_s = now_s + _PROBATION_EVERY_S
            probation = tuple(name for name in state.doubtful if state.status(name) is not None)
        if free <= 0 and not probation:
            return None
        judged = {name for name in self._run.evicted if state.nodes[name].judged}
        return Question(
            evicted={name: state.evicted_at.get(name, float("inf")) for name in sorted(self._run.evicted)},
            lost=frozenset(self._run.evicted - judged),
            used=frozenset(self._run.handles) - self._run.evicted,
            free=max(0, free),
            probation=probation,
        )

    # In the thread ------------------------------------------------------------------------------------------------

    def _answer(self, asked: concurrent.futures.Future[Answer], question: Question) -> None:
        try:
            asked.set_result(self._find(question))
        except Exception as error:  # noqa: BLE001  a defect of ours: it is raised in the supervisor's loop
            asked.set_exception(error)

    def _find(self, question: Question) -> Answer:
        """Never raises what a file or the owner of the machines may do: it is looked for again."""
        try:
            self._read_history(question.probation != ())
            came = {**self._readmitted(question), **self._appeared(question)}
            past = remembered([*came, *question.probation], self._known)
        except OSError as error:
            logger.warning("whether nodes came back is not known now: %s", error)
            return Answer()
        fit = {node: why for node, why in came.items()
               if node not in past or past[node].place is not events.Place.OUT}  # fmt: skip
        back = [self._start(node, fit[node], past.get(node)) for node in list(fit)[: question.free]]
        cleared = {node: past[node] for node in question.probation
                   if node in past and past[node].place is events.Place.MEMBER}  # fmt: skip
        return Answer(tuple(each for each in back if each is not None), cleared)

    def _read_history(self, always: bool) -> None:
        """Again only where it has changed, or where time alone changes what follows from it."""
        path = self._history.path
        status = path.stat() if path.exists() else None
        seen = (status.st_mtime_ns, status.st_size) if status is not None else (0, 0)
        if seen != self._seen or always:
            hours = self._run.config.cluster.burn_in_hours
            self._known, self._seen = standings(self._history.read().entries, time.time(), hours), seen

    def _readmitted(self, question: Question) -> dict[str, str]:
        past = remembered(list(question.evicted), self._known)
        return {
            node: standing.reason
            for node, standing in past.items()
            if standing.readmitted_wall_s > question.evicted[node] and self._may_try(node)
        }

    def _appeared(self, question: Question) -> dict[str, str]:
        barred = question.used | (frozenset(question.evicted) - question.lost)
        return {
            node: "it is there again" if node in question.evicted else "it was not there before"
            for node in self._run.scheduler.appeared()
            if node not in barred and self._may_try(node)
        }

    def _may_try(self, node: str) -> bool:
        return time.monotonic() >= self._refused.get(node, 0.0)

    def _start(self, node: str, reason: str, standing: Standing | None) -> Back | None:
        self._refused[node] = time.monotonic() + _AGAIN_S
        try:
            return Back(node, self._run.scheduler.start(node), reason, standing)
        except (OSError, ValueError) as error:
            logger.warning("the agent of %s, which could be used again, did not start: %s", node, error)
            return None

    # In the supervisor's loop -------------------------------------------------------------------------------------

    def _take(self, answer: Answer, now_s: float) -> None:
        run = self._run
        for back in answer.back:
            run.emit(events.NodeReadmitted, node=back.node, reason=back.reason)
            if back.standing is not None and back.standing.failures:
                remind(run, back.node, back.standing)
            run.handles[back.node] = back.handle
            run.emit(events.AgentStarted, node=back.node, handle=back.handle)
            run.noticing.expected_since.pop(back.node, None)
            run.noticing.expect([back.node], now_s)
        for node, standing in answer.cleared.items():
            remind(run, node, standing)


class _Emits(Protocol):
    def emit(self, kind: Callable[..., _Event], **fields: object) -> _Event:
        """See `Run`."""


def remind(run: _Emits, node: str, standing: Standing) -> None:
    """Write down what earlier runs know of a node."""
    run.emit(
        events.NodeRemembered,
        node=node,
        place=standing.place,
        reason=standing.reason,
        failures=standing.failures,
        node_days=standing.node_days,
        failures_per_day=standing.failures_per_day,
    )
