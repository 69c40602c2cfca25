"""Who may write a manifest into a bucket: the fence between a generation and the orphans of older ones.

A shard's name has its generation in it, so two generations never write the same shard. What they could fight over is
manifest.json of a step. It is created only where there is none (`If-None-Match: *`), and replaced only by a newer
generation, and only if it is still what was read (`If-Match`, a compare-and-swap). So an orphan that wakes up after a
partition finds its step taken, or a newer generation in the bucket; and what it wrote before cannot keep its successor
out. Readers order snapshots by generation first, so even an orphan's later step hides nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from checkpointing.layout import MANIFEST_NAME, Manifest, Shard, step_dir_name
from checkpointing.s3_parts import Contents, S3Error, decode_sound, manifest_name, object_name

if TYPE_CHECKING:
    from checkpointing.s3 import Bucket

_ROUNDS = 8


class Refusal(msgspec.Struct, frozen=True):
    """Why a snapshot was not committed, in one line. final: it never will be; else shards are still to come."""

    why: str
    final: bool


def commit_manifest(bucket: Bucket, manifest: Manifest, data: bytes) -> Refusal | None:
    """Put `data`, the bytes of `manifest`, in place. Returns None if they are there now, else why not.

    Raises:
        S3Error: if S3 cannot be reached or refuses.
    """
    assert decode_sound(data, manifest.step) == manifest, "the bytes are not this manifest's"
    if problem := missing_shards(bucket, manifest):
        return Refusal(problem, final=False)
    if problem := newer_generation(manifest.generation, bucket.committed()):
        return Refusal(problem, final=True)
    replaces: str | None = None
    for _ in range(_ROUNDS):
        if bucket.objects.put_if(manifest_name(manifest.step), data, replaces):
            return None if replaces else _withdraw_if_late(bucket, manifest)
        there = bucket.objects.get(manifest_name(manifest.step))
        if there is None:  # gone since
            replaces = None
        elif there.data == data:  # an earlier attempt of ours whose answer got lost, or another's with the same bytes
            return None
        elif problem := occupied(manifest, there):
            return Refusal(problem, final=True)
        else:
            replaces = there.etag
    raise S3Error(f"S3: {manifest_name(manifest.step)} changes faster than it can be replaced")


def _withdraw_if_late(bucket: Bucket, manifest: Manifest) -> Refusal | None:
    """Look once more after a manifest was created: a writer that was held up right before it may be an orphan by now.

    Not needed for safety, as its snapshot is older than its successor's to every reader; but what is refused should
    not be there.
    """
    problem = newer_generation(manifest.generation, bucket.committed())
    if not problem:
        return None
    there = bucket.objects.get(manifest_name(manifest.step))
    if there is not None and decode_sound(there.data, manifest.step) == manifest:
        bucket.objects.delete(manifest_name(manifest.step), there.etag)
    return Refusal(problem, final=True)


def final_problem(bucket: Bucket, manifest: Manifest, data: bytes) -> str:
    """Why `data` would be refused for good whatever is uploaded, "" if it would not: to ask before uploading. S3Error.

    Only a look: commit_manifest decides.
    """
    if problem := newer_generation(manifest.generation, bucket.committed()):
        return problem
    there = bucket.objects.get(manifest_name(manifest.step))
    return "" if there is None or there.data == data else occupied(manifest, there)


def newer_generation(generation: int, committed: list[tuple[int, int]]) -> str:
    """Why a generation may not commit any more, "" if it may."""
    newest = max(committed, default=(-1, -1))[0]
    if newest > generation:
        return f"S3 has snapshots of generation {newest}: generation {generation} may not commit any more"
    return ""


def occupied(manifest: Manifest, there: Contents) -> str:
    """Why the manifest that is there may not be replaced; "" if it may: it is damaged, or of an older generation."""
    other = decode_sound(there.data, manifest.step)
    if other is None or other.generation < manifest.generation:
        return ""
    return (
        f"S3 has another snapshot of {step_dir_name(manifest.step)}, of generation {other.generation}: that of "
        f"generation {manifest.generation} is not committed"
    )


def missing_shards(bucket: Bucket, manifest: Manifest) -> str:
    """Which shards are not in the bucket with the right size and checksum, in one line; "" if all are."""
    listed = bucket.files(manifest.step)
    wrong = []
    for shard in manifest.shards:
        there = listed.get(object_name(manifest.step, shard.file))
        if there is None or there.size_bytes != shard.size_bytes:
            wrong.append(shard.file)
    if not wrong:
        with ThreadPoolExecutor(bucket.settings.connections) as pool:
            sound = list(pool.map(lambda shard: _is_there(bucket, manifest.step, shard), manifest.shards))
        wrong = [shard.file for shard, there in zip(manifest.shards, sound, strict=True) if not there]
    if not wrong:
        return ""
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"S3 {step_dir_name(manifest.step)}: no {MANIFEST_NAME} yet, {wrong[0]}{more} not there in full"


def _is_there(bucket: Bucket, step: int, shard: Shard) -> bool:
    """Whether the object was sent as this very shard: its size, and the checksum put beside it, from the bytes that the
    server's own checksum was taken of."""
    there = bucket.objects.describe(object_name(step, shard.file))
    return there is not None and (there.size_bytes, there.xxh3) == (shard.size_bytes, shard.checksum)
