"""What agents and the supervisor say to each other.

The protocol is level-triggered: an agent reports its whole state, at every heartbeat and at once when it changes; the
supervisor answers with the whole of what it wants. A lost message, a restarted supervisor or a repeated report
therefore need no special case: the next pair of messages says everything again.

What each report has many of goes without names of fields and without the garbage collector (nothing in a message refers
back): a supervisor reads thousands of reports a second.
"""

from __future__ import annotations

import enum
from typing import TypeVar

import msgspec

from configs.shrinking import Layout
from health.examination import Machine
from health.network import Way
from health.verdict import Verdict
from trainer.events import Beat, Fact, StepTimes, WorkerError


class AgentStatus(enum.StrEnum):
    """What an agent is doing."""

    READY = "ready"
    RUNNING = "running"
    FINISHED = "finished"


class RankBeat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The newest heartbeat of one rank and its process' state letter in /proc (R, S, D, T, Z)."""

    rank: int
    pid: int
    process_state: str
    beat: Beat | None


class HeldInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A verified shard of a snapshot that a node holds; tier: `ram`, `peer` (another node's) or `node` (its disk)."""

    rank: int
    world_size: int
    step: int
    generation: int
    tier: str = "ram"


class Readiness(msgspec.Struct, frozen=True, gc=False):
    """The node could start workers now: where its fresh store listens, and which shards it holds.

    ready_for: the generation this was said for; an older answer is stale.
    """

    ready_for: int
    store_host: str
    store_port: int
    held: tuple[HeldInfo, ...]


class WorkerExit(msgspec.Struct, frozen=True, kw_only=True):
    """A worker ended badly. exit_code is None when a signal ended it.

    oom_scope: where the kernel counted the OOM kill, "" if it was none. ram_free_bytes: what was left in the node's
    shared memory then, -1 for not known.
    """

    rank: int
    generation: int
    exit_code: int | None
    signal_number: int | None
    error: WorkerError | None
    log_tail: tuple[str, ...]
    oom_kill: bool
    t_wall_s: float
    oom_scope: str = ""
    ram_free_bytes: int = -1


class NumberedFact(msgspec.Struct, frozen=True):
    """A fact and its number in the agent's life: repeated until acknowledged, journalled once."""

    number: int
    fact: Fact


class NumberedVerdict(msgspec.Struct, frozen=True):
    """A verdict that the agent itself gave about its node, numbered like a fact.

    generation: of the workers that ran there last, 0 if there were none yet.
    """

    number: int
    verdict: Verdict
    t_wall_s: float
    generation: int = 0


class RankTimes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where the time of a rank's newest steps went, oldest first; later reports repeat some of them."""

    rank: int
    steps: tuple[StepTimes, ...]


class Evidence(msgspec.Struct, frozen=True):
    """What an agent collected from its workers while they still lived: files by name, for request `number`."""

    number: int
    files: dict[str, bytes]


class PeerAt(msgspec.Struct, frozen=True):
    """A node and the `host:port` where it serves copies."""

    node: str
    address: str


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """Measure the way from these peers, for for_s seconds each (0: only whether they answer)."""

    number: int
    peers: tuple[PeerAt, ...]
    for_s: float


class Measured(msgspec.Struct, frozen=True):
    """The answer to `Measure` with this number."""

    number: int
    ways: tuple[Way, ...]


class AgentReport(msgspec.Struct, frozen=True, kw_only=True, tag="report", gc=False):
    """An agent's whole state.

    generation: the one its workers last ran in (0: none yet). peer_address: `host:port` where it serves and takes
    copies of snapshots, "" for nowhere. domain: what it shares its fate with, a rack or a power line; "" for nothing.
    notice: why this node must go soon, "" if it need not. hardware: what makes the node this one (UUIDs of its GPUs).
    life: drawn at random by each agent, since in a container all have the same pid. verdicts: what this node's own
    probes found. times: see `RankTimes`. evidence: the answer to `Order.collect`, repeated until something else is
    asked. sent_wall_s: this node's clock. machine: what must be alike on all nodes, None while it is not known or
    workers run. measured: the answer to `Order.measure`.
    """

    node: str
    host: str
    pid: int
    seq: int
    status: AgentStatus
    generation: int
    finished_step: int
    readiness: Readiness | None
    beats: tuple[RankBeat, ...]
    exits: tuple[WorkerExit, ...]
    facts: tuple[NumberedFact, ...]
    peer_address: str = ""
    domain: str = ""
    notice: str = ""
    hardware: tuple[str, ...] = ()
    verdicts: tuple[NumberedVerdict, ...] = ()
    times: tuple[RankTimes, ...] = ()
    evidence: Evidence | None = None
    sent_wall_s: float = 0.0
    machine: Machine | None = None
    measured: Measured | None = None
    life: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Who is which rank in a generation: node i of nodes holds ranks i*ranks_per_node and up.

    ram_step, ram_generation: the snapshot that every rank finds in its node's memory once the node has gathered what
    it lacks; -1: there is none, load from further away. layout: the mesh over these nodes; None: the configuration's.
    """

    generation: int
    nodes: tuple[str, ...]
    ranks_per_node: int
    store_host: str
    store_port: int
    ram_step: int
    ram_generation: int = -1
    layout: Layout | None = None


class Assignment(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A plan as one agent gets it: the node is number `place` of `nodes` nodes, or, with -1, has no ranks in it.

    The other nodes' names are nothing it needs: with them, telling n nodes would take n x n names.
    """

    generation: int
    place: int
    nodes: int
    ranks_per_node: int
    store_host: str
    store_port: int
    ram_step: int
    ram_generation: int = -1
    layout: Layout | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks of the whole plan."""
        return self.nodes * self.ranks_per_node

    @property
    def ranks(self) -> range:
        """The ranks that the node holds."""
        first = max(self.place, 0) * self.ranks_per_node
        return range(first, first + self.ranks_per_node) if self.place >= 0 else range(0)


class Gather(msgspec.Struct, frozen=True):
    """A shard that a node's rank needs in memory before it starts, and which nodes have it (nearest first)."""

    rank: int
    nodes: tuple[str, ...]


class Sources(msgspec.Struct, frozen=True):
    """A `Gather` as an agent gets it: addresses instead of names; none: it is on the node itself."""

    rank: int
    addresses: tuple[str, ...]


class Rescue(msgspec.Struct, frozen=True, gc=False):
    """A snapshot that only nodes hold is wanted in the run directory: this node writes the shards of these ranks.

    number: drawn at random each time it is wanted, so that who failed once tries again when asked again.
    """

    generation: int
    step: int
    ranks: tuple[int, ...]
    number: int = 0


class Wish(enum.StrEnum):
    """What the supervisor wants of an agent beside the plan."""

    RUN = "run"
    SAVE_AND_LEAVE = "save_and_leave"
    SHUT_DOWN = "shut_down"


class Order(msgspec.Struct, frozen=True, kw_only=True, tag="order", gc=False):
    """The whole of what the supervisor wants. An agent with an older generation stops its workers.

    copy_to: who keeps copies of this node's snapshots. keep_for: ranks whose copies this node keeps. gather: what to
    fetch before starting the plan's workers. rescue: what to write before there is a plan. rejected: snapshots
    (generation, step) that must not be loaded; abandoned, left_out: histories that were given up, and batches that are
    not read, see `trainer.history`. collect: the number of the newest request for evidence about this generation's
    workers, 0 for none. measure: what ways to measure now. heard_wall_s: `AgentReport.sent_wall_s` of the newest
    report; sent_wall_s: the supervisor's clock. recipe: what the precision recipe was lowered to, "" for the configured
    one.
    """

    ack_seq: int
    wish: Wish
    target_generation: int
    plan: Assignment | None
    copy_to: tuple[str, ...] = ()
    keep_for: tuple[int, ...] = ()
    gather: tuple[Sources, ...] = ()
    rescue: Rescue | None = None
    rejected: tuple[tuple[int, int], ...] = ()
    abandoned: tuple[tuple[int, int], ...] = ()
    left_out: tuple[tuple[int, int], ...] = ()
    collect: int = 0
    measure: Measure | None = None
    heard_wall_s: float = 0.0
    sent_wall_s: float = 0.0
    recipe: str = ""


def dismissal(generation: int) -> Order:
    """What an agent is told that is not wanted any more; generation: the newest there is."""
    return Order(ack_seq=0, wish=Wish.SHUT_DOWN, target_generation=generation, plan=None)


Message = AgentReport | Order
MAX_MESSAGE_BYTES = 4 << 20

_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()
_report_decoder = msgspec.msgpack.Decoder(AgentReport)
_order_decoder = msgspec.msgpack.Decoder(Order)


def encode(message: Message) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def decode_report(data: bytes) -> AgentReport:
    """Decode what an agent sent.

    Raises:
        ValueError: if it is not a well-formed report (msgspec's errors are ValueErrors).
    """
    return _decode(data, _report_decoder)


def decode_order(data: bytes) -> Order:
    """Decode what the supervisor sent.

    Raises:
        ValueError: if it is not a well-formed order.
    """
    return _decode(data, _order_decoder)


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(data)
    except RecursionError:
        raise ValueError("a message is nested too deeply") from None
