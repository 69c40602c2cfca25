"""What a person does with snapshots: repair, pull, push, remove. It works beside a running job. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointing import disk
from checkpointing.candidates import read_candidate
from checkpointing.layout import (
    MANIFEST_NAME,
    Manifest,
    ShardMeta,
    SnapshotDamagedError,
    decode_document,
    sidecar_name,
)
from checkpointing.repair import Progress, Repair, Repairer
from checkpointing.retention import commit_pulled, remove_snapshot
from checkpointing.sources import ShardSource, SnapshotSource, SourceError
from checkpointing.verify import list_snapshots, verify_snapshot

if TYPE_CHECKING:
    from checkpointing.s3 import Bucket


def repair_snapshot(
    run_dir: Path, step: int, sources: Sequence[ShardSource], far: SnapshotSource | None,
    repaired: Callable[[Repair], None], progress: Callable[[int, int], None],
) -> list[str]:  # fmt: skip
    """Read every byte of a snapshot of the run directory and fetch what is wrong; returns what stays wrong, in lines.

    Its manifest can only come from `far`, and only if what is here of the snapshot agrees with it: nothing good is
    replaced by another run's. repaired: hears of each shard that was fetched.
    """
    try:
        data, manifest = read_candidate(run_dir, far, (disk.named_generation(run_dir, step), step))
        if far is not None and disk.read_generation(run_dir, step) < 0:
            _check_same_history(run_dir, manifest, far.name)
    except SnapshotDamagedError as error:
        return [str(error)]
    return _complete(run_dir, manifest, data, _with_far(sources, far), repaired, progress)


def pull_snapshot(
    run_dir: Path, step: int, far: SnapshotSource, sources: Sequence[ShardSource],
    repaired: Callable[[Repair], None], progress: Callable[[int, int], None],
) -> list[str]:  # fmt: skip
    """Bring a snapshot of `far` into the run directory, every byte verified, its manifest last.

    Returns what could not be had, in lines; then there is no manifest.

    Raises:
        ValueError: if the run directory has that step from a later generation.
        SourceError: if `far` has no such snapshot or cannot be reached.
    """
    ages = [age for age in far.committed() if age[1] == step]
    if not ages:
        raise SourceError(f"{far.name} has no snapshot of step {step}; it has {_steps(far) or 'none'}")
    here = disk.read_generation(run_dir, step)
    if here > ages[0][0]:
        raise ValueError(
            f"the run directory has step {step} of generation {here}, {far.name} an older one, of {ages[0][0]}: "
            "remove the newer one first if that is what you want"
        )
    try:
        data, manifest = read_candidate(run_dir, far, ages[0])
    except SnapshotDamagedError as error:
        return [str(error)]
    return _complete(run_dir, manifest, data, _with_far(sources, far), repaired, progress)


def push_snapshot(run_dir: Path, step: int, bucket: Bucket, progress: Callable[[int, int], None]) -> int:
    """Send a snapshot of the run directory to a bucket, its manifest last; returns the bytes that had to be sent.

    Raises:
        SnapshotDamagedError: if it is damaged here: nothing of a damaged snapshot is committed.
        ValueError: if the bucket has something newer in its place.
        SourceError: if the bucket cannot be reached.
    """
    from checkpointing.s3_commit import final_problem

    data = _manifest_bytes(run_dir, step)
    manifest = disk.read_manifest(run_dir, step)
    if refused := final_problem(bucket, manifest, data):
        raise ValueError(refused)
    count = Progress(progress)
    for shard in manifest.shards:
        count.expect(shard.size_bytes)
    sent_bytes = 0
    for shard in manifest.shards:
        path = disk.step_dir(run_dir, step) / shard.file
        if problem := disk.size_problem(run_dir, step, shard):
            raise SnapshotDamagedError(problem)
        sent_bytes += bucket.upload(path, step, shard.file, checksum=shard.checksum)
        count.add(shard.size_bytes)
    if refusal := bucket.refusal(manifest, data):
        raise ValueError(str(refusal))
    return sent_bytes


def last_good_is_among(run_dir: Path, steps: Collection[int]) -> bool:
    """Whether no snapshot that verifies would be left without these. Reads until it finds one."""
    rest = [info.step for info in list_snapshots(run_dir) if info.step not in steps and not info.problem]
    return not any(verify_snapshot(run_dir, step) == [] for step in rest)


def last_good_in_bucket_is_among(bucket: Bucket, steps: Collection[int]) -> bool:
    """Whether no snapshot whose shards are all there would be left in a bucket without these. SourceError."""
    from checkpointing.s3_commit import missing_shards

    rest = [manifest for step, manifest in bucket.manifests().items() if step not in steps]
    return all(missing_shards(bucket, manifest) for manifest in rest)


def remove_snapshots(run_dir: Path, steps: Collection[int]) -> None:
    """Remove snapshots from the run directory, each manifest first. OSError if the file system refuses."""
    for step in sorted(set(steps)):
        remove_snapshot(run_dir, step)


def _complete(
    run_dir: Path, manifest: Manifest, data: bytes, sources: Sequence[ShardSource],
    repaired: Callable[[Repair], None], progress: Callable[[int, int], None],
) -> list[str]:  # fmt: skip
    folder = disk.step_dir(run_dir, manifest.step)
    committed = disk.read_generation(run_dir, manifest.step) == manifest.generation
    if not committed:
        disk.begin_pull(folder)
    repairer = Repairer(run_dir, sources, None, repaired, Progress(progress))
    problems = []
    try:
        for shard in manifest.shards:
            try:
                repairer.make_whole(manifest, shard)
            except SnapshotDamagedError as error:
                problems.append(str(error))
        if not problems and not committed:
            commit_pulled(run_dir, manifest, data)
    finally:
        disk.end_pull(folder)
    return problems


def _check_same_history(run_dir: Path, manifest: Manifest, source: str) -> None:
    """SnapshotDamagedError if a sidecar here is of another shard than a manifest from elsewhere lists."""
    folder = disk.step_dir(run_dir, manifest.step)
    for shard in manifest.shards:
        sidecar = folder / sidecar_name(manifest.generation, shard.rank)
        name = f"{folder.name}/{sidecar.name}"
        with contextlib.suppress(OSError, SnapshotDamagedError):  # says nothing, then
            known = decode_document(sidecar.read_bytes(), ShardMeta, name)
            if known.shard != shard:
                break
    else:
        return
    raise SnapshotDamagedError(
        f"{name}: {source} has another {shard.file} in its step {manifest.step}, as if it were of another run: name a "
        "copy of this one, or move that folder away and pull"
    )


def _manifest_bytes(run_dir: Path, step: int) -> bytes:
    try:
        return (disk.step_dir(run_dir, step) / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise SnapshotDamagedError(f"step {step}: {error.strerror or error}") from error


def _with_far(sources: Sequence[ShardSource], far: SnapshotSource | None) -> list[ShardSource]:
    return [*sources, *(() if far is None else (far,))]


def _steps(far: SnapshotSource) -> str:
    return ", ".join(str(step) for _, step in far.committed())
