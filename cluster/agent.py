"""The agent's mind: what it knows, what it reports, and how it answers orders. Threads meet here, under one lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from cluster.messages import (
    AgentReport,
    AgentStatus,
    NumberedFact,
    Order,
    Plan,
    RamShardInfo,
    RankBeat,
    Readiness,
    Wish,
    WorkerExit,
)
from trainer.events import Fact


class AgentState:
    """The agent's whole state; implements `cluster.elastic.Planner`.

    wake is called, outside the lock, whenever a report is worth sending at once.
    """

    def __init__(self, node: str, host: str, take_inventory: Callable[[], Sequence[RamShardInfo]]) -> None:
        self.node = node
        self.host = host
        self.take_inventory = take_inventory
        self.wake: Callable[[], None] = _nobody
        self.beats: Callable[[], Sequence[RankBeat]] = tuple
        self.on_save: Callable[[], None] = _nobody
        self.generation = 0
        self._changed = threading.Condition()
        self._status = AgentStatus.READY
        self._readiness: Readiness | None = None
        self._exits: tuple[WorkerExit, ...] = ()
        self._finished_step = 0
        self._facts: list[NumberedFact] = []
        self._facts_noted = 0
        self._sent_up_to: dict[int, int] = {}
        self._seq = 0
        self._order = Order(ack_seq=0, wish=Wish.RUN, target_generation=0, plan=None)
        self._saving = False

    # What the link does -------------------------------------------------------------------------------------------

    def report(self) -> AgentReport:
        """The state, as a message."""
        beats = tuple(self.beats())
        with self._changed:
            self._seq += 1
            self._sent_up_to[self._seq] = self._facts_noted
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
            )

    def take_order(self, order: Order) -> None:
        """Remember what the supervisor wants; facts that it acknowledged are dropped."""
        with self._changed:
            had = self._sent_up_to.get(order.ack_seq, 0)
            self._sent_up_to = {seq: upto for seq, upto in self._sent_up_to.items() if seq > order.ack_seq}
            self._facts = [numbered for numbered in self._facts if numbered.number > had]
            self._order = order
            if self._readiness is not None and self._readiness.ready_for < order.target_generation:
                ready = self._readiness
                self._readiness = Readiness(order.target_generation, ready.store_host, ready.store_port, ready.ram)
                worth_saying = True
            else:
                worth_saying = False
            save = order.wish is Wish.SAVE_AND_LEAVE and not self._saving and self._status is AgentStatus.RUNNING
            self._saving = self._saving or save
            self._changed.notify_all()
        if save:
            self.on_save()
        if worth_saying:
            self.wake()

    # What torch elastic asks --------------------------------------------------------------------------------------

    def await_plan(self, store_port: int) -> Plan | None:
        """See `cluster.elastic.Planner`."""
        ram = tuple(self.take_inventory())
        with self._changed:
            self._status = AgentStatus.READY
            self._readiness = Readiness(self._order.target_generation, self.host, store_port, ram)
        self.wake()
        with self._changed:
            self._changed.wait_for(lambda: self._leaving() or self._new_plan() is not None)
            plan = None if self._leaving() else self._new_plan()
            self._readiness = None
            if plan is not None:
                self.generation = plan.generation
                self._status = AgentStatus.RUNNING
                self._exits = ()
                self._saving = False
        self.wake()
        return plan

    def wants_restart(self) -> bool:
        """See `cluster.elastic.Planner`."""
        with self._changed:
            return self._order.target_generation > self.generation or self._leaving()

    def _leaving(self) -> bool:
        return self._order.wish is Wish.SHUT_DOWN

    def _new_plan(self) -> Plan | None:
        plan = self._order.plan
        return plan if plan is not None and plan.generation > self.generation and self.node in plan.nodes else None

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
            self._facts_noted += 1
            self._facts.append(NumberedFact(self._facts_noted, fact))
        self.wake()

    def leave(self) -> None:
        """Behave as if the supervisor had said: shut down."""
        with self._changed:
            order = self._order
            self._order = Order(
                ack_seq=order.ack_seq, wish=Wish.SHUT_DOWN, target_generation=order.target_generation, plan=None
            )
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


def _nobody() -> None:
    """Nobody listens yet."""
