"""The supervisor: hands out ranks, notices, decides, and brings the job back.

Everything it decides is in the journal before it takes effect; a supervisor that was killed is replaced by one that
reads the journal and waits for the agents to speak again. Judging is done by `health`, deciding by `cluster.policy`,
both pure; this file moves facts to them and their answers back.
"""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from cluster import events, suspicions
from cluster.actions import Decision, Evict, Grow, Nothing, Replace, Restart, Shrink, Stop, action_event
from cluster.answering import Answering
from cluster.deciding import Deciding
from cluster.ending import End, ended_after, too_few
from cluster.evaluations import Evaluations
from cluster.fleet import AgentView, first_members
from cluster.fleet_doctor import FleetDoctor
from cluster.generations import Generations
from cluster.handing_over import HandingOver
from cluster.history import history_path
from cluster.inbox import Inbox
from cluster.jobstate import JobState
from cluster.journal import Journal
from cluster.messages import AgentReport, AgentStatus, Gather, Order, Plan, Wish, dismissal
from cluster.noticing import Noticing, Suspicion
from cluster.owners import Owners
from cluster.planning import plan_event
from cluster.policy_numbers import Rollback
from cluster.policy_size import resumed_words, size_for
from cluster.rescuing import Rescuing
from cluster.returning import Returning
from cluster.rundir import RunDir
from cluster.scheduler import Scheduler
from cluster.state import apply
from cluster.watchers import Watcher
from cluster.wire import SupervisorSocket
from configs.schema import JobConfig
from configs.shrinking import fewest_nodes
from health.verdict import Cause, Verdict
from trainer.events import FactKind
from trainer.exits import ExitCode

_TICK_S = 0.05
# Looked through the fleet for, when one of these may have changed it, and not with each report.
_EVICTING = (events.RunStarted, events.NodeReadmitted, events.NodeEvicted, events.ActionTaken, events.GenerationPlanned)
_Event = TypeVar("_Event", bound=events.AnyEvent)

logger = logging.getLogger("everstep.supervisor")


