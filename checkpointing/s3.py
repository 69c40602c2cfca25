"""The S3 tier: the same files and bytes as in the run directory, below `<prefix>/<run name>/step-<n>/` of a bucket.

A snapshot is there once its manifest.json is; `checkpointing.s3_commit` says who may write that. boto3 is imported when
the first request is made.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointing.layout import (
    Manifest,
    Shard,
    SnapshotDamagedError,
    parse_shard_name,
    parse_step_dir,
    shard_file_name,
    step_dir_name,
)
from checkpointing.ratelimit import RateLimit, never
from checkpointing.s3_commit import Refusal, commit_manifest
from checkpointing.s3_fetch import fetch_object
from checkpointing.s3_parts import (
    Contents,
    Patience,
    S3Error,
    StoredObject,
    decode_sound,
    manifest_name,
    object_name,
    root_key,
)
from configs.schema import S3Config

if TYPE_CHECKING:
    from checkpointing.s3_objects import Objects

__all__ = ["Bucket", "Patience", "S3Error"]


class Bucket:
    """Snapshots of one run in a bucket. May be used from several threads; creating one does no I/O.

    Credentials come from where boto3 finds them. All methods but the constructor raise S3Error if S3 cannot be
    reached or refuses.
    """

    name = "S3"

    def __init__(self, settings: S3Config, run_name: str, patience: Patience | None = None) -> None:
        """ValueError if the bucket has no name, or the prefix cannot be one."""
        if not settings.bucket:
            raise ValueError("there is no bucket: set s3.bucket")
        self.settings = settings
        self.root = root_key(settings, run_name)
        self._patience = patience or Patience()
        self._lock = threading.Lock()
        self._connected: Objects | None = None
        self._manifests: dict[int, Contents] = {}

    @property
    def objects(self) -> Objects:
        """The run's objects, connected on first use. S3Error if boto3 is not installed."""
        with self._lock:
            if self._connected is None:
                try:
                    from checkpointing.s3_objects import Objects
                except ImportError as error:
                    message = f"S3 needs boto3 ({error}): pip install 'everstep[s3]'"
                    raise S3Error(message, passing=False) from error
                self._connected = Objects(self.settings, self.root, self._patience)
            return self._connected

    def committed(self) -> list[tuple[int, int]]:
        """(generation, step) of every snapshot with a sound manifest, newest first: by generation, then by step."""
        return sorted(((m.generation, m.step) for m in self.manifests().values()), reverse=True)

    def anything(self) -> bool:
        """Whether there is a manifest at all, sound or damaged."""
        steps = map(parse_step_dir, self.objects.folders())
        return any(step is not None and self._read_manifest(step) is not None for step in steps)

    def manifests(self) -> dict[int, Manifest]:
        """Every sound manifest by its step; damaged ones are left out. Unchanged ones are not transferred again."""
        folders = self.objects.folders()
        steps = [step for step in map(parse_step_dir, folders) if step is not None]
        with ThreadPoolExecutor(self.settings.connections) as pool:
            found = list(pool.map(self._read_manifest, steps))
        with self._lock:
            for step in self._manifests.keys() - set(steps):
                self._manifests.pop(step, None)
        sound = {}
        for step, contents in zip(steps, found, strict=True):
            if contents is not None and (manifest := decode_sound(contents.data, step)) is not None:
                sound[step] = manifest
        return sound

    def manifest(self, step: int) -> bytes:
        """The manifest's bytes, unchecked."""
        contents = self.objects.get(manifest_name(step))
        if contents is None:
            raise S3Error(f"S3 has no snapshot of step {step}", passing=False)
        return contents.data

    def fetch(self, step: int, generation: int, shard: Shard, into: Path) -> None:
        """Write a shard's bytes to `into`, by parallel ranges; what a cut connection lacks is asked for again.

        The size is checked; whether they are the right bytes is for the caller to verify. OSError if `into` cannot be
        written. On any failure `into` is removed.
        """
        if shard.file != shard_file_name(generation, shard.rank):
            raise S3Error(f"S3: {shard.file!r} is not the name of a shard", passing=False)
        fetch_object(self.objects, object_name(step, shard.file), shard.size_bytes, into, self.settings)

    def upload(
        self,
        path: Path,
        step: int,
        file: str,
        limit: RateLimit | None = None,
        stop: Callable[[], bool] = never,
        checksum: str | None = None,
    ) -> int:
        """Send a shard, unless an object of its size and checksum is there already; returns the bytes sent.

        checksum: the file's xxh3 from its manifest; a file that is another is not sent. The server verifies what
        arrives against a checksum of the very bytes that were compared.

        Raises:
            SnapshotDamagedError: if the file is not the one that the manifest describes.
            OSError: if it cannot be read.
        """
        from checkpointing.s3_objects import file_sums

        objects, name = self.objects, object_name(step, file)
        there = objects.describe(name)
        if there and there.xxh3 and there.xxh3 == checksum and path.stat().st_size == there.size_bytes:
            return 0
        sums = file_sums(path)
        if checksum is not None and sums.xxh3 != checksum:
            raise SnapshotDamagedError(f"{name}: checksum {sums.xxh3}, should be {checksum}")
        if there and (there.size_bytes, there.xxh3) == (sums.size_bytes, sums.xxh3):
            return 0
        objects.send(path, name, sums, limit, stop)
        return sums.size_bytes

    def commit(self, manifest: Manifest, data: bytes) -> bool:
        """Put a snapshot's manifest, `data`, in place: its shards must be there; see `checkpointing.s3_commit`."""
        return self.refusal(manifest, data) is None

    def refusal(self, manifest: Manifest, data: bytes) -> Refusal | None:
        """Like commit, but says why not; None means committed."""
        return commit_manifest(self, manifest, data)

    def files(self, step: int | None = None) -> dict[str, StoredObject]:
        """Objects of one step (or of all), by their names below the run's root."""
        return self.objects.listing("" if step is None else step_dir_name(step) + "/")

    def remove(self, step: int) -> None:
        """Remove a snapshot: the manifest first, so that a removal cut short leaves no snapshot behind. Somebody
        else's objects beside it stay."""
        self.objects.delete(manifest_name(step))
        folder = object_name(step, "")
        shards = [name for name in self.files(step) if parse_shard_name(name.removeprefix(folder))]
        with ThreadPoolExecutor(self.settings.connections) as pool:
            list(pool.map(self.objects.delete, shards))

    def abort_leftovers(self, ranks: Collection[int], older_than_s: float) -> int:
        """Abort multipart uploads of these ranks' shards that were begun that long ago; returns how many.

        An abandoned upload costs as much as an object and is seen in no listing of objects.
        """
        aborted = 0
        for upload in self.objects.unfinished():
            folder, _, file = upload.name.partition("/")
            named = parse_shard_name(file)
            ours = parse_step_dir(folder) is not None and named is not None and named[1] in ranks
            if ours and upload.age_s >= older_than_s:
                aborted += self.objects.abort(upload)
        return aborted

    def _read_manifest(self, step: int) -> Contents | None:
        with self._lock:
            known = self._manifests.get(step)
        contents = self.objects.get(manifest_name(step), known)
        with self._lock, contextlib.suppress(KeyError):
            if contents is not None:
                self._manifests[step] = contents
            else:
                del self._manifests[step]
        return contents
