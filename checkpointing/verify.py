"""Snapshots of a run as a person sees them: what there is, and whether it can be trusted. No torch here."""

from __future__ import annotations

from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.keep import kept_info
from checkpointing.layout import Manifest, SnapshotDamagedError
from checkpointing.marks import is_marked


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a listing. problem: what is visibly wrong (shards are not read), "" if nothing is.

    verified: whether every shard was read back from the disk after it was written. validation_loss: None if it was not
    measured. A damaged manifest leaves only step and problem known; the rest is None.
    """

    step: int
    problem: str = ""
    generation: int | None = None
    world_size: int | None = None
    mesh: dict[str, int] | None = None
    size_bytes: int | None = None
    t_wall_s: float | None = None
    validation_loss: float | None = None
    verified: bool = False


def list_snapshots(run_dir: Path) -> list[SnapshotInfo]:
    """Committed snapshots of a run, newest (generation, step) first. Reads manifests and file sizes, no shard."""
    return [_info(run_dir, step) for _, step in disk.committed_ages(run_dir)]


def committed_generation(run_dir: Path, step: int) -> int:
    """Which generation wrote the step's manifest; -1 if there is none or it is damaged. Shards are not looked at."""
    return disk.read_generation(run_dir, step)


def verify_snapshot(run_dir: Path, step: int) -> list[str]:
    """Read every byte of a snapshot; one line a problem, each naming its file. No line: it is whole."""
    try:
        manifest = disk.read_manifest(run_dir, step)
    except SnapshotDamagedError as error:
        return [str(error)]
    problems = (disk.shard_problem(run_dir, step, shard) for shard in manifest.shards)
    return [problem for problem in problems if problem is not None]


def _info(run_dir: Path, step: int) -> SnapshotInfo:
    try:
        manifest = disk.read_manifest(run_dir, step)
    except SnapshotDamagedError as error:
        return SnapshotInfo(step=step, problem=str(error))
    problems = (disk.size_problem(run_dir, step, shard) for shard in manifest.shards)
    problem = next((problem for problem in problems if problem), "")
    return describe(manifest, problem, not problem and is_marked(disk.step_dir(run_dir, step), manifest))


def describe(manifest: Manifest, problem: str = "", verified: bool = False) -> SnapshotInfo:
    """The line of a listing for a manifest, wherever it lies."""
    return SnapshotInfo(
        step=manifest.step,
        problem=problem,
        generation=manifest.generation,
        world_size=manifest.world_size,
        mesh=manifest.mesh,
        size_bytes=sum(shard.size_bytes for shard in manifest.shards),
        t_wall_s=manifest.t_wall_s,
        validation_loss=kept_info(manifest).validation_loss,
        verified=verified,
    )
