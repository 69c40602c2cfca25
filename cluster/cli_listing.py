"""`everstep checkpoint ls`: one table of the snapshots in every tier that this machine sees."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

if TYPE_CHECKING:
    from checkpointing.holdings import Holding
    from checkpointing.s3 import Bucket
    from checkpointing.verify import SnapshotInfo
    from cluster.rundir import RunDir
    from configs.schema import JobConfig

_COLUMNS = ("tier", "step", "generation", "ranks", "mesh", "size", "when", "loss", "verified")


def print_listing(run_dir: RunDir, config: JobConfig, bucket: Bucket | None, console: Console) -> bool:
    """Print it; whether S3 could not be reached."""
    from checkpointing.sources import SourceError
    from checkpointing.verify import describe, list_snapshots

    table = Table(*_COLUMNS, box=None)
    for holding in _on_this_machine(run_dir, config):
        table.add_row(*_holding_row(holding))
    for info in list_snapshots(run_dir.path):
        table.add_row("run", *_info_row(info, "yes" if info.verified else "not yet"))
    trouble = ""
    if bucket is not None:
        try:
            found = [describe(manifest) for manifest in bucket.manifests().values()]
        except SourceError as error:
            found, trouble = [], str(error)
        for info in sorted(found, key=lambda info: (info.generation or 0, info.step), reverse=True):
            table.add_row("s3", *_info_row(info, "by S3"))
    console.print(table)
    if trouble:
        console.print(f"S3 cannot be reached: {trouble}", markup=False, highlight=False)
    return bool(trouble)


def _on_this_machine(run_dir: RunDir, config: JobConfig) -> list[Holding]:
    from checkpointing.holdings import disk_holdings, memory_holdings, node_disks
    from checkpointing.layout import Tier
    from trainer.paths import copies_dir, segments_dir

    root = run_dir.ram_root(config.checkpoint.ram_dir)
    nodes = sorted(root.iterdir()) if root.is_dir() else []
    slots = [path for node in nodes for path in segments_dir(node).glob("snapshot-*.seg")]
    copies = [path for node in nodes for path in copies_dir(node).glob("copy-*.seg")]
    disks = node_disks(run_dir.node_root(config.checkpoint.node_dir)) if config.checkpoint.node_dir else []
    return [*memory_holdings(slots, Tier.RAM), *memory_holdings(copies, Tier.PEER), *disk_holdings(disks)]


def _holding_row(holding: Holding) -> list[str]:
    whole = len(holding.ranks) == holding.world_size
    ranks = str(holding.world_size) if whole else f"{len(holding.ranks)} of {holding.world_size}"
    names = [str(holding.tier), str(holding.step), str(holding.generation), ranks]
    return [*names, "", decimal(holding.size_bytes), "", "", "not read"]


def _info_row(info: SnapshotInfo, verified: str) -> list[str]:
    if info.generation is None or info.world_size is None or info.mesh is None or info.t_wall_s is None:
        return [str(info.step), "", "", "", "", "", "", info.problem]
    return [
        str(info.step),
        str(info.generation),
        str(info.world_size),
        " ".join(f"{axis}{degree}" for axis, degree in info.mesh.items() if degree > 1) or "1",
        decimal(info.size_bytes or 0),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.t_wall_s)),
        "" if info.validation_loss is None else f"{info.validation_loss:.4f}",
        info.problem or verified,
    ]
