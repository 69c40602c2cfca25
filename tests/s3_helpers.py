"""Snapshots with random contents for the tests of the S3 tier, and checks of what a bucket has."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpointing.checksum import checksum
from checkpointing.disk import shard_problem, step_dir
from checkpointing.layout import MANIFEST_NAME, VERSION, Manifest, Shard, encode_document, shard_file_name
from checkpointing.s3 import Bucket, Patience
from checkpointing.s3_parts import decode_sound
from configs.schema import S3Config
from tests.s3server import S3Server

QUICK = Patience(connect_timeout_s=1.0, read_timeout_s=5.0, attempts=2)


def write_snapshot(
    run_dir: Path, step: int, generation: int = 1, world_size: int = 2, size_bytes: int = 5000
) -> Manifest:
    """A committed snapshot in the run directory; its contents are a function of the step, the generation and rank."""
    folder = step_dir(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for rank in range(world_size):
        data = random.Random(f"{step}/{generation}/{rank}").randbytes(size_bytes)
        name = shard_file_name(generation, rank)
        (folder / name).write_bytes(data)
        shards.append(
            Shard(
                rank=rank,
                file=name,
                size_bytes=size_bytes,
                checksum=checksum(data),
                data_start_bytes=0,
                tensors=(),
                scalars={},
                leaves={},
            )
        )
    manifest = Manifest(
        version=VERSION,
        step=step,
        generation=generation,
        world_size=world_size,
        mesh={"dp_shard": world_size},
        t_wall_s=float(step),
        shards=tuple(shards),
    )
    (folder / MANIFEST_NAME).write_bytes(encode_document(manifest))
    return manifest


def make_bucket(server: S3Server, endpoint: str = "", patience: Patience = QUICK, **settings: Any) -> Bucket:
    """A new, empty bucket."""
    config = S3Config(bucket=server.create_bucket(), endpoint=endpoint or server.endpoint, part_mb=5, **settings)
    return Bucket(config, "run", patience)


def send(bucket: Bucket, run_dir: Path, manifest: Manifest, ranks: Sequence[int] | None = None) -> None:
    """Upload a snapshot's shards, all or some."""
    for shard in manifest.shards:
        if ranks is None or shard.rank in ranks:
            path = step_dir(run_dir, manifest.step) / shard.file
            bucket.upload(path, manifest.step, shard.file, checksum=shard.checksum)


def commit(bucket: Bucket, run_dir: Path, manifest: Manifest) -> bool:
    """Commit a snapshot of the run directory."""
    return bucket.commit(manifest, (step_dir(run_dir, manifest.step) / MANIFEST_NAME).read_bytes())


def problems(bucket: Bucket, step: int) -> list[str]:
    """What is wrong with a snapshot in the bucket, every byte read: no line means that it could be loaded."""
    manifest = decode_sound(bucket.manifest(step), step)
    if manifest is None:
        return [f"step {step}: the manifest is damaged"]
    with tempfile.TemporaryDirectory() as folder:
        step_dir(Path(folder), step).mkdir(parents=True)
        for shard in manifest.shards:
            bucket.fetch(step, manifest.generation, shard, step_dir(Path(folder), step) / shard.file)
        found = [shard_problem(Path(folder), step, shard) for shard in manifest.shards]
    return [problem for problem in found if problem is not None]
