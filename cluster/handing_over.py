"""All save and leave at the end of a step, and start again elsewhere: because a node must go, or because the job grows.

Nothing is lost by it: the state is in the run directory before anybody is asked to start anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from cluster import events, suspicions
from cluster.actions import action_event
from cluster.deciding import Deciding
from cluster.generations import Generations
from cluster.jobstate import JobState
from cluster.messages import AgentReport, Wish
from cluster.noticing import Noticing, Suspicion
from cluster.policy_size import decide_growth, size_words
from configs.schema import JobConfig
from configs.shrinking import largest_layout
from trainer.events import Fact, FactKind

_LOOK_EVERY_S = 1.0
_Event = TypeVar("_Event", bound=events.AnyEvent)


class Run(Protocol):
    """What it needs of the supervisor. leave_by_s: monotonic time after which nobody is waited for any more."""

    config: JobConfig
    state: JobState
    evicted: frozenset[str]
    generations: Generations
    noticing: Noticing
    deciding: Deciding
    wish: Wish
    leave_by_s: float

    def emit(self, kind: Callable[..., _Event], **fields: object) -> _Event:
        """Write an event to the journal, and only then believe it."""

    def broadcast(self) -> None:
        """Send everybody its order now."""

    def next_generation(self, members: Sequence[str], reason: str) -> None:
        """Have everybody stop and report in for a new generation of workers."""


class HandingOver:
    """One at a time. node: the one that must go, "" for none."""

    def __init__(self, run: Run) -> None:
        self.node = ""
        self._run = run
        self._look_at_s = 0.0

    @property
    def active(self) -> bool:
        """Whether all were asked to save for this."""
        return bool(self.node or self._run.state.growing)

    def told_to_leave(self, report: AgentReport) -> None:
        """A node with ranks will be taken away: all save at the next step's end, and then it is given up.

        If they are saving already so that the job can grow, it is given up instead, and the job grows another time.
        """
        run = self._run
        growing = bool(run.state.growing) and run.wish is Wish.SAVE_AND_LEAVE
        if self.node or not (growing or run.wish is Wish.RUN):
            return
        self.node = report.node
        fact = Fact(
            kind=FactKind.STOPPING, node=report.node, rank=-1, generation=run.generations.number,
            step=run.noticing.progress.newest_step, t_wall_s=time.time(),
            detail=f"{report.notice}: state is saved first",
        )  # fmt: skip
        if not growing:
            self._ask_to_save()
        run.emit(events.WorkersReported, fact=fact)
        run.broadcast()

    def grow(self, now_s: float) -> None:
        """Let the job grow, once it is time to. now_s: monotonic."""
        run = self._run
        if now_s < self._look_at_s or run.wish is not Wish.RUN or run.generations.plan is None or run.deciding.pending:
            return
        self._look_at_s = now_s + _LOOK_EVERY_S
        decision = decide_growth(run.state, run.config, time.time())
        if decision is not None:
            run.emit(action_event, decision=decision, incident=0)
            self.take_up()

    def take_up(self) -> None:
        """Go on with a growth that was decided, by this supervisor or the one before it."""
        if self._run.state.growing:
            self._ask_to_save()
            self._run.broadcast()

    def over(self) -> None:
        """Everybody saved, or had the time to."""
        self._run.wish = Wish.RUN
        if self.node:
            self._give_up()
        else:
            self._start_larger()
        self._run.deciding.go_on()

    def _ask_to_save(self) -> None:
        self._run.wish = Wish.SAVE_AND_LEAVE
        self._run.leave_by_s = time.monotonic() + self._run.config.cluster.leave_timeout_s

    def _give_up(self) -> None:
        """The policy says who takes the node's ranks, or that nobody does."""
        run, node = self._run, self.node
        self.node = ""
        view = run.generations.views.get(node)
        notice = view.report.notice if view else "it went before it could save"
        verdict = suspicions.preempted(node, run.noticing.progress.newest_step, notice)
        run.deciding.suspect(Suspicion(verdict, time.time()))
        run.deciding.act(time.monotonic())

    def _start_larger(self) -> None:
        """On the nodes that were chosen, as far as they are still there."""
        run = self._run
        views = run.generations.views
        leaving = {node for node, view in views.items() if view.report.notice and node not in run.generations.members}
        there = tuple(node for node in run.state.growing if node not in run.evicted and node not in leaving)
        layout = largest_layout(run.config, len(there))
        members = there[: layout.nodes] if layout is not None else run.generations.members
        run.next_generation(members, f"the job grows to {size_words(len(members), run.config)}")
