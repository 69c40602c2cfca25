"""What to do about an incident: a pure function of its verdicts, the state, the configuration and the verdict's time.

It takes the cheapest rung of the recovery ladder that the evidence allows, and says why: in a sentence for a person,
and in the facts it went by. All that it looks at is in the journal, so that any decision can be made again from there.
"""

from __future__ import annotations

from collections.abc import Collection

from cluster.actions import Action, Decision, Evict, Nothing, Replace, Restart, Shrink, Stop
from cluster.events import VerdictGiven
from cluster.evidence import GONE, Weight, goes_on, verdicts_of, weigh, worst
from cluster.jobstate import Failure, JobState, NodeStatus
from cluster.policy_numbers import Refusal, decide_numbers, facts_about
from cluster.policy_pricing import Price, price
from cluster.policy_size import gone_nodes, size_words, smaller_order, unproven, why_not_smaller
from cluster.policy_words import fact, ordinal, quote, what
from configs.schema import JobConfig
from configs.shrinking import largest_layout
from health.crash import first_cause
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.exits import ExitCode

LOOP_NODES = 2
LOOP_TIMES = 3
_HOUR_S = 3600.0
_TOLD_VERDICTS = 8
_SOFTWARE = (Cause.USER_ERROR, Cause.OUT_OF_MEMORY, Cause.WORKER_CRASH, Cause.BAD_INPUT, Cause.NONFINITE)


def decide(given: VerdictGiven, state: JobState, config: JobConfig) -> Decision:
    """The action for an incident, and the facts that led to it.

    It does not matter whether the incident is in the state already: what failed in it counts once.
    """
    return _Case(given, state, config).decide()


def leftover(given: VerdictGiven, action: Action, order: Collection[str]) -> tuple[Verdict, ...]:
    """Verdicts about whole nodes that the action does not settle: they deserve an incident of their own.

    order: who held ranks when it was decided. All that was said of them was weighed, if it came to no eviction; what
    was said of others was not, where the incident was about ranks. Hints need no incident: they are remembered, and
    weighed when there is more.
    """
    verdicts = verdicts_of(given)
    if isinstance(action, Stop) or not verdicts:
        return ()
    evicts = isinstance(action, Replace | Shrink | Evict)
    settled = action.node if isinstance(action, Replace | Shrink | Evict) else ""
    if not any(not each.node or each.node in order for each in verdicts):
        settled = _lead(verdicts).node
    return tuple(
        each
        for each in verdicts
        if each.node != settled
        and (evicts or each.node not in order)
        and each.severity is Severity.NODE
        and each.certainty is not Certainty.HINT
    )


