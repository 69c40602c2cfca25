"""The supervisor's whole knowledge, as a fold of its journal: replaying the events gives the state back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from cluster.events import (
    ActionTaken,
    AgentStarted,
    AnyEvent,
    Back,
    GenerationPlanned,
    NodeEvicted,
    NodeFinished,
    NodeReadmitted,
    NodeReady,
    NodeRemembered,
    RunStarted,
    RunStopped,
    SupervisorTookOver,
    VerdictGiven,
    WorkersReported,
)
from cluster.jobstate import (
    EVICTING_ACTIONS,
    HARMLESS_ACTIONS,
    RESTARTING_ACTIONS,
    Eviction,
    Failure,
    Incident,
    JobState,
    NodeState,
    NodeStatus,
    Remembered,
    Resize,
    life_of,
)
from health.verdict import Cause, Severity
from trainer.events import Fact, FactKind
from trainer.exits import ExitCode
from trainer.history import union

KEPT_SNAPSHOTS = 16
KEPT_RECOVERIES = 16
KEPT_RESIZES = 64
_PERSONS_TURN = (ExitCode.FAILED, ExitCode.BAD_INPUT, ExitCode.DO_NOT_RESTART)


def replay(events: Iterable[AnyEvent]) -> JobState:
    """The state after all the events."""
    state = JobState()
    for event in events:
        state = apply(state, event)
    return state


def apply(state: JobState, event: AnyEvent) -> JobState:
    """The state after one more event. Total: an event about an unknown node or incident changes what it can."""
    match event:
        case RunStarted():
            return _started(state, event)
        case SupervisorTookOver():
            return _replace(state, supervisor_pid=event.supervisor_pid)
        case AgentStarted():
            return _agent_started(state, event)
        case NodeRemembered():
            known = Remembered(place=event.place, reason=event.reason, failures_per_day=event.failures_per_day)
            return _replace(state, remembered={**state.remembered, event.node: known})
        case NodeReadmitted():
            return _readmitted(state, event)
        case NodeReady():
            return _ready(state, event)
        case GenerationPlanned():
            return _planned(state, event)
        case WorkersReported():
            return _fact(state, event.fact)
        case VerdictGiven():
            return _verdict(state, event)
        case ActionTaken():
            return _action(state, event)
        case NodeEvicted():
            state = _replace(state, evicted_at={**state.evicted_at, event.node: event.t_wall_s})
            return _with_node(state, event.node, status=NodeStatus.EVICTED)
        case NodeFinished():
            return _replace(
                state, finished=state.finished | {event.node}, newest_step=max(state.newest_step, event.step)
            )
        case RunStopped():
            return _replace(
                state,
                exit_code=event.exit_code,
                stop_reason=event.reason,
                newest_step=max(state.newest_step, event.last_step),
            )


def _started(state: JobState, event: RunStarted) -> JobState:
    """A new attempt starts new agents: only evictions outlive it. After an exit that asks for a person, that person
    has had a turn: the failures before it no longer count as repeated ones."""
    evicted = {name: node for name, node in state.nodes.items() if node.status is NodeStatus.EVICTED}
    return _replace(
        state,
        run=event.run,
        attempt=event.attempt,
        target_steps=event.target_steps,
        supervisor_pid=event.supervisor_pid,
        wanted_nodes=event.nodes,
        growing=(),
        nodes=evicted,
        order=(),
        finished=frozenset(),
        failures=() if state.exit_code in _PERSONS_TURN else state.failures,
        rollbacks=() if state.exit_code in _PERSONS_TURN else state.rollbacks,
        evictions=() if state.exit_code in _PERSONS_TURN else state.evictions,
        remembered={},
        incidents=tuple(msgspec.structs.replace(incident, open=False) for incident in state.incidents),
        exit_code=None,
        stop_reason="",
    )


def _agent_started(state: JobState, event: AgentStarted) -> JobState:
    if state.status(event.node) is NodeStatus.EVICTED:
        return state
    return _with_node(state, event.node, status=NodeStatus.STARTING, handle=event.handle)


def _ready(state: JobState, event: NodeReady) -> JobState:
    keep = state.status(event.node) in (NodeStatus.EVICTED, NodeStatus.ACTIVE)
    status = state.nodes[event.node].status if keep else NodeStatus.READY
    return _with_node(state, event.node, status=status, host=event.host, pid=event.pid, life=event.life)


def _readmitted(state: JobState, event: NodeReadmitted) -> JobState:
    """Nothing is known of it any more, but that the agent which it had is nobody's."""
    known = state.nodes.get(event.node)
    former = {(event.node, life_of(known))} if known is not None and known.pid else set()
    others = {name: node for name, node in state.nodes.items() if name != event.node}
    return _replace(state, nodes=others, former=state.former | former)


