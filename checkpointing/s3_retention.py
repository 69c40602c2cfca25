"""What is kept in the bucket, and how the rest goes away without ever looking like a snapshot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from checkpointing.keep import KeptInfo, kept_steps
from checkpointing.layout import MANIFEST_NAME, Manifest, parse_shard_name, parse_step_dir
from checkpointing.s3_parts import StoredObject, manifest_name, object_name
from configs.schema import S3Config

if TYPE_CHECKING:
    from checkpointing.s3 import Bucket

Age = tuple[int, int]  # (generation, step): later ones are newer


class Removal(msgspec.Struct, frozen=True):
    """What goes, by its step. manifests: (name, etag), removed first and only if they are still these. shards: their
    names; they go after that, unless the manifest of their step had to stay."""

    manifests: dict[int, tuple[str, str]]
    shards: dict[int, tuple[str, ...]]


def plan_removal(
    files: Mapping[str, StoredObject], manifests: Mapping[int, Manifest], settings: S3Config, awaited: Collection[Age]
) -> Removal:
    """What no longer has to stay. Pure.

    files: every object below the run's root, as listed *before* `manifests`, the sound ones, were read: a manifest that
    was replaced in between then has another etag than the one that may be removed. awaited: snapshots that are still
    being sent, and have no manifest yet.

    Kept are the keep_last newest whole snapshots (all shards there in full size) and every keep_every_steps-th. Shards
    that belong to no manifest go once a newer snapshot is whole. A damaged snapshot is left to a person as long as
    anything newer than it could still need it. Names that are not a snapshot's are not touched.
    """
    whole = {step: manifest.generation for step, manifest in manifests.items() if _is_whole(manifest, files)}
    if not whole:
        return Removal({}, {})
    infos = [KeptInfo(step=step, generation=generation) for step, generation in whole.items()]
    kept = kept_steps(infos, settings.keep_last, settings.keep_every_steps, 0)
    newest = max((generation, step) for step, generation in whole.items())
    going: dict[int, tuple[str, str]] = {}
    shards: dict[int, tuple[str, ...]] = {}
    for step in _steps(files):
        stored, manifest = files.get(manifest_name(step)), manifests.get(step)
        if stored is not None and step not in kept and (step in whole or step < min(kept)):
            going[step] = (manifest_name(step), stored.etag)
        elif stored is not None and manifest is None:
            continue  # a damaged manifest, or one that has come since: who knows which shards are its own
        needed = {shard.file for shard in manifest.shards} if manifest and step not in going else set()
        shards[step] = tuple(
            object_name(step, file)
            for file, generation in _shards(files, step)
            if (generation, step) < newest and (generation, step) not in awaited and file not in needed
        )
    return Removal(going, {step: names for step, names in shards.items() if names})


def keep_house(bucket: Bucket, awaited: Collection[Age]) -> list[int]:
    """Remove what no longer has to stay, after a commit; returns the steps removed, newest first. S3Error."""
    files = bucket.files()
    return carry_out(bucket, plan_removal(files, bucket.manifests(), bucket.settings, awaited))


def carry_out(bucket: Bucket, plan: Removal) -> list[int]:
    """Remove what was planned, but for what has changed since; returns the steps removed, newest first. S3Error."""
    removed = [
        step for step, (name, etag) in sorted(plan.manifests.items(), reverse=True) if bucket.objects.delete(name, etag)
    ]
    stayed = plan.manifests.keys() - set(removed)
    names = [name for step, of_step in plan.shards.items() if step not in stayed for name in of_step]
    with ThreadPoolExecutor(bucket.settings.connections) as pool:
        list(pool.map(bucket.objects.delete, names))
    return removed


def _is_whole(manifest: Manifest, files: Mapping[str, StoredObject]) -> bool:
    for shard in manifest.shards:
        there = files.get(object_name(manifest.step, shard.file))
        if there is None or there.size_bytes != shard.size_bytes:
            return False
    return manifest_name(manifest.step) in files


def _steps(files: Iterable[str]) -> list[int]:
    steps = {parse_step_dir(name.partition("/")[0]) for name in files}
    return sorted(step for step in steps if step is not None)


def _shards(files: Iterable[str], step: int) -> list[tuple[str, int]]:
    """(file, generation) of every shard in a step's folder."""
    prefix, found = object_name(step, ""), []
    for name in files:
        file = name.removeprefix(prefix)
        named = parse_shard_name(file)
        if name.startswith(prefix) and file != MANIFEST_NAME and named is not None:
            found.append((file, named[0]))
    return found
