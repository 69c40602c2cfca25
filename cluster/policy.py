"""What to do about a verdict: a pure function of the verdict, the state and the configuration.

It takes the cheapest rung of the recovery ladder that the evidence allows, and says why in a sentence for a person.
"""

from __future__ import annotations

import msgspec

from cluster.events import ActionTaken
from cluster.state import Failure, JobState, NodeStatus
from configs.schema import JobConfig
from health.verdict import Cause, Severity, Verdict
from trainer.exits import ExitCode

LOOP_NODES = 2
LOOP_TIMES = 3
_SOFTWARE = (Cause.USER_ERROR, Cause.OUT_OF_MEMORY, Cause.WORKER_CRASH, Cause.BAD_INPUT, Cause.NONFINITE)
_STRIKES = (Cause.HANG, Cause.STARTUP_TIMEOUT, Cause.WORKER_KILLED, Cause.WORKER_CRASH)
_WORDS = {
    Cause.WORKER_CRASH: "a worker crashed",
    Cause.WORKER_KILLED: "a worker was killed",
    Cause.OUT_OF_MEMORY: "a worker ran out of memory",
    Cause.PEER_LOST: "a worker lost its peers and no rank is known as the cause",
    Cause.USER_ERROR: "a worker failed with an error",
    Cause.BAD_INPUT: "the configuration or the input is wrong",
    Cause.NODE_LOST: "the node stopped answering",
    Cause.HANG: "training hung",
    Cause.NONFINITE: "the loss or a gradient was not finite",
    Cause.STARTUP_TIMEOUT: "the first step was not finished in time",
    Cause.PREEMPTED: "the node was told to leave",
    Cause.CUDA_ERROR: "a GPU failed in a worker's hands",
    Cause.STRAGGLER: "a rank is slow",
    Cause.SLOW_NETWORK: "the network is slow",
    Cause.SLOW_DATA: "the data source is slow",
    Cause.SLOW_JOB: "all ranks became slower",
    Cause.SILENT_CORRUPTION: "a device computed or kept wrong numbers",
    Cause.SPIKE: "the loss or the gradient norm leapt",
    Cause.BAD_LAYER: "a layer is dead or explodes",
    Cause.EXPERT_COLLAPSE: "the experts' load has collapsed",
    Cause.GPU_FAULT: "a GPU is faulty",
    Cause.GPU_DEGRADED: "a GPU is impaired",
    Cause.NODE_FAULT: "the node is faulty",
    Cause.NODE_DEGRADED: "the node is impaired",
    Cause.LINK_FAULT: "a link is faulty",
    Cause.PREFLIGHT_FAILED: "the node failed its examination",
}


class Restart(msgspec.Struct, frozen=True, tag="restart"):
    """All workers start again, on the same nodes."""

    reason: str


class Replace(msgspec.Struct, frozen=True, tag="replace"):
    """The node is evicted and the spare takes over its ranks; then all workers start again."""

    node: str
    spare: str
    reason: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """The run ends with this exit code."""

    exit_code: int
    reason: str


class Nothing(msgspec.Struct, frozen=True, tag="nothing"):
    """Training goes on."""

    reason: str


Action = Restart | Replace | Stop | Nothing


def action_event(action: Action, incident: int, t_wall_s: float, t_mono_s: float) -> ActionTaken:
    """The action as the journal has it."""
    name = str(type(action).__struct_config__.tag)
    node, spare = (action.node, action.spare) if isinstance(action, Replace) else ("", "")
    return ActionTaken(
        t_wall_s=t_wall_s, t_mono_s=t_mono_s, incident=incident, action=name, reason=action.reason,
        node=node, spare=spare,
    )  # fmt: skip


def decide(verdict: Verdict, state: JobState, config: JobConfig) -> Action:
    """The action for a verdict about the current generation.

    It does not matter whether the verdict is in the state already: what failed in the current generation counts once,
    only failures of earlier generations make it a repeated one.
    """
    if verdict.severity is Severity.NOTICE:
        return Nothing(f"{_what(verdict)}: only noted, training goes on.")
    if verdict.severity is Severity.JOB or verdict.cause is Cause.BAD_INPUT:
        return _stop_job(verdict)
    whole_node = verdict.node != "" and (verdict.severity is Severity.NODE or verdict.cause is Cause.NODE_LOST)
    if verdict.node and verdict.node not in state.order:
        return _outside(verdict, state, config)
    loop = _crash_loop(verdict, state)
    if loop is not None:
        return loop
    if whole_node and not state.spares:
        return Stop(
            ExitCode.REQUEUE,
            f"{_what(verdict)} and no spare is left; run the same command again when the node is back."
            + _suspicious(verdict, state),
        )
    if state.restarts_used >= config.health.max_restarts:
        return Stop(
            ExitCode.FAILED,
            f"{_what(verdict)}, and the {config.health.max_restarts} automatic restarts of this run are used up; "
            "look at the incidents, then raise health.max_restarts and run the same command again.",
        )
    strikes = len(_strikes(verdict, state))
    if whole_node:
        return Replace(verdict.node, state.spares[0], f"{_what(verdict)}; {state.spares[0]} takes over its ranks.")
    if strikes and state.spares:
        return Replace(
            verdict.node,
            state.spares[0],
            f"{_what(verdict)}, for the {_ordinal(strikes + 1)} time on this node; "
            f"{state.spares[0]} takes over its ranks.",
        )
    again = f", for the {_ordinal(strikes + 1)} time on this node, but no spare is left" if strikes else ""
    return Restart(f"{_what(verdict)}{again}; all workers start again from the newest snapshot.")