class _Case:
    """One decision in the making: what is asked for, and the facts used so far."""

    def __init__(self, given: VerdictGiven, state: JobState, config: JobConfig) -> None:
        self.given = given
        self.state = state
        self.config = config
        self.window_s = config.health.evidence_window_hours * _HOUR_S
        self.because: list[str] = []

    def decide(self) -> Decision:
        verdicts = verdicts_of(self.given)
        if not verdicts:
            return Decision(Nothing(f"{what(self.given.verdict)}: only noted, training goes on."))
        self.because += [f"verdict: {fact(each)}" for each in verdicts[:_TOLD_VERDICTS]]
        if len(verdicts) > _TOLD_VERDICTS:
            self.because.append(f"and {len(verdicts) - _TOLD_VERDICTS} verdicts more of the same incident")
        inside = [each for each in verdicts if not each.node or each.node in self.state.order]
        lead = _lead(inside or verdicts)
        if lead.severity is Severity.JOB or lead.cause is Cause.BAD_INPUT:
            return self._decision(self._stop_for_good(lead, _stop_job(lead)))
        return self._decision(self._inside(lead, inside) if inside else self._outside(lead))

    def _stop_for_good(self, lead: Verdict, stop: Stop) -> Stop:
        """Unless only a smaller job, which has not finished a step yet, fails like that: then the size may be to blame,
        and the job should go on where there are more nodes."""
        if not lead.node or not unproven(self.state, self.config):
            return stop
        self._pass_over("an end for good, as the job has not finished a step in its new size")
        return Stop(ExitCode.REQUEUE, f"{stop.reason} That was on {size_words(len(self.state.order), self.config)}.")

    def _decision(self, action: Action) -> Decision:
        return Decision(action, tuple(self.because))

    # A node that holds ranks, or none in particular ---------------------------------------------------------------

    def _inside(self, lead: Verdict, verdicts: list[Verdict]) -> Action:
        numbers = decide_numbers(lead, self.state, self.config)
        if numbers is not None:
            self.because += facts_about(self.state, self.config)
            return Stop(numbers.exit_code, numbers.reason) if isinstance(numbers, Refusal) else numbers
        running = all(goes_on(each) for each in verdicts)
        if lead.cause is Cause.OUT_OF_MEMORY and unproven(self.state, self.config):
            return Stop(ExitCode.REQUEUE, _no_room(lead, self.state, self.config))
        if not running and (loop := _crash_loop(lead, self.given, self.state)) is not None:
            return self._stop_for_good(lead, loop)
        weight = worst(self.given, self.state, self.window_s)
        if weight is None:
            self.because.append("against a node: nothing")
            return self._keep(lead, running, "")
        self.because.append(f"against {weight.node}: {_words(weight)}")
        if weight.certainty is Certainty.HINT and not weight.gone:
            self._pass_over(f"evicting {weight.node}, as two independent hints or stronger evidence are needed")
            return self._keep(lead, running, "one piece of evidence evicts nobody" if running else "")
        lead = lead if lead.node == weight.node else _of_node(weight.node, verdicts, lead)
        return self._replace_gone(lead, weight) if weight.gone else self._judge(lead, weight, running)

    def _replace_gone(self, lead: Verdict, weight: Weight) -> Action:
        """No judgement that could be wrong, so no price and no limit an hour: spares and restarts are the bounds."""
        self._tell_spares()
        self._pass_over(f"a restart on the same nodes, as {weight.node} is gone")
        if not self.state.spares:
            end = "run the same command again when the node is back." + _suspicious(lead, self.state)
            return self._without_spare(lead, weight, end)
        return self._within_budget(lead, self._replacement(lead, weight))

    def _judge(self, lead: Verdict, weight: Weight, running: bool) -> Action:
        """A node that is likely or surely bad: evict it if there is a spare, the price is right and the hour's limit
        allows it."""
        self._tell_spares()
        proven = weight.certainty is Certainty.PROOF and not weight.slow
        if not self.state.spares:
            if proven and not running:
                return self._without_spare(lead, weight, "run the same command again when there is another node.")
            self._pass_over(f"evicting {weight.node}, as there is no spare")
            again = f" for the {ordinal(weight.strikes + 1)} time on this node, but" if weight.strikes else ""
            return self._keep(lead, running, f"{again.strip()} no spare is left".strip())
        cost = price(weight, running, lead.step, self.state, self.config)
        self.because.append(f"price: {cost.words}")
        if not proven and not cost.evict:
            self._pass_over(f"evicting {weight.node}, as keeping it is cheaper")
            return self._keep(lead, running, f"evicting the node would cost more than keeping it ({_both(cost)})")
        if self._evictions_left() < 1:
            self._pass_over(f"evicting {weight.node}, as the limit of this hour is reached")
            return self._over_the_limit(lead, proven, running)
        self._pass_over(f"keeping {weight.node}, as {'it is proven bad' if proven else 'that costs more'}")
        return self._within_budget(lead, self._replacement(lead, weight))

    def _without_spare(self, lead: Verdict, weight: Weight, end: str) -> Action:
        """The node must go, and nobody takes its place: fewer nodes, or the end. end: what then remains to be done."""
        order = smaller_order({weight.node, *gone_nodes(self.given)}, self.state, self.config)
        if not order:
            self._pass_over(f"going on with fewer nodes, as {why_not_smaller(self.config)}")
            return Stop(ExitCode.REQUEUE, f"{what(lead)} and no spare is left; {end}")
        if not weight.gone and self._evictions_left() < 1:
            return self._over_the_limit(lead, proven=True, running=False)
        self._pass_over("an end, as a smaller layout fits")
        reason = f"{what(lead)} and no spare is left; the job goes on with {size_words(len(order), self.config)}."
        return self._within_budget(lead, Shrink(weight.node, order, reason))

    def _keep(self, lead: Verdict, running: bool, why: str) -> Action:
        """All nodes stay: the workers start again, if they do not run as they should."""
        why = f", {why}" if why else ""
        if running:
            return Nothing(f"{what(lead)}{why}; training goes on.")
        return self._within_budget(
            lead, Restart(f"{what(lead)}{why}; all workers start again from the newest snapshot.")
        )

    def _replacement(self, lead: Verdict, weight: Weight) -> Replace:
        spare = self.state.spares[0]
        times = ""
        if weight.strikes and lead.severity is not Severity.NODE:
            times = f", for the {ordinal(weight.strikes + 1)} time on this node"
        return Replace(weight.node, spare, f"{what(lead)}{times}; {spare} takes over its ranks.")

    def _within_budget(self, lead: Verdict, action: Action) -> Action:
        used, budget = self.state.restarts_used, self.config.health.max_restarts
        self.because.append(f"restarts used: {used} of {budget}")
        if used < budget:
            return action
        return Stop(
            ExitCode.FAILED,
            f"{what(lead)}, and the {budget} automatic restarts of this run are used up; "
            "look at the incidents, then raise health.max_restarts and run the same command again.",
        )

    def _over_the_limit(self, lead: Verdict, proven: bool, running: bool) -> Action:
        """So many bad nodes in an hour are rather a bad judge: proofs ask for a person, the rest is not acted on."""
        limit = self.config.health.max_evictions_per_hour
        many = f"{limit} nodes have been evicted on evidence within an hour (health.max_evictions_per_hour)"
        if not proven:
            return self._keep(lead, running, many)
        return Stop(
            ExitCode.DO_NOT_RESTART,
            f"{what(lead)}, but {many}. Look whether the nodes are bad or what judges them; the same command goes on.",
        )

    def _evictions_left(self) -> int:
        limit, now = self.config.health.max_evictions_per_hour, self.given.t_wall_s
        recent = [
            each
            for each in self.state.evictions
            if each.judged and each.incident != self.given.incident and now - each.t_wall_s < _HOUR_S
        ]
        self.because.append(f"evictions on evidence in the last hour: {len(recent)} of {limit}")
        return limit - len(recent)

    def _pass_over(self, what_and_why: str) -> None:
        self.because.append(f"not taken: {what_and_why}")

    def _tell_spares(self) -> None:
        self.because.append(f"spares: {', '.join(self.state.spares) or 'none'}")

    # A node that holds no ranks -----------------------------------------------------------------------------------

    def _outside(self, verdict: Verdict) -> Action:
        """Training is not touched; the node goes if it is gone, or if more than one hint speaks against it."""
        state = self.state
        hopeful = state.with_status(NodeStatus.STARTING, NodeStatus.READY, NodeStatus.ACTIVE)
        left = [node for node in hopeful if node != verdict.node]
        weight = weigh(verdict.node, self.given, state, self.window_s)
        here = state.status(verdict.node) not in (None, NodeStatus.EVICTED)
        if weight is None or not here:
            return Nothing(f"{what(verdict)}, but the node holds no ranks; training is not touched.")
        self.because.append(f"against {weight.node}: {_words(weight)}")
        if not weight.gone and weight.certainty is Certainty.HINT:
            return Nothing(f"{what(verdict)}, one piece of evidence evicts nobody; training is not touched.")
        if not weight.gone and self._evictions_left() < 1:
            if not state.order and weight.certainty is Certainty.PROOF:
                return self._over_the_limit(verdict, proven=True, running=False)
            return Nothing(f"{what(verdict)}, but health.max_evictions_per_hour is reached; training is not touched.")
        if not state.order and largest_layout(self.config, len(left)) is None:
            return Stop(
                ExitCode.REQUEUE,
                f"{what(verdict)} before training began; {len(left)} of {self.config.cluster.nodes} nodes are left and "
                "no spare. "
                "Run the same command again when the node is back.",
            )
        return Evict(verdict.node, f"{what(verdict)}, and the node holds no ranks; training is not touched.")