def _planned(state: JobState, event: GenerationPlanned) -> JobState:
    nodes, planned = dict(state.nodes), frozenset(event.nodes)
    state = _resized(state, event)
    for name, node in state.nodes.items():
        if node.status is NodeStatus.ACTIVE and name not in planned:
            nodes[name] = msgspec.structs.replace(node, status=NodeStatus.READY)
    for name in event.nodes:
        node = nodes.get(name, NodeState(status=NodeStatus.ACTIVE))
        nodes[name] = msgspec.structs.replace(node, status=NodeStatus.ACTIVE)
    return _replace(
        state,
        generation=event.generation,
        order=event.nodes,
        layout=event.layout,
        growing=(),
        # A run that an older version began does not say it, but knew no other size.
        wanted_nodes=state.wanted_nodes or len(event.nodes),
        ranks_per_node=event.ranks_per_node,
        ram_step=event.ram_step,
        nodes=nodes,
        finished=frozenset(),
        rollback_wanted=None,
        pace_from=None,
    )


def _resized(state: JobState, event: GenerationPlanned) -> JobState:
    before = state.resizes[-1].nodes if state.resizes else state.wanted_nodes
    if not before or len(event.nodes) == before:
        return state
    resize = Resize(t_wall_s=event.t_wall_s, nodes=len(event.nodes), reason=event.reason)
    return _replace(state, resizes=(*state.resizes, resize)[-KEPT_RESIZES:], proven_size=False)


def _fact(state: JobState, fact: Fact) -> JobState:
    match fact.kind:
        case FactKind.FIRST_STEP:
            return _first_step(state, fact)
        case FactKind.ROLLBACK_WANTED:
            return _replace(state, rollback_wanted=fact)
        case FactKind.SNAPSHOT_COMMITTED if (fact.generation, fact.step) in state.refused:
            return state
        case FactKind.SNAPSHOT_COMMITTED:
            state = _replace(state, step_s=_step_s(state, fact))
            others = _without(state, lambda age: age[1] == fact.step)
            of_step = [age for age in state.committed if age[1] == fact.step]
            newest = max([(fact.generation, fact.step), *of_step])
            committed = tuple(sorted([*others, newest]))[-KEPT_SNAPSHOTS:]
            return _replace(state, committed=committed, newest_step=max(state.newest_step, fact.step))
        case FactKind.LOADED:
            # What is beyond it could not be had, and will be made anew: nobody may wait for it, or count on it.
            return _replace(state, committed=_without(state, lambda age: age[1] > fact.step))
        case FactKind.SNAPSHOT_DISTRUSTED:
            rejected = tuple(sorted({*state.rejected, (fact.generation, fact.step)}))
            return _replace(state, committed=_without(state, lambda age: age[1] == fact.step), rejected=rejected)
        case FactKind.SNAPSHOT_REJECTED:
            return _replace(state, committed=_without(state, lambda age: age[1] == fact.step))
    return state


def _without(state: JobState, gone: Callable[[tuple[int, int]], bool]) -> tuple[tuple[int, int], ...]:
    """The committed snapshots without some."""
    return tuple(age for age in state.committed if not gone(age))


def _first_step(state: JobState, fact: Fact) -> JobState:
    """The incidents of earlier generations are over; the last of them tells what a restart costs."""
    over = [each for each in state.incidents if each.open and each.generation < fact.generation]
    recoveries = [fact.t_wall_s - each.t_verdict_wall_s for each in over if each.action in RESTARTING_ACTIONS]
    measured = tuple(max(0.0, recovery_s) for recovery_s in recoveries[-1:])
    return _replace(
        state,
        incidents=tuple(
            msgspec.structs.replace(each, open=False) if each in over else each for each in state.incidents
        ),
        recoveries_s=(*state.recoveries_s, *measured)[-KEPT_RECOVERIES:],
        newest_step=max(state.newest_step, fact.step),
        proven_size=state.proven_size or fact.generation == state.generation,
        pace_from=(fact.step, fact.t_wall_s) if fact.generation == state.generation else state.pace_from,
    )