class Supervisor:
    """One job's supervisor. Constructed with everything it talks to; `run` does the work."""

    def __init__(
        self,
        config: JobConfig,
        run_dir: RunDir,
        scheduler: Scheduler,
        socket: SupervisorSocket,
        journal: Journal,
        state: JobState,
        handles: Mapping[str, str],
        watcher: Watcher,
        evaluations: Evaluations | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.scheduler = scheduler
        self.socket = socket
        self.journal = journal
        self.state = state
        self.handles = dict(handles)
        self.watcher = watcher
        self.evaluations = evaluations
        self.views: dict[str, AgentView] = {}
        self.noticing = Noticing(config, scheduler, self.views, time.monotonic())
        self.doctor = FleetDoctor(run_dir, config.health)
        self.generations = Generations(config, self.views, state.generation)
        self.deciding = Deciding(self)
        self.handing_over = HandingOver(self)
        self.rescuing = Rescuing(config.cluster.leave_timeout_s)
        self.returning = Returning(self, history_path(config, run_dir.path.parent))
        self.owners = Owners(self)
        self.inbox = Inbox()
        self.answering = Answering(config.health.heartbeat_interval_s)
        self.unacknowledged: dict[str, int] = {}
        self.journal_waits = False
        self.wish = Wish.RUN
        self.exit_code: ExitCode | None = None
        self.stop_reason = ""
        self.leave_by_s = float("inf")
        self.interrupts = 0
        self.evicted = frozenset(state.evicted)

    # The loop -----------------------------------------------------------------------------------------------------

    def run(self) -> ExitCode:
        """Supervise until the job is done, is asked to leave, or must stop."""
        self.noticing.expect(self.handles, time.monotonic())
        while self.exit_code is None:
            for report in self.socket.receive(_TICK_S):
                self.take(report)
            now = time.monotonic()
            self.owners.listen()
            self.watch(now)
            self.deciding.act(now)
            self.examine(now)
            self.try_plan()
            self.returning.look(now)
            self.handing_over.grow(now)
            self.try_finish(now)
            self.tell_watcher()
        self.shut_down()
        return self.exit_code

    def tell_watcher(self) -> None:
        """Let others do their part of a tick, and write down what evaluations have come to."""
        self.watcher.on_tick()
        for fact in self.evaluations.take_facts() if self.evaluations else ():
            self.emit(events.WorkersReported, fact=fact)

    def adopt(self, plan: Plan, gather: Sequence[Gather], order: Sequence[str], interrupted: bool) -> None:
        """Go on with the generation that a dead supervisor planned last.

        gather: what that plan's nodes had to fetch; order: who holds the ranks since its last decision; interrupted:
        it decided on a new generation, and died before it had planned that.
        """
        self.noticing.adopt(self.handles, time.monotonic())
        self.generations.resume(plan, gather, order)
        if interrupted or tuple(order) != plan.nodes:
            self.next_generation(order, "the last supervisor had decided on it")
        else:
            self._follow(plan)
            self.handing_over.take_up()

    def interrupt(self, number: int) -> None:
        """Signal handler: the first asks the job to save and leave, the second does not wait for it."""
        self.interrupts += 1
        self.stop_reason = f"{signal.Signals(number).name}: the same command goes on from here"

    # Reports in, orders out ---------------------------------------------------------------------------------------

    def take(self, report: AgentReport) -> None:
        """Fold one agent's report into what is known, and answer it."""
        if self.returning.is_former(report):
            self.socket.dismiss(report.node, dismissal(self.generations.number))
            return
        report = self.owners.informed(report)
        if report.node not in self.handles:
            if report.node in self.evicted:  # by the supervisor before this one
                self.send_order(report.node)
            return
        known, now_s = self.views.get(report.node), time.monotonic()
        if report.node not in self.evicted:
            if self.generations.falls_behind(report):
                self.next_generation(self.generations.members, "agents knew a newer generation than the journal")
            if report.notice:
                self._told_to_leave(report)
        if report.node in self.evicted:
            # Its last words may come after its end: facts are true, but nothing it holds or keeps counts any more.
            self._take_facts(report)
            self.send_order(report.node)
            return
        self._take_verdicts(report)
        if report.node in self.evicted:
            return
        self.views[report.node] = AgentView(report, now_s)
        self.noticing.hear(report.node, now_s)
        self.generations.hear(report)
        self.doctor.take(report)
        if report.readiness is not None and (known is None or known.report.readiness is None) and not report.generation:
            self.emit(events.NodeReady, node=report.node, host=report.host, pid=report.pid, hardware=report.hardware,
                      life=report.life)  # fmt: skip
        self._take_facts(report)
        if self.generations.runs(report):
            self._take_exits(report)
            self.noticing.hear_workers(report, known.report if known else None, now_s)
            if report.status is AgentStatus.FINISHED and (known is None or known.report.status != report.status):
                self.emit(
                    events.NodeFinished, node=report.node, generation=report.generation, step=report.finished_step
                )
        if self.wish is not Wish.RUN or self.answering.owed(report, self.generations.number, now_s):
            self.send_order(report.node)

    def _take_facts(self, report: AgentReport) -> None:
        for fact in self.inbox.facts(report):
            self.emit(events.WorkersReported, fact=fact)
            match fact.kind:
                case FactKind.UPDATE_SKIPPED:
                    self.deciding.hear_skip(fact)
                case FactKind.NUMBERS_ODD | FactKind.ROLLBACK_WANTED:
                    self.deciding.hear_numbers(fact)
                case FactKind.CORRUPTION_FOUND if report.node not in self.evicted:
                    self.deciding.hear_corruption(fact)
                case FactKind.SNAPSHOT_FAILED:
                    self.rescuing.hear(fact)

    def _told_to_leave(self, report: AgentReport) -> None:
        """A node will be taken away. One without ranks goes at once, unless it is writing what the others will need."""
        order, members = self.state.order, self.generations.members
        if report.node in (order or members):
            self.handing_over.told_to_leave(report)
        elif members and self.rescuing.order_of(report.node) is None:
            self._evict(report.node, f"spare: {report.notice}")
            if report.node in members:
                self._without(report.node)

    def _take_exits(self, report: AgentReport) -> None:
        if self.wish is not Wish.RUN:
            return
        for death in self.inbox.exits(report):
            verdict = suspicions.worker_ended(report.node, death, self.noticing.progress.newest_step)
            log = {f"rank-{death.rank}.log": "\n".join(death.log_tail).encode()}
            self.deciding.suspect(Suspicion(verdict, death.t_wall_s, log))

    def _take_verdicts(self, report: AgentReport) -> None:
        """What a node's own probes found: a notice is written down, the rest opens an incident.

        The agent keeps it until it is in the journal: whoever takes over is told of it again.
        """
        for numbered in self.inbox.verdicts(report):
            self.deciding.accuse(Suspicion(numbered.verdict, numbered.t_wall_s, generation=numbered.generation))
            if self.deciding.pending:
                self.unacknowledged.setdefault(report.node, report.seq)

    def send_order(self, node: str) -> None:
        """Tell a node the whole of what is wanted of it."""
        view, wanted = self.views.get(node), self.generations
        gone = node in self.evicted
        # Until all that were taken over have spoken or been given up, not all addresses of those who have or keep
        # copies are known, and no order is better than one that leaves some out: agents go on with their last one.
        if self.noticing.waits_for_adopted and not gone and self.wish is Wish.RUN:
            return
        self.answering.answered(node, time.monotonic())
        self.socket.send(
            node,
            Order(
                ack_seq=self._acknowledged(view.report) if view else 0,
                wish=Wish.SHUT_DOWN if gone else self.wish,
                target_generation=wanted.number,
                plan=wanted.assignment_of(node),
                copy_to=wanted.placement.copy_to(node),
                keep_for=wanted.placement.keep_for(node, self.config.cluster.ranks_per_node),
                gather=wanted.sources_of(node),
                rescue=self.rescuing.order_of(node),
                rejected=self.state.rejected,
                collect=self.noticing.collect if self.noticing.progress.generation == wanted.number else 0,
                measure=self.doctor.order_for(node),
                heard_wall_s=view.report.sent_wall_s if view else 0.0,
                sent_wall_s=time.time(),
                abandoned=self.state.abandoned,
                left_out=self.state.left_out,
                recipe=self.state.recipe,
            ),
        )

    def _acknowledged(self, report: AgentReport) -> int:
        if not self.deciding.pending:
            self.unacknowledged.clear()
        return min(report.seq, self.unacknowledged.get(report.node, report.seq + 1) - 1)

    def broadcast(self) -> None:
        """Send everybody its order now, without waiting for the next report."""
        self.generations.placement.update(self.generations.members)
        for node in self.views:
            self.send_order(node)

    # Noticing -----------------------------------------------------------------------------------------------------

    def watch(self, now: float) -> None:
        """Look for nodes that fell silent, agents that never came, and workers that make no progress."""
        self.noticing.look(now)
        placing = self.generations.plan is not None and not self.noticing.waits_for_adopted
        if placing and self.generations.placement.update(self.generations.members):
            # Most reports are not answered at once: a node would send its copies to one that is gone for that long.
            self.broadcast()
        if self.wish is not Wish.RUN or (self.deciding.incident is not None and self.deciding.incident.about_nodes):
            return
        for suspicion in self.noticing.silent(self.handles, self.evicted, now):
            self.deciding.suspect(suspicion)
        if self.deciding.incident is not None:
            return
        if self.generations.plan is not None:
            self._watch_workers(now)
            return
        wanted = self.generations
        for suspicion in self.noticing.missing(wanted.members, wanted.number, wanted.begun_s, now):
            self.deciding.suspect(suspicion)

    def _watch_workers(self, now: float) -> None:
        asked = self.noticing.collect
        for suspicion in self.noticing.standing_still(now):
            self.deciding.suspect(suspicion)
        if self.noticing.collect != asked:
            self.broadcast()
        for suspicion in self.noticing.slow(lambda: bool(self.state.spares)):
            self.deciding.accuse(suspicion)

    # Acting -------------------------------------------------------------------------------------------------------

    def examine(self, now: float) -> None:
        """Hold nodes against each other before they get ranks, and go on with an examination of the network."""
        step = self.noticing.progress.newest_step
        changed, found = self.doctor.tick(self.views, self.evicted, now, time.time(), step)
        if self.generations.plan is None and self.generations.all_ready:
            found = [*found, *self.doctor.misfits(self.views)]
        for verdict in found:
            self.deciding.accuse(Suspicion(verdict, time.time()))
        if changed:
            self.broadcast()

    def carry_out(self, decision: Decision, root: Verdict, number: int) -> None:
        """Write the decision on an incident to the journal, and do it."""
        self.emit(action_event, decision=decision, incident=number, blamed=root.node)
        match decision.action:
            case Restart(reason=reason) | Rollback(reason=reason):
                self.next_generation(self.generations.members, reason)
            case Replace(node=node, reason=reason):
                self._evict(node, reason)
                self._report(root)
                # Not who would hold ranks if a growth had come to its plan: the decision was made without it.
                self.next_generation(self.state.order, reason)
            case Shrink(node=node, order=order, reason=reason):
                self._evict(node, reason)
                self._report(root)
                self.next_generation(order, reason)
            case Evict(node=node, reason=reason):
                self._evict(node, reason)
                self._report(root)
                if node in self.generations.members:
                    self._without(node)
            case Stop(exit_code=code, reason=reason):
                self.exit_code, self.stop_reason = ExitCode(code), reason
            case Nothing() | Grow():
                pass

    def _without(self, node: str) -> None:
        """A node is gone before the plan that would have given it ranks: whoever else came up takes its place, or, if
        the job was to grow onto it, all go on as they were."""
        if self.state.order:
            self.next_generation(self.state.order, f"{node}, which was to get ranks, is gone")
        else:
            self._choose_first_members()

    def _evict(self, node: str, reason: str) -> None:
        self.emit(events.NodeEvicted, node=node, reason=reason)
        self.send_order(node)
        if node in self.handles:
            self.scheduler.kill(node, self.handles[node], for_good=True)
        self.views.pop(node, None)
        self.noticing.forget(node)
        self.generations.forget(node)

    def _report(self, root: Verdict) -> None:
        """Tell the owner of the machines of a bad one. A node that is wanted elsewhere is not bad."""
        if root.cause is not Cause.PREEMPTED and self.config.cluster.bad_node != "none":
            said = f"everstep: {root.cause.value}: {root.evidence[0] if root.evidence else 'see its incident'}"
            self.scheduler.report_bad(root.node, said)

    # Generations --------------------------------------------------------------------------------------------------

    def next_generation(self, members: Sequence[str], reason: str) -> None:
        """Have everybody stop and report in for a new generation of workers."""
        self.generations.begin(members, reason, time.monotonic())
        self.broadcast()

    def try_plan(self) -> None:
        """Hand out ranks when everybody who is needed is ready."""
        if self.wish is not Wish.RUN or self.deciding.incident is not None or self.generations.plan is not None:
            return
        if not self.generations.members:
            self._choose_first_members()
            return
        wanted = self.generations
        now = time.monotonic()
        if not wanted.all_ready or self.noticing.waits_for_adopted or wanted.waits_for_spares(now):
            return
        if self.rescuing.waits(wanted.number, wanted.world_size, self.views, self.state, now, self.broadcast):
            return
        plan = wanted.make(self.state)
        reason = wanted.reason.rstrip(".") + resumed_words(plan, self.state, self.noticing.progress.newest_step)
        self.emit(plan_event, plan=plan, gather=wanted.gather, reason=reason)
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self.generations.follow(plan)
        self.broadcast()
        # The books of a large fleet take a moment to open, and are kept for long: nobody waits for that to get ranks,
        # and the garbage collector does not read through them again and again.
        self.noticing.follow(plan, time.monotonic())
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _choose_first_members(self) -> None:
        usable = [n for n in self.handles if n not in self.evicted]
        nodes, why = size_for(len(usable), self.config)
        if nodes:
            wanted = first_members(usable, nodes, self.state.doubtful)
            self.next_generation(wanted, why or self.generations.reason)
        else:
            self._end(too_few(len(usable), self.config.cluster.nodes, fewest_nodes(self.config)))

    # The end ------------------------------------------------------------------------------------------------------

    def try_finish(self, now: float) -> None:
        """See whether the job is done, or should leave."""
        if self.exit_code is not None:
            return
        last = self.generations.finished_after()
        if last is not None:
            if self.handing_over.active and not self.interrupts and last < self.config.training.steps:
                self.handing_over.over()
            else:
                saved, target = self.state.newest_snapshot, self.config.training.steps
                self._end(ended_after(last, target, saved, self.stop_reason))
        elif self.interrupts and self.wish is Wish.RUN:
            self.wish = Wish.SAVE_AND_LEAVE
            self.leave_by_s = now + self.config.cluster.leave_timeout_s
            self.broadcast()
        if self.exit_code is None and self.wish is Wish.SAVE_AND_LEAVE and self._leave_now(now):
            if self.handing_over.active and not self.interrupts:
                self.handing_over.over()
            else:
                self.exit_code = ExitCode.REQUEUE

    def _end(self, end: End) -> None:
        self.exit_code, self.stop_reason = end.exit_code, end.reason

    def _leave_now(self, now: float) -> bool:
        over = self.generations.plan is None or self.generations.anybody_failed()
        return self.interrupts > 1 or now >= self.leave_by_s or over

    def shut_down(self) -> None:
        """Let all agents go, see that they went, and write the last line of the journal."""
        assert self.exit_code is not None
        self.wish = Wish.SHUT_DOWN
        self.broadcast()
        self.returning.close(0.0 if self.interrupts > 1 else 5.0)
        deadline = time.monotonic() + (0.0 if self.interrupts > 1 else 10.0)
        # An agent that never spoke hears no order either.
        spoke = [handle for node, handle in self.handles.items() if node in self.views]
        while time.monotonic() < deadline and any(self.scheduler.alive(handle) for handle in spoke):
            for report in self.socket.receive(_TICK_S):
                self.take(report)
        for node, handle in self.handles.items():
            self.scheduler.kill(node, handle)
        self.deciding.leave()
        while self.evaluations is not None and self.evaluations.lingers(self.exit_code, self.interrupts):
            self.tell_watcher()
            time.sleep(_TICK_S)
        self.emit(
            events.RunStopped,
            exit_code=int(self.exit_code),
            reason=self.stop_reason,
            last_step=self.state.newest_step,
        )

    def emit(self, kind: Callable[..., _Event], **fields: object) -> _Event:
        """Write an event to the journal, and only then believe it."""
        event = kind(t_wall_s=time.time(), t_mono_s=time.monotonic(), **fields)
        problem = self.journal.append(event)
        if problem is not None and not self.journal_waits:
            logger.warning("the journal waits in memory until there is room: %s", problem)
        self.journal_waits = problem is not None
        self.state = apply(self.state, event)
        if isinstance(event, _EVICTING):
            self.evicted = frozenset(self.state.evicted)
        self.watcher.on_event(event)
        return event
