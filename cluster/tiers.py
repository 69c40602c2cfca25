"""A node's snapshots in every tier, as the agent runs them: wires what `checkpointing` has to facts and orders.

Part of the agent's composition root; no torch here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointing.copies import CopyStore, Located
from checkpointing.gather import Gathered, Gatherer, Need
from checkpointing.layout import ShardRef
from checkpointing.persister import Persister
from checkpointing.ratelimit import RateLimit
from checkpointing.replicator import CopyEvent, Replicator
from checkpointing.store import NodeStore, StoreEvent, StoreEventKind
from checkpointing.transfer_probe import PROBE_REF, make_probe, measure
from checkpointing.transfer_server import TransferServer
from cluster.agent import AgentState
from cluster.measuring import Measurer
from cluster.messages import Assignment, HeldInfo, Order, PeerAt, Rescue
from cluster.rundir import RunDir
from configs.schema import JobConfig
from health.network import Way
from trainer.events import Fact, FactKind
from trainer.paths import copies_dir, segments_dir, transfer_key_path

if TYPE_CHECKING:
    from checkpointing.s3_upload import Uploader

_MB = 1e6
_MEASURE_TIMEOUT_S = 5.0
_STORE_FACTS = {
    StoreEventKind.COMMITTED: FactKind.SNAPSHOT_COMMITTED,
    StoreEventKind.FAILED: FactKind.SNAPSHOT_FAILED,
}


class NodeTiers:
    """Everything of a node that keeps, sends and fetches snapshots. Its folders must exist before `open`."""

    def __init__(self, run_dir: RunDir, config: JobConfig, node: str, ram_dir: Path, state: AgentState) -> None:
        policy, key = config.checkpoint, transfer_key_path(run_dir.path).read_bytes()
        segments = segments_dir(ram_dir)
        limit = RateLimit(policy.peer_max_mb_per_s * _MB) if policy.peer_max_mb_per_s else None
        self.config = config
        self.node = node
        self.state = state
        self.generation = 0
        # Whoever keeps them may come up later than the workers: these must wait from then on, too.
        self.may_send_copies = policy.peer_copies > 0 and config.cluster.nodes + config.cluster.spares > 1
        self.node_dir = run_dir.node_root(policy.node_dir) / node if policy.node_dir else None
        self.store = NodeStore(
            segments, run_dir.path, policy.keep_last, policy.keep_every_steps, self.node_dir, policy.keep_best
        )
        self.copies = CopyStore(copies_dir(ram_dir))
        self.server = TransferServer(state.host, key, self.find, self.copies)
        self.key = key
        self.measurer = Measurer(self._way_from, state.measured)
        self._probe: Located | None = None
        self._rescued: Rescue | None = None
        self._probe_lock = threading.Lock()
        self.replicator = Replicator(segments, key, policy.peer_interval_steps, limit, self._on_copies)
        self.gatherer = Gatherer(self.store, self.copies, key, ram_dir, state.wants_restart)
        self.persister = Persister(self.store, self._on_store)
        self.uploads = _uploads(run_dir.path, config, self.note)

    def open(self) -> None:
        """Begin to serve, to send and to write."""
        self.state.peer_address = f"{self.state.host}:{self.server.start()}"
        self.persister.start()
        self.replicator.start()
        if self.uploads is not None:
            self.uploads.start()

    def close(self, remove: bool = True) -> None:
        """End all of it, and free what is in memory, unless that is another agent's by now."""
        self.replicator.stop()
        self.server.close()
        self.persister.stop()
        if self.uploads is not None:
            self.uploads.stop()
        if remove:
            self.copies.close()
            self.store.close()

    def fence(self) -> None:
        """This node was given up: nothing of it is written, committed or sent any more. Waits for nothing."""
        self.store.fence()
        self.persister.end()
        self.replicator.end()
        if self.uploads is not None:
            self.uploads.stop(timeout_s=0.0)

    def inventory(self) -> Sequence[HeldInfo]:
        """The shards on this node, verified; called only while no worker runs."""
        held = [*self.store.inventory(), *self.copies.held()]
        return [HeldInfo(s.rank, s.world_size, s.step, s.generation, s.tier.value) for s in held]

    def find(self, ref: ShardRef) -> Located | None:
        """Where a shard that a peer asks for lies on this node; who measures the way here gets bytes of no meaning."""
        if ref == PROBE_REF:
            return self._probe_bytes()
        return self.copies.find(ref) or self.store.find(ref)

    def _probe_bytes(self) -> Located:
        with self._probe_lock:
            if self._probe is None:
                self._probe = make_probe()
            return self._probe

    def _way_from(self, peer: PeerAt, for_s: float) -> Way:
        found = measure(peer.address, self.key, for_s, _MEASURE_TIMEOUT_S)
        return Way(
            source=peer.node, target=self.node, problem=found.problem, latency_s=found.latency_s,
            mb_per_s=found.mb_per_s,
        )  # fmt: skip

    def obey(self, order: Order) -> None:
        """The supervisor spoke: copies go to these, and are taken of no history older than the plan's."""
        self.measurer.obey(order.measure)
        self._rescue(order)
        self.replicator.send_to(order.copy_to)
        self.copies.keep_for(order.keep_for)
        if order.plan is not None:
            plan = order.plan
            self.store.follow(plan.generation)
            base = (plan.ram_generation, plan.ram_step)
            self.replicator.go_on_from(base, plan.generation)
            self.copies.forget_before(plan.ram_generation if plan.ram_step >= 0 else plan.generation)
            if plan.ram_step >= 0:
                self.copies.go_on_from(base, plan.generation)

    def _rescue(self, order: Order) -> None:
        """Have shards written that others will need; orders repeat themselves, and each counts once.

        What an earlier one asked for is over: it must not be committed beside what the job has gone on from since.
        """
        wanted = order.rescue
        if wanted == self._rescued:
            return
        self._rescued = wanted
        self.store.drop_rescues()
        if wanted is None:
            return
        # In a new attempt this node has followed no plan yet, and the fence would take it for one that was cut off.
        self.store.follow(order.target_generation - 1)
        for rank in wanted.ranks:
            located = self.find(ShardRef(wanted.generation, wanted.step, rank))
            if located is not None:
                self.store.rescue(located)
            else:
                words = f"the shard of rank {rank} is not here any more"
                self.note(FactKind.SNAPSHOT_FAILED, wanted.step, words, rank, generation=wanted.generation)

    def begin(self, plan: Assignment, order: Order) -> None:
        """Before the plan's workers start: bring into memory what they lack, and see to this node's part of uploads."""
        self.generation = plan.generation
        ranks = plan.ranks
        if self.uploads is not None:
            self.uploads.serve(ranks, plan.generation, plan.world_size, self.config.training.steps)
        needs = [
            Need(ShardRef(plan.ram_generation, plan.ram_step, s.rank), s.rank - ranks.start, s.addresses)
            for s in order.gather
        ]
        if needs and order.plan == plan:
            self.gatherer.gather(needs, self._on_gathered)

    def flush(self, timeout_s: float) -> None:
        """Wait until what is to be written and sent has been, within bounds."""
        deadline_s = time.monotonic() + timeout_s
        self.persister.flush(timeout_s)
        if self.uploads is not None and not self.uploads.flush(max(0.0, deadline_s - time.monotonic())):
            words = "the bucket lacks the newest snapshots; `everstep checkpoint push` sends them when it is back"
            self.note(FactKind.TIER_BEHIND, -1, words)

    def note(
        self, kind: FactKind, step: int, detail: str, rank: int = -1, seconds: float = 0.0, generation: int = -1
    ) -> None:
        """Tell the supervisor a fact; generation: of the snapshot, if it is not the plan's."""
        fact = Fact(
            kind=kind, node=self.node, rank=rank, generation=self.generation if generation < 0 else generation,
            step=step, t_wall_s=time.time(), detail=detail, seconds=seconds,
        )  # fmt: skip
        self.state.note(fact)

    def _on_store(self, event: StoreEvent) -> None:
        if event.kind in _STORE_FACTS:
            kind = _STORE_FACTS[event.kind]
            self.note(kind, event.step, event.detail, event.rank, event.seconds, event.generation)

    def _on_copies(self, event: CopyEvent) -> None:
        kind = FactKind.TIER_BEHIND if event.behind else FactKind.TIER_CAUGHT_UP
        words = f"copies on peers fall behind: {event.detail}" if event.behind else "copies on peers are complete again"
        self.note(kind, event.step, words, rank=event.rank, generation=event.generation)

    def _on_gathered(self, result: Gathered) -> None:
        ref = result.need.ref
        if result.problem:
            self.note(FactKind.SNAPSHOT_FAILED, ref.step, f"shard of rank {ref.rank} not had: {result.problem}")
        else:
            detail = f"shard of rank {ref.rank} from {result.origin}, {result.size_bytes / _MB:,.1f} MB"
            self.note(FactKind.GATHERED, ref.step, detail, rank=ref.rank, seconds=result.seconds)


def _uploads(run_dir: Path, config: JobConfig, note: Callable[..., None]) -> Uploader | None:
    """The uploader, if there is a bucket: boto3 is loaded only then."""
    if not config.s3.bucket:
        return None
    from checkpointing.s3 import Bucket
    from checkpointing.s3_upload import Uploader, UploadEvent, UploadEventKind

    kinds = {
        UploadEventKind.COMMITTED: FactKind.SNAPSHOT_IN_S3,
        UploadEventKind.BEHIND: FactKind.TIER_BEHIND,
        UploadEventKind.CAUGHT_UP: FactKind.TIER_CAUGHT_UP,
        UploadEventKind.FAILED: FactKind.TIER_BEHIND,
    }

    def report(event: UploadEvent) -> None:
        note(kinds[event.kind], event.step, event.detail, seconds=event.seconds, generation=event.generation)

    return Uploader(Bucket(config.s3, config.run.name), run_dir, config.s3, report)