def _lead(verdicts: list[Verdict]) -> Verdict:
    """The root of what must be acted on: a hint beside which training goes on leads only if there is nothing else."""
    grave = [each for each in verdicts if not goes_on(each)]
    return first_cause(grave or verdicts)


def _of_node(node: str, verdicts: list[Verdict], lead: Verdict) -> Verdict:
    about = [each for each in verdicts if each.node == node]
    return first_cause(about) if about else lead


def _stop_job(verdict: Verdict) -> Stop:
    if verdict.cause is Cause.BAD_INPUT:
        return Stop(ExitCode.BAD_INPUT, f"{what(verdict)}: {quote(verdict)}. A restart cannot help; correct it first.")
    return Stop(ExitCode.DO_NOT_RESTART, f"{what(verdict)} and asked not to be restarted: {quote(verdict)}.")


def _no_room(verdict: Verdict, state: JobState, config: JobConfig) -> str:
    return (
        f"{what(verdict)}, on {size_words(len(state.order), config)}: a rank's share of the state has no room there. "
        f"Run the same command again when there are more nodes; cluster.min_nodes = {len(state.order) + 1} keeps "
        "the job from becoming so small again."
    )


def _crash_loop(verdict: Verdict, given: VerdictGiven, state: JobState) -> Stop | None:
    """The same failure at the same step in another generation: on two nodes if it is software's, else the third time.

    What comes from outside (a kill, a hang) may well strike two nodes at the same step by chance, so only the third
    time counts there. Nodes that are lost or taken away never count: a whole rack may go at one step, each node of it
    seen as an incident of its own, and every one costs a spare, of which there are only so many. What no step is known
    of cannot be told from another time.
    """
    if verdict.cause in GONE or verdict.step < 0:
        return None
    same = [
        each
        for each in _earlier(state, given)
        if each.root and (each.fingerprint, each.step) == (verdict.fingerprint, verdict.step)
    ]
    times = len({each.generation for each in same}) + 1
    nodes = {each.node for each in same if each.node} | ({verdict.node} if verdict.node else set())
    on_nodes = len(nodes) >= LOOP_NODES and verdict.cause in _SOFTWARE
    if not on_nodes and times < LOOP_TIMES:
        return None
    where = f"on {len(nodes)} different nodes ({', '.join(sorted(nodes))})" if len(nodes) > 1 else "on the same node"
    return Stop(
        ExitCode.DO_NOT_RESTART,
        f"The same failure happened {times} times at step {verdict.step}, {where}: {quote(verdict)}. "
        "That is a bug or bad data rather than bad hardware, and another restart would end the same way. "
        "Read the incident's evidence, correct the code, the data or the configuration, then run the same command.",
    )


def _earlier(state: JobState, given: VerdictGiven) -> list[Failure]:
    # A failure while a generation is still being gathered is about one that the state has no plan of yet.
    current = max([state.generation, given.generation, *(each.generation for each in state.failures)])
    return [each for each in state.failures if each.generation < current]


def _suspicious(verdict: Verdict, state: JobState) -> str:
    """A hint where so many nodes were lost in one step that the job itself may be what takes them down."""
    lost = {each.node for each in state.failures if (each.cause, each.step) == (Cause.NODE_LOST, verdict.step)}
    count = len(lost | {verdict.node})
    if verdict.cause is not Cause.NODE_LOST or count < LOOP_TIMES:
        return ""
    return f" {count} nodes were lost in this step: if they do not share a cause, see whether the job itself ends them."


def _words(weight: Weight) -> str:
    sure = "gone" if weight.gone else weight.certainty.value
    return f"{sure}, from {'; '.join(weight.pieces)}"


def _both(cost: Price) -> str:
    return f"{cost.evict_s:.1f} against {cost.keep_s:.1f} s of the job"