def _stop_job(verdict: Verdict) -> Stop:
    if verdict.cause is Cause.BAD_INPUT:
        return Stop(
            ExitCode.BAD_INPUT, f"{_what(verdict)}: {_quote(verdict)}. A restart cannot help; correct it first."
        )
    return Stop(ExitCode.DO_NOT_RESTART, f"{_what(verdict)} and asked not to be restarted: {_quote(verdict)}.")


def _outside(verdict: Verdict, state: JobState, config: JobConfig) -> Action:
    """A verdict about a node that holds no ranks."""
    hopeful = state.with_status(NodeStatus.STARTING, NodeStatus.READY, NodeStatus.ACTIVE)
    left = [node for node in hopeful if node != verdict.node]
    if state.order or len(left) >= config.cluster.nodes:
        return Nothing(f"{_what(verdict)}, but the node holds no ranks; training is not touched.")
    return Stop(
        ExitCode.REQUEUE,
        f"{_what(verdict)} before training began; {len(left)} of {config.cluster.nodes} nodes are left and no spare. "
        "Run the same command again when the node is back.",
    )


def _crash_loop(verdict: Verdict, state: JobState) -> Stop | None:
    """The same failure at the same step in another generation: on two nodes if it is software's, else the third time.

    What comes from outside (a kill, a hang) may well strike two nodes at the same step by chance, so only the third
    time counts there. Nodes that are lost or taken away never count: a whole rack may go at one step, each node of it
    seen as an incident of its own, and every one costs a spare, of which there are only so many.
    """
    if verdict.cause in (Cause.NODE_LOST, Cause.PREEMPTED):
        return None
    same = [each for each in _earlier(state) if (each.fingerprint, each.step) == (verdict.fingerprint, verdict.step)]
    times = len({each.generation for each in same}) + 1
    nodes = {each.node for each in same if each.node} | ({verdict.node} if verdict.node else set())
    on_nodes = len(nodes) >= LOOP_NODES and verdict.cause in _SOFTWARE
    if not on_nodes and times < LOOP_TIMES:
        return None
    where = f"on {len(nodes)} different nodes ({', '.join(sorted(nodes))})" if len(nodes) > 1 else "on the same node"
    return Stop(
        ExitCode.DO_NOT_RESTART,
        f"The same failure happened {times} times at step {verdict.step}, {where}: {_quote(verdict)}. "
        "That is a bug or bad data rather than bad hardware, and another restart would end the same way. "
        "Read the incident's evidence, correct the code, the data or the configuration, then run the same command.",
    )


def _suspicious(verdict: Verdict, state: JobState) -> str:
    """A hint where so many nodes were lost in one step that the job itself may be what takes them down."""
    lost = {each.node for each in state.failures if (each.cause, each.step) == (Cause.NODE_LOST, verdict.step)}
    count = len(lost | {verdict.node})
    if verdict.cause is not Cause.NODE_LOST or count < LOOP_TIMES:
        return ""
    return f" {count} nodes were lost in this step: if they do not share a cause, see whether the job itself ends them."


def _strikes(verdict: Verdict, state: JobState) -> set[int]:
    """Earlier generations that ended because of this node, in a way that may be the node's fault."""
    if not verdict.node or verdict.cause not in _STRIKES:
        return set()
    return {each.generation for each in _earlier(state) if each.node == verdict.node and each.cause in _STRIKES}


def _earlier(state: JobState) -> list[Failure]:
    # A failure while a generation is still being gathered is about one that the state has no plan of yet.
    current = max([state.generation, *(each.generation for each in state.failures)])
    return [each for each in state.failures if each.generation < current]


def _what(verdict: Verdict) -> str:
    where = f" (rank {verdict.rank} on {verdict.node})" if verdict.rank >= 0 and verdict.node else ""
    if not where and verdict.node:
        where = f" ({verdict.node})"
    step = f" in step {verdict.step}" if verdict.step >= 0 else ""
    words = _WORDS[verdict.cause]
    return f"{words[0].upper()}{words[1:]}{where}{step}"


def _quote(verdict: Verdict) -> str:
    """The error in its own words: the evidence's second line is the message where a worker left one."""
    lines = verdict.evidence
    line = lines[1] if len(lines) > 1 and verdict.cause in _SOFTWARE else (lines[0] if lines else verdict.fingerprint)
    return line.removeprefix("log: ").rstrip(". ")


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
