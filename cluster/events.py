"""The journal's vocabulary: every fact, verdict and action, each with wall and monotonic time.

`events.jsonl` holds one of these a line, written by the supervisor alone; folding them in order (`cluster.state`)
gives the supervisor's state back after it was killed.
"""

from __future__ import annotations

import enum

import msgspec

from cluster.messages import Gather
from configs.shrinking import Layout
from health.verdict import Verdict
from trainer.events import Fact
from trainer.history import Ranges


class Place(enum.StrEnum):
    """What a node may be in a run, as far as earlier runs go: hold ranks, stand by as the last spares, or nothing."""

    MEMBER = "member"
    SPARE = "spare"
    OUT = "out"


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base: t_wall_s is seconds since the epoch, t_mono_s of this machine's monotonic clock."""

    t_wall_s: float
    t_mono_s: float


class RunStarted(Event, frozen=True, kw_only=True, tag="run_started"):
    """A supervisor began (attempt 1) or resumed (attempt > 1) the run. target_steps: where training ends.

    nodes: how many shall hold ranks; 0 in journals of before runs could shrink. sizes: whether they may be fewer.
    """

    run: str
    attempt: int
    supervisor_pid: int
    target_steps: int
    nodes: int = 0
    sizes: str = ""


class SupervisorTookOver(Event, frozen=True, kw_only=True, tag="supervisor_took_over"):
    """A new supervisor found the agents of a dead one alive and goes on with them."""

    supervisor_pid: int


class AgentStarted(Event, frozen=True, kw_only=True, tag="agent_started"):
    """The scheduler started an agent. handle: what the scheduler needs to find it again (local: pid and start time)."""

    node: str
    handle: str


class NodeReady(Event, frozen=True, kw_only=True, tag="node_ready"):
    """An agent reported in, warm: torch and the trainer are loaded in its fork server. hardware: see `NodeId`; life:
    see `AgentReport`."""

    node: str
    host: str
    pid: int
    hardware: tuple[str, ...] = ()
    life: str = ""


class NodeRemembered(Event, frozen=True, kw_only=True, tag="node_remembered"):
    """What earlier runs know of a node that this attempt may use, and the place that it gets for it.

    failures: weighed by how certain each was; failures_per_day: the rate to expect of it.
    """

    node: str
    place: Place
    reason: str
    failures: float
    node_days: float
    failures_per_day: float


class NodeReadmitted(Event, frozen=True, kw_only=True, tag="node_readmitted"):
    """A person gave a node back that this run had evicted."""

    node: str
    reason: str


class GenerationPlanned(Event, frozen=True, kw_only=True, tag="generation_planned"):
    """Ranks were handed out: node i of `nodes` holds ranks i*ranks_per_node .. ; ram_step -1: load from disk.

    gather: ranks whose shard of that snapshot is not in their node's own memory, and who has it. layout: the mesh over
    these nodes, None for the configuration's own.
    """

    generation: int
    nodes: tuple[str, ...]
    ranks_per_node: int
    store_host: str
    store_port: int
    ram_step: int
    reason: str
    ram_generation: int = -1
    gather: tuple[Gather, ...] = ()
    layout: Layout | None = None


class WorkersReported(Event, frozen=True, kw_only=True, tag="fact"):
    """A fact a worker or a snapshot store noticed (loaded, first step done, committed, skipped ...)."""

    fact: Fact


class VerdictGiven(Event, frozen=True, kw_only=True, tag="verdict"):
    """Something failed. t_failed_wall_s: the last sign of life before it, as far as known.

    verdict: the root; others: what else the policy knew of the same incident.
    """

    generation: int
    verdict: Verdict
    t_failed_wall_s: float
    incident: int
    others: tuple[Verdict, ...] = ()


class Back(msgspec.Struct, frozen=True, kw_only=True):
    """A history that was given up: what `generation` and earlier ones made after to_step must not be loaded again.

    step: where its trouble began. left_out: ranges (first, count) of batches that are never read from now on.
    """

    generation: int
    step: int
    to_step: int
    left_out: Ranges


class ActionTaken(Event, frozen=True, kw_only=True, tag="action"):
    """What the policy chose for an incident, its reason in plain words, and the facts that led to it, a line each.

    back: what a rollback means. order: the nodes that hold ranks from now on, where their number changes.
    """

    incident: int
    action: str
    reason: str
    node: str = ""
    spare: str = ""
    because: tuple[str, ...] = ()
    back: Back | None = None
    order: tuple[str, ...] = ()


class NodeEvicted(Event, frozen=True, kw_only=True, tag="node_evicted"):
    """The node gets no more work in this run."""

    node: str
    reason: str


class NodeFinished(Event, frozen=True, kw_only=True, tag="node_finished"):
    """All workers of the node ended well, at this step."""

    node: str
    generation: int
    step: int


class RunStopped(Event, frozen=True, kw_only=True, tag="run_stopped"):
    """The supervisor left: done (exit 0), asked to (75), or for a failure. last_step: newest finished step."""

    exit_code: int
    reason: str
    last_step: int


AnyEvent = (
    RunStarted | SupervisorTookOver | AgentStarted | NodeRemembered | NodeReadmitted | NodeReady | GenerationPlanned
    | WorkersReported | VerdictGiven | ActionTaken | NodeEvicted | NodeFinished | RunStopped
)  # fmt: skip