def _step_s(state: JobState, fact: Fact) -> float | None:
    if state.pace_from is None or fact.generation != state.generation:
        return state.step_s
    steps, elapsed_s = fact.step - state.pace_from[0], fact.t_wall_s - state.pace_from[1]
    return elapsed_s / steps if steps > 0 and elapsed_s > 0 else state.step_s


def _verdict(state: JobState, event: VerdictGiven) -> JobState:
    verdict = event.verdict
    failures = tuple(
        Failure(
            generation=event.generation,
            incident=event.incident,
            node=each.node,
            rank=each.rank,
            cause=each.cause,
            step=each.step,
            fingerprint=each.fingerprint,
            severity=each.severity,
            certainty=each.certainty,
            t_wall_s=event.t_wall_s,
            root=each is verdict,
        )
        for each in (verdict, *event.others)
        if each.severity is not Severity.NOTICE
    )
    if not failures:
        return state
    state = _replace(state, failures=(*state.failures, *failures))
    if all(each.number != event.incident for each in state.incidents):
        incident = Incident(
            number=event.incident,
            generation=event.generation,
            verdict=verdict,
            t_failed_wall_s=event.t_failed_wall_s,
            t_verdict_wall_s=event.t_wall_s,
        )
        state = _replace(state, incidents=(*state.incidents, incident))
    if verdict.cause is Cause.NODE_LOST and state.status(verdict.node) not in (None, NodeStatus.EVICTED):
        state = _with_node(state, verdict.node, status=NodeStatus.LOST)
    return state


def _action(state: JobState, event: ActionTaken) -> JobState:
    incidents = tuple(
        msgspec.structs.replace(
            each, action=event.action, reason=event.reason, open=each.open and event.action not in HARMLESS_ACTIONS
        )
        if each.number == event.incident
        else each
        for each in state.incidents
    )
    restarts_used = state.restarts_used + (event.action in RESTARTING_ACTIONS)
    growing = event.order if event.action == "grow" else ()
    state = _replace(state, incidents=incidents, restarts_used=restarts_used, growing=growing or state.growing)
    if event.back is not None:
        state = _went_back(state, event.back)
    if event.action not in EVICTING_ACTIONS:
        return state
    eviction = _eviction(state, event)
    state = _replace(state, evictions=(*state.evictions, eviction))
    if event.node:
        state = _replace(state, evicted_at={**state.evicted_at, event.node: event.t_wall_s})
        state = _with_node(state, event.node, status=NodeStatus.EVICTED, judged=eviction.judged)
    if event.action == "evict":
        return state
    # The spare is taken at once, so that a second loss before the next plan is given another one.
    taken = tuple(event.spare if name == event.node else name for name in state.order)
    state = _replace(state, order=event.order if event.action == "shrink" else taken)
    if event.spare:
        state = _with_node(state, event.spare, status=NodeStatus.ACTIVE)
    if event.action == "shrink":
        # Who has no ranks any more can take over some at once.
        for name in state.with_status(NodeStatus.ACTIVE):
            state = state if name in event.order else _with_node(state, name, status=NodeStatus.READY)
    return state


def _eviction(state: JobState, event: ActionTaken) -> Eviction:
    about = [each for each in state.failures if (each.incident, each.node) == (event.incident, event.node)]
    gone = any(each.cause in (Cause.NODE_LOST, Cause.PREEMPTED) for each in about)
    return Eviction(node=event.node, incident=event.incident, t_wall_s=event.t_wall_s, judged=not gone)


def _went_back(state: JobState, back: Back) -> JobState:
    return _replace(
        state,
        rollback_wanted=None,
        rollbacks=(*state.rollbacks, back.step),
        abandoned=(*state.abandoned, (back.generation, back.to_step)),
        left_out=union(state.left_out, back.left_out),
        recipe=back.recipe or state.recipe,
        committed=_without(state, lambda age: age[1] > back.to_step),
    )


def _with_node(
    state: JobState,
    name: str,
    *,
    status: NodeStatus,
    handle: str | None = None,
    host: str | None = None,
    pid: int | None = None,
    life: str | None = None,
    judged: bool | None = None,
) -> JobState:
    known = state.nodes.get(name, NodeState(status=status))
    node = NodeState(
        status=status,
        handle=known.handle if handle is None else handle,
        host=known.host if host is None else host,
        pid=known.pid if pid is None else pid,
        life=known.life if life is None else life,
        judged=known.judged if judged is None else judged,
    )
    return _replace(state, nodes={**state.nodes, name: node})


_replace = msgspec.structs.replace
