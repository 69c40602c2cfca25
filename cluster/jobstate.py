"""What the supervisor knows of its run, and simple questions about it; `cluster.state` makes it from the journal."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from cluster.events import Place
from cluster.messages import AgentReport
from configs.shrinking import Layout
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import Fact
from trainer.history import Ranges, Refused

RESTARTING_ACTIONS = ("restart", "replace", "shrink", "rollback")
HARMLESS_ACTIONS = ("nothing", "evict")
EVICTING_ACTIONS = ("replace", "shrink", "evict")


class NodeStatus(enum.StrEnum):
    """A node's place in the run. `ready` is a spare: warm and without ranks."""

    STARTING = "starting"
    READY = "ready"
    ACTIVE = "active"
    EVICTED = "evicted"
    LOST = "lost"


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one node. handle: the scheduler's word for its agent, "" before it was started. life: see
    `cluster.messages.AgentReport`, "" before it spoke. judged: it was evicted on evidence, rather than as gone."""

    status: NodeStatus
    handle: str = ""
    host: str = ""
    pid: int = 0
    life: str = ""
    judged: bool = False


def life_of(node: NodeState | AgentReport) -> str:
    """Which of a node's agents it is; those of before there were lives are told apart by their process."""
    return node.life or str(node.pid)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One past verdict, as the policy remembers it. root: it was its incident's root cause."""

    generation: int
    incident: int
    node: str
    rank: int
    cause: Cause
    step: int
    fingerprint: str
    severity: Severity = Severity.WORKERS
    certainty: Certainty = Certainty.LIKELY
    t_wall_s: float = 0.0
    root: bool = True


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was evicted. judged: on evidence, rather than because it was gone anyway."""

    node: str
    incident: int
    t_wall_s: float
    judged: bool


class Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """What earlier runs know of a node, as this attempt was told when it began."""

    place: Place
    reason: str
    failures_per_day: float


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that failed. action is "" until the policy chose; open until a later generation finished a step."""

    number: int
    generation: int
    verdict: Verdict
    t_failed_wall_s: float
    t_verdict_wall_s: float
    action: str = ""
    reason: str = ""
    open: bool = True


class Resize(msgspec.Struct, frozen=True, kw_only=True):
    """The number of nodes that hold ranks became another one: when, how many since, and why."""

    t_wall_s: float
    nodes: int
    reason: str


class JobState(msgspec.Struct, frozen=True, kw_only=True):
    """The run as the journal tells it. Its mappings are never changed in place.

    order: the nodes by rank, node i holding ranks i*ranks_per_node and up; a chosen spare is in it as soon as the
    policy replaced a node. newest_step and committed
    (generation and step, oldest first; of a step, the newest): as far as the journal knows; metrics.jsonl may know
    more steps. rejected: snapshots (generation, step) that a loss has shown to be wrong. rollback_wanted: what workers
    wait for. rollbacks: steps at which the troubles began that the run went back from, since a person last had a turn.
    abandoned, left_out: what it gave up and leaves out by that, for ever, see `trainer.history`. recipe: the precision
    recipe that it went over to, for ever, "" as long as it is the configured one. exit_code is None while the run goes
    on. failures, evictions: kept since a person last had a turn. recoveries_s: from a verdict to the next generation's
    first step, the newest. step_s: the length of a step by the journal, None if not known yet; it is
    counted from pace_from (step, time) of the generation.

    wanted_nodes: how many shall hold ranks, 0 if the journal does not say. layout: the mesh that they hold, None for
    the configuration's own. resizes: the newest changes of their number, a start with fewer than wanted among them.
    proven_size: whether a step was finished since the last one. growing: who will hold ranks once all have saved.
    evicted_at: when nodes that are evicted were, by the wall clock. former: agents (node and life, see `life_of`) that
    were evicted before their nodes came back.
    """

    run: str = ""
    attempt: int = 0
    target_steps: int = 0
    supervisor_pid: int = 0
    nodes: Mapping[str, NodeState] = {}
    generation: int = 0
    order: tuple[str, ...] = ()
    ranks_per_node: int = 0
    ram_step: int = -1
    rejected: tuple[tuple[int, int], ...] = ()
    rollback_wanted: Fact | None = None
    rollbacks: tuple[int, ...] = ()
    abandoned: tuple[tuple[int, int], ...] = ()
    left_out: Ranges = ()
    recipe: str = ""
    restarts_used: int = 0
    incidents: tuple[Incident, ...] = ()
    failures: tuple[Failure, ...] = ()
    evictions: tuple[Eviction, ...] = ()
    remembered: Mapping[str, Remembered] = {}
    recoveries_s: tuple[float, ...] = ()
    step_s: float | None = None
    pace_from: tuple[int, float] | None = None
    finished: frozenset[str] = frozenset()
    committed: tuple[tuple[int, int], ...] = ()
    newest_step: int = 0
    wanted_nodes: int = 0
    layout: Layout | None = None
    resizes: tuple[Resize, ...] = ()
    proven_size: bool = True
    growing: tuple[str, ...] = ()
    former: frozenset[tuple[str, str]] = frozenset()
    evicted_at: Mapping[str, float] = {}
    exit_code: int | None = None
    stop_reason: str = ""

    @property
    def refused(self) -> Refused:
        """Snapshots that must not be loaded."""
        return Refused(self.rejected, self.abandoned)

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The steps of the committed snapshots, the oldest first."""
        return tuple(step for _, step in self.committed)

    @property
    def newest_age(self) -> tuple[int, int]:
        """The newest committed snapshot's generation and step, (-1, -1) if there is none."""
        return self.committed[-1] if self.committed else (-1, -1)

    @property
    def newest_snapshot(self) -> int:
        """The newest committed snapshot's step, -1 if there is none."""
        return self.newest_age[1]

    @property
    def open_incidents(self) -> tuple[Incident, ...]:
        """Incidents from which the run has not recovered yet."""
        return tuple(incident for incident in self.incidents if incident.open)

    @property
    def next_incident(self) -> int:
        """The number that the next incident gets; the first is 1."""
        return max((incident.number for incident in self.incidents), default=0) + 1

    @property
    def spares(self) -> tuple[str, ...]:
        """Nodes that could take over ranks, by name: those that are ready, then those still starting; in each, those
        last that earlier runs speak against."""
        ready, starting = self.with_status(NodeStatus.READY), self.with_status(NodeStatus.STARTING)
        candidates = [*sorted(ready, key=self.doubtful.__contains__), *sorted(starting, key=self.doubtful.__contains__)]
        taken = frozenset(self.order)
        return tuple(name for name in candidates if name not in taken)

    @property
    def doubtful(self) -> frozenset[str]:
        """Nodes that should hold no ranks as long as others can."""
        return frozenset(name for name, what in self.remembered.items() if what.place is not Place.MEMBER)

    @property
    def evicted(self) -> tuple[str, ...]:
        """Nodes that get no more work in this run."""
        return self.with_status(NodeStatus.EVICTED)

    def with_status(self, *statuses: NodeStatus) -> tuple[str, ...]:
        """Names of the nodes in one of the statuses, sorted."""
        return tuple(sorted(name for name, node in self.nodes.items() if node.status in statuses))

    def status(self, node: str) -> NodeStatus | None:
        """A node's status; None for a node never heard of."""
        known = self.nodes.get(node)
        return None if known is None else known.status
