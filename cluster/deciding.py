"""From suspicions to decisions: they gather in an incident until enough is known, and then the policy is asked.

What follows from a decision is the supervisor's to do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from cluster import events, suspicions
from cluster.actions import Decision, Nothing, action_event
from cluster.evidence import worth_telling
from cluster.fleet_doctor import FleetDoctor
from cluster.generations import Generations
from cluster.incidents import write_incident
from cluster.jobstate import JobState
from cluster.messages import Wish
from cluster.noticing import Suspicion
from cluster.policy import decide, leftover
from cluster.policy_words import what
from cluster.rundir import RunDir
from cluster.unfinished import Unfinished
from configs.schema import JobConfig
from health.crash import Standing, first_cause, standing
from health.verdict import Cause, Severity, Verdict
from trainer.events import Fact, FactKind

_ECHO_S = 0.15
_Event = TypeVar("_Event", bound=events.AnyEvent)

logger = logging.getLogger("everstep.supervisor")


class OpenIncident:
    """Suspicions that arrived together, not yet acted on."""

    def __init__(self, opened_at_s: float, failed_wall_s: float) -> None:
        self.opened_at_s = opened_at_s
        self.failed_wall_s = failed_wall_s
        self.verdicts: list[Verdict] = []
        self.files: dict[str, bytes] = {}
        self._generations: dict[Verdict, int] = {}

    def add(self, suspicion: Suspicion) -> None:
        """Take in one more."""
        self.verdicts.append(suspicion.verdict)
        self._generations.setdefault(suspicion.verdict, suspicion.generation)
        self.failed_wall_s = min(self.failed_wall_s, suspicion.failed_wall_s)
        self.files.update(suspicion.files)

    def generation_of(self, verdict: Verdict) -> int:
        """What the verdict is about, see `Suspicion`."""
        return self._generations[verdict]

    @property
    def about_nodes(self) -> bool:
        """Whether a whole node is accused already."""
        return any(verdict.severity is Severity.NODE for verdict in self.verdicts)


class Run(Protocol):
    """What deciding needs of the supervisor."""

    config: JobConfig
    run_dir: RunDir
    state: JobState
    generations: Generations
    doctor: FleetDoctor
    wish: Wish

    def emit(self, kind: Callable[..., _Event], **fields: object) -> _Event:
        """Write an event to the journal, and only then believe it."""

    def carry_out(self, decision: Decision, root: Verdict, number: int) -> None:
        """Write the decision on an incident to the journal, and do it."""


class Deciding:
    """Judges one incident at a time. incident: what is not judged yet, None if there is nothing.

    What is said of a node without ranks is an incident of its own: it has nothing to do with the end of workers, need
    not wait until that is understood, and is settled first, so that a bad spare takes nobody's place. While all save
    and leave nothing is judged: what is found then waits.
    """

    def __init__(self, run: Run) -> None:
        self.incident: OpenIncident | None = None
        self._aside: dict[str, OpenIncident] = {}
        self._run = run
        self._skipped_step = -1
        self._waiting: list[Suspicion] = []
        self._judged: set[Verdict] = set()

    def suspect(self, suspicion: Suspicion) -> None:
        """Add a suspicion to the open incident, or to that of its node, if it holds no ranks."""
        node = suspicion.verdict.node
        if node and self._run.state.order and not self._run.generations.holds(node):
            self._aside[node] = _joined(self._aside.get(node), suspicion)
        else:
            self.incident = _joined(self.incident, suspicion)

    @property
    def pending(self) -> bool:
        """Whether there is a suspicion that only this process knows of."""
        return self.incident is not None or bool(self._aside) or bool(self._waiting)

    def take_up(self, left: Unfinished) -> None:
        """Finish what the supervisor before this one did not come to."""
        self._judged = set(left.judged)
        for given in left.undecided:
            self._answer(given, (given.verdict, *given.others), {})
        for fact in left.unjudged:
            if fact.kind is FactKind.CORRUPTION_FOUND:
                self.hear_corruption(fact)
            else:
                self.hear_numbers(fact)

    def accuse(self, suspicion: Suspicion) -> None:
        """Act on what a probe found, as far as its verdict reaches. What concerns only workers that were ended
        meanwhile is the same failure seen from elsewhere, or one that their end has settled."""
        verdict, current = suspicion.verdict, self._run.generations.number
        if verdict in self._judged:
            # By the supervisor before this one, which died before the agent knew.
            self._judged.discard(verdict)
            return
        generation = suspicion.generation or current
        if verdict.severity is Severity.WORKERS and generation < current:
            verdict = suspicions.belated(verdict, generation)
        if verdict.severity is Severity.NOTICE:
            self._only_note(verdict, suspicion.failed_wall_s, generation)
        elif self._run.wish is Wish.RUN:
            self.suspect(suspicion)
        else:
            self._waiting.append(suspicion)

    def go_on(self) -> None:
        """All have saved and go on: what was found meanwhile is acted on."""
        waiting, self._waiting = self._waiting, []
        for suspicion in waiting:
            self.accuse(suspicion)

    def leave(self) -> None:
        """The run ends: what was not judged by then is remembered, and nothing done about it."""
        for suspicion in self._waiting:
            verdict, number = suspicion.verdict, self._run.state.next_incident
            self._give(number, verdict, suspicion.generation, suspicion.failed_wall_s, ())
            decision = Decision(Nothing(f"{what(verdict)}; the run is about to end, and nothing is done."))
            self._run.emit(action_event, decision=decision, incident=number, blamed=verdict.node)
        self._waiting = []

    def hear_corruption(self, fact: Fact) -> None:
        """Ranks that compared what they hold found a difference."""
        self.accuse(Suspicion(suspicions.corruption(fact), fact.t_wall_s, generation=fact.generation))

    def hear_skip(self, fact: Fact) -> None:
        """A verdict, but no incident (number 0), for a skipped update; later ones in a row share the first one's."""
        follows, self._skipped_step = fact.step == self._skipped_step + 1, fact.step
        if follows:
            return
        self._only_note(suspicions.skipped_update(fact), fact.t_wall_s, fact.generation)

    def hear_numbers(self, fact: Fact) -> None:
        """Of a generation that is over, or will be, nobody waits for an answer any more."""
        wanted = self._run.generations
        waiting = fact.generation == wanted.number and wanted.plan is not None
        if waiting or fact.kind is not FactKind.ROLLBACK_WANTED:
            self.accuse(Suspicion(suspicions.odd_numbers(fact), fact.t_wall_s, generation=fact.generation))

    def act(self, now_s: float) -> None:
        """Judge the open incident once enough is known, and have done what the policy says. now_s: monotonic."""
        aside, self._aside = self._aside, {}
        for each in aside.values():
            self._judge(each, first_cause(each.verdicts))
        if self.incident is None:
            return
        root = first_cause(self.incident.verdicts)
        if now_s - self.incident.opened_at_s < self._settle_s(root):
            return
        incident, self.incident = self.incident, None
        self._judge(incident, root)

    def _judge(self, incident: OpenIncident, root: Verdict) -> None:
        number, others = self._run.state.next_incident, worth_telling(root, incident.verdicts)
        given = self._give(number, root, incident.generation_of(root), incident.failed_wall_s, others)
        self._answer(given, incident.verdicts, incident.files)

    def _answer(self, given: events.VerdictGiven, verdicts: Sequence[Verdict], files: Mapping[str, bytes]) -> None:
        """Decide, have it done, and only then keep the evidence: nobody waits for a slow disk."""
        run, order, number = self._run, self._run.state.order, given.incident
        decision = decide(given, run.state, run.config)
        run.carry_out(decision, given.verdict, number)
        try:
            write_incident(run.run_dir.path, number, given.verdict, verdicts, files)
        except OSError as error:
            logger.warning("the evidence of incident %d could not be kept: %s", number, error)
        for verdict in leftover(given, decision.action, order):
            self.suspect(Suspicion(verdict, given.t_failed_wall_s, generation=given.generation))

    def _give(
        self, number: int, verdict: Verdict, generation: int, failed_wall_s: float, others: tuple[Verdict, ...]
    ) -> events.VerdictGiven:
        run = self._run
        given = run.emit(
            events.VerdictGiven,
            generation=generation or run.generations.number,
            verdict=verdict,
            t_failed_wall_s=failed_wall_s,
            incident=number,
            others=others,
        )
        run.doctor.suspect(verdict)
        return given

    def _only_note(self, verdict: Verdict, failed_wall_s: float, generation: int) -> None:
        """A verdict, but no incident (number 0)."""
        run, given = self._run, self._give(0, verdict, generation, failed_wall_s, ())
        run.emit(action_event, decision=decide(given, run.state, run.config), incident=0, blamed=verdict.node)

    def _settle_s(self, root: Verdict) -> float:
        """How long to wait for a better root: a lost peer names no culprit, and it may take as long as until a silent
        node is noticed; what may be an echo has its cause on the way."""
        health = self._run.config.health
        if root.cause is Cause.PEER_LOST:
            return health.heartbeat_timeout_s + 2 * health.heartbeat_interval_s
        return _ECHO_S if standing(root) is Standing.DOUBTFUL else 0.0


def _joined(incident: OpenIncident | None, suspicion: Suspicion) -> OpenIncident:
    incident = incident or OpenIncident(time.monotonic(), suspicion.failed_wall_s)
    incident.add(suspicion)
    return incident
