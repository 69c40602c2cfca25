"""The agent's mind: what it knows, what it reports, and how it answers orders. Threads meet here, under one lock."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from cluster.messages import (
    AgentReport,
    AgentStatus,
    Assignment,
    Evidence,
    HeldInfo,
    Measured,
    NumberedFact,
    NumberedVerdict,
    Order,
    RankBeat,
    RankTimes,
    Readiness,
    Wish,
    WorkerExit,
)
from health.clock import ClockFilter
from health.examination import Machine
from health.verdict import Verdict
from trainer.events import Fact


class AgentState:
    """The agent's whole state; implements `cluster.elastic.Planner`.

    wake is called, outside the lock, whenever a report is worth sending at once.
    """

    def __init__(self, node: str, host: str, take_inventory: Callable[[], Sequence[HeldInfo]]) -> None:
        self.node = node
        self.host = host
        self.take_inventory = take_inventory
        self.wake: Callable[[], None] = _nobody
        self.beats: Callable[[], Sequence[RankBeat]] = tuple
        self.times: Callable[[], Sequence[RankTimes]] = tuple
        self.on_save: Callable[[], None] = _nobody
        self.on_order: Callable[[Order], None] = _nobody_listens
        self.peer_address = ""
        self.machine: Machine | None = None
        self.clock = ClockFilter()
        self.domain = ""
        self.generation = 0
        self.life = secrets.token_hex(8)
        self._notice = ""
        self._changed = threading.Condition()
        self._status = AgentStatus.READY
        self._readiness: Readiness | None = None
        self._exits: tuple[WorkerExit, ...] = ()
        self._finished_step = 0
        self._facts: list[NumberedFact] = []
        self._noted = 0
        self._verdicts: list[NumberedVerdict] = []
        self._sent_up_to: dict[int, int] = {}
        self._evidence: Evidence | None = None
        self._measured: Measured | None = None
        self._seq = 0
        self._order = Order(ack_seq=0, wish=Wish.RUN, target_generation=0, plan=None)
        self._saving = False
        self._dismissed = False

    # What the link does -------------------------------------------------------------------------------------------

    def report(self) -> AgentReport:
        """The state, as a message."""
        beats = tuple(self.beats())
        with self._changed:
            self._seq += 1
            self._sent_up_to[self._seq] = self._noted
            return AgentReport(
                node=self.node,
                host=self.host,
                pid=os.getpid(),
                seq=self._seq,
                status=self._status,
                generation=self.generation,
                finished_step=self._finished_step,
                readiness=self._readiness,
                beats=beats if self._status is AgentStatus.RUNNING else (),
                exits=self._exits,
                facts=tuple(self._facts),
                peer_address=self.peer_address,
                domain=self.domain,
                notice=self._notice,
                verdicts=tuple(self._verdicts),
                times=tuple(self.times()) if self._status is AgentStatus.RUNNING else (),
                evidence=self._evidence,
                sent_wall_s=time.time(),
                machine=None if self._status is AgentStatus.RUNNING else self.machine,
                measured=self._measured,
                life=self.life,
            )

    def take_order(self, order: Order) -> None:
        """Remember what the supervisor wants; facts that it acknowledged are dropped."""
        received_wall_s = time.time()
        with self._changed:
            if self._dismissed:
                return
            self.clock.see(order.heard_wall_s, order.sent_wall_s, received_wall_s)
            had = self._sent_up_to.get(order.ack_seq, 0)
            self._sent_up_to = {seq: upto for seq, upto in self._sent_up_to.items() if seq > order.ack_seq}
            self._facts = [numbered for numbered in self._facts if numbered.number > had]
            self._verdicts = [numbered for numbered in self._verdicts if numbered.number > had]
            self._order = order
            save = order.wish is Wish.SAVE_AND_LEAVE and not self._saving and self._status is AgentStatus.RUNNING
            self._saving = self._saving or save
            self._changed.notify_all()
        self.on_order(order)
        if save:
            self.on_save()

    # What torch elastic asks --------------------------------------------------------------------------------------

    def await_plan(self, store_port: int) -> Assignment | None:
        """See `cluster.elastic.Planner`. What the node holds is looked through anew for every generation wanted."""
        while True:
            with self._changed:
                if self._leaving():
                    return None
                wanted = self._order.target_generation
            held = tuple(self.take_inventory())
            with self._changed:
                self._status = AgentStatus.READY
                self._readiness = Readiness(wanted, self.host, store_port, held)
            self.wake()
            with self._changed:
                self._changed.wait_for(lambda: self._worth_answering(wanted))  # noqa: B023  called before it changes
                plan = None if self._leaving() else self._new_plan()
                if plan is None and not self._leaving():
                    continue
                self._readiness = None
                if plan is not None:
                    self.generation = plan.generation
                    self._status = AgentStatus.RUNNING
                    self._exits = ()
                    self._saving = False
            self.wake()
            return plan

    def _worth_answering(self, wanted: int) -> bool:
        return self._leaving() or self._new_plan() is not None or self._order.target_generation > wanted

    def order(self) -> Order:
        """What the supervisor said last."""
        with self._changed:
            return self._order

    def wants_restart(self) -> bool:
        """See `cluster.elastic.Planner`."""
        with self._changed:
            return self._order.target_generation > self.generation or self._leaving()

    def _leaving(self) -> bool:
        return self._dismissed or self._order.wish is Wish.SHUT_DOWN

    def _new_plan(self) -> Assignment | None:
        plan = self._order.plan
        return plan if plan is not None and plan.generation > self.generation and plan.place >= 0 else None

    # What happens on the node -------------------------------------------------------------------------------------

    def workers_died(self, exits: Sequence[WorkerExit]) -> None:
        """Some workers ended badly."""
        with self._changed:
            self._exits = (*self._exits, *exits)
        self.wake()

    def workers_finished(self, step: int) -> None:
        """All workers ended well after this step; what the node had to persist was tried."""
        with self._changed:
            self._status = AgentStatus.FINISHED
            self._finished_step = step
        self.wake()

    def note(self, fact: Fact) -> None:
        """Keep a fact until the supervisor has it."""
        with self._changed:
            self._noted += 1
            self._facts.append(NumberedFact(self._noted, fact))
        self.wake()

    def accuse(self, verdict: Verdict) -> None:
        """Keep what a probe of this node found until the supervisor has it."""
        with self._changed:
            self._noted += 1
            self._verdicts.append(NumberedVerdict(self._noted, verdict, time.time(), self.generation))
        self.wake()

    def show(self, evidence: Evidence) -> None:
        """Answer a request for evidence."""
        with self._changed:
            self._evidence = evidence
        self.wake()

    def measured(self, measured: Measured) -> None:
        """Answer a request to measure ways from other nodes."""
        with self._changed:
            self._measured = measured
        self.wake()

    def await_dismissal(self) -> None:
        """Block until this node shall leave: what it is for a node that failed its examination."""
        with self._changed:
            self._changed.wait_for(self._leaving)

    def must_go(self, why: str) -> None:
        """This node will be taken away soon: let the supervisor move its ranks before that."""
        with self._changed:
            self._notice = why
        self.wake()

    def leave(self) -> None:
        """Behave as if the supervisor had said: shut down. Whatever it says from now on is not heard."""
        with self._changed:
            self._dismissed = True
            self._changed.notify_all()

    def await_orders_after_finish(self) -> bool:
        """Block until a newer generation is wanted (True) or the node shall leave (False)."""
        with self._changed:
            self._changed.wait_for(lambda: self._leaving() or self._order.target_generation > self.generation)
            return not self._leaving()

    @property
    def idle(self) -> bool:
        """Whether no worker runs here."""
        return self._status is not AgentStatus.RUNNING


def _nobody_listens(order: Order) -> None:
    """Nobody listens yet."""


def _nobody() -> None:
    """Nobody listens yet."""
