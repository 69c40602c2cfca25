"""What is to be sent to the bucket, derived from what lies in the run directory and in the bucket. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from checkpointing.keep import KeptInfo, kept_steps
from checkpointing.layout import Manifest, Shard
from configs.schema import S3Config


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is to upload: the shards of its ranks; the node with rank 0 also commits and keeps house.

    last_step: training's last one, sent whether or not the interval divides it.
    """

    ranks: frozenset[int]
    generation: int
    world_size: int
    last_step: int

    @property
    def commits(self) -> bool:
        """Whether this node writes manifests."""
        return 0 in self.ranks

    def owns(self, rank: int) -> bool:
        """Whether a shard is this node's to upload, even if it was written when there were more ranks."""
        return rank % self.world_size in self.ranks

    def shards(self, manifest: Manifest) -> list[Shard]:
        """A snapshot's shards that are this node's."""
        return [shard for shard in manifest.shards if self.owns(shard.rank)]

    def wants(self, manifest: Manifest, interval_steps: int) -> bool:
        """Whether a snapshot of the run directory belongs in the bucket at all. One of a newer generation than the
        node's own is for others: this node may be an orphan."""
        on_time = manifest.step % interval_steps == 0 or manifest.step == self.last_step
        return on_time and manifest.generation <= self.generation


def due_snapshots(
    wanted: Iterable[Manifest], committed: Collection[tuple[int, int]], settings: S3Config
) -> list[Manifest]:
    """Those of the wanted snapshots that are still to be sent, newest first.

    committed: (generation, step) of what the bucket has. What retention would remove at once is not sent (after an
    outage the newest come first, and the rest only as far as it would stay), nor what the fence would refuse: the
    bucket has a newer generation.
    """
    newest_generation = max((generation for generation, _ in committed), default=-1)
    candidates = [
        manifest
        for manifest in wanted
        if manifest.generation >= newest_generation and (manifest.generation, manifest.step) not in committed
    ]
    newest: dict[int, int] = {}
    for generation, step in [*committed, *((m.generation, m.step) for m in candidates)]:
        newest[step] = max(generation, newest.get(step, -1))
    infos = [KeptInfo(step=step, generation=generation) for step, generation in newest.items()]
    kept = kept_steps(infos, settings.keep_last, settings.keep_every_steps, 0)
    due = [manifest for manifest in candidates if manifest.step in kept]
    return sorted(due, key=lambda manifest: (manifest.generation, manifest.step), reverse=True)


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """Growing random pauses between attempts: doubled each time up to a cap, the upper half of it by chance."""

    first_s: float = 1.0
    cap_s: float = 30.0

    def pause_s(self, failures: int, chance: float) -> float:
        """The pause after that many failures in a row (1 or more). chance: from 0 to 1."""
        whole_s = min(self.cap_s, self.first_s * 2.0 ** min(failures - 1, 30))
        return whole_s * (0.5 + 0.5 * chance)
