"""The node's own disk: the newest shards of the ranks that ran here, in the same files as in the run directory.

No manifest is there: only the run directory (or a bucket) says which snapshots are committed. A shard counts once its
sidecar is there and every byte has been read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.checksum import checksum_range
from checkpointing.copies import Located
from checkpointing.layout import (
    HeldShard,
    Shard,
    ShardMeta,
    ShardRef,
    SnapshotDamagedError,
    Tier,
    decode_document,
    parse_shard_name,
    parse_step_dir,
    shard_file_name,
    sidecar_name,
    step_dir_name,
)
from checkpointing.segment import Control
from checkpointing.shardfile import header_size_bytes, layout_digest
from checkpointing.shardwriter import identity, words, write_shard
from checkpointing.slots import held_shard
from checkpointing.sources import SourceError

KEPT = 2


class NodeDisk:
    """Shards in `node_dir`, which is of one run and one node. All methods may be called from any thread."""

    name = "the node's disk"

    def __init__(self, node_dir: Path) -> None:
        self.dir = node_dir
        self._verified: dict[Path, _Signature] = {}

    def write(self, fd: int, control: Control) -> None:
        """Write the shard of an open slot, read it back, and only then remove what is older than the newest two.

        Where the disk is full, all but the newest whole one are removed, so that the next has room.

        Raises:
            OSError: if the disk refuses. SnapshotDamagedError: if memory or the disk does not hold what was staged.
        """
        folder = self.dir / step_dir_name(control.step)
        try:
            meta = write_shard(fd, control, folder)
        except OSError:
            with contextlib.suppress(OSError):  # the error at hand is the one to tell
                self._remove_older(control.rank, 1, self._is_whole)
            raise
        path = folder / meta.shard.file
        disk.drop_cached(path)
        if problem := disk.file_problem(path, meta.shard):
            self._remove(ShardRef(control.generation, control.step, control.rank))
            raise SnapshotDamagedError(f"{problem} (read back right after it was written)")
        self._verified[path] = _signature(path)
        self._remove_older(control.rank, KEPT, self._looks_whole)

    def held(self) -> list[HeldShard]:
        """Every shard whose sidecar is valid and whose every byte has verified.

        A file that this object has read before, and that nobody has written since, is not read again: a restart does
        not wait for a disk. Whoever loads it verifies it anyway.
        """
        found = [(ref, self._whole(ref, trusting=True)) for ref in self.refs()]
        return [held_shard(control, Tier.NODE) for _, control in found if control is not None]

    def find(self, ref: ShardRef) -> Located | None:
        """Where a shard is, if there is one. Whoever reads it verifies it."""
        path = self._path(ref)
        with contextlib.suppress(OSError, SnapshotDamagedError):
            return Located(path, 0, self.control(ref))
        return None

    def fetch(self, step: int, generation: int, shard: Shard, into: Path) -> None:
        """Copy a shard to `into`. SourceError if it is not here, OSError if `into` cannot be written."""
        try:
            source = self._path(ShardRef(generation, step, shard.rank)).open("rb")
        except OSError as error:
            raise SourceError(words(error)) from error
        with source, into.open("xb") as target:
            shutil.copyfileobj(source, target, 2**20)

    def _remove_older(self, rank: int, keep: int, counts: Callable[[ShardRef], bool]) -> None:
        """Remove a rank's shards that are older than the `keep` newest which count."""
        found = 0
        for ref in sorted((ref for ref in self.refs() if ref.rank == rank), reverse=True):
            if found >= keep:
                self._remove(ref)
            elif counts(ref):
                found += 1

    def _is_whole(self, ref: ShardRef) -> bool:
        return self._whole(ref) is not None

    def _looks_whole(self, ref: ShardRef) -> bool:
        located = self.find(ref)
        return located is not None and located.path.stat().st_size == located.control.size_bytes

    def _remove(self, ref: ShardRef) -> None:
        folder = self._path(ref).parent
        (folder / sidecar_name(ref.generation, ref.rank)).unlink(missing_ok=True)
        self._path(ref).unlink(missing_ok=True)
        self._verified.pop(self._path(ref), None)
        for left in folder.glob(f"{self._path(ref).name}*.tmp"):
            left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other ranks' shards are in it
            folder.rmdir()

    def _whole(self, ref: ShardRef, trusting: bool = False) -> Control | None:
        path = self._path(ref)
        with contextlib.suppress(OSError, SnapshotDamagedError):
            control = self.control(ref)
            seen = _signature(path)
            if seen.size_bytes != control.size_bytes:
                return None
            if trusting and self._verified.get(path) == seen:
                return control
            with _opened(path) as fd:
                if checksum_range(fd, 0, control.size_bytes) == control.checksum:
                    self._verified[path] = seen
                    return control
        return None

    def control(self, ref: ShardRef) -> Control:
        """What a slot's control block would say of a shard here. OSError, SnapshotDamagedError if that is not known."""
        path = self._path(ref)
        name = f"{path.parent.name}/{path.name}"
        sidecar = path.parent / sidecar_name(ref.generation, ref.rank)
        meta = decode_document(sidecar.read_bytes(), ShardMeta, f"{path.parent.name}/{sidecar.name}")
        if identity(meta) != (ref.step, ref.generation, meta.world_size, ref.rank):
            raise SnapshotDamagedError(f"{path.parent.name}/{sidecar.name}: describes another shard")
        with _opened(path) as fd:
            header = os.pread(fd, header_size_bytes(os.pread(fd, 8, 0), meta.shard.size_bytes, name), 0)
        return Control(
            step=ref.step,
            generation=ref.generation,
            rank=ref.rank,
            world_size=meta.world_size,
            size_bytes=meta.shard.size_bytes,
            checksum=meta.shard.checksum,
            layout=layout_digest(header, name),
        )

    def _path(self, ref: ShardRef) -> Path:
        return self.dir / step_dir_name(ref.step) / shard_file_name(ref.generation, ref.rank)

    def refs(self) -> list[ShardRef]:
        """Every shard of which there is any file, in order of age."""
        refs = set()
        for name in _names(self.dir):
            step = parse_step_dir(name)
            for named in map(parse_shard_name, _names(self.dir / name) if step is not None else ()):
                if named is not None and step is not None:
                    refs.add(ShardRef(named[0], step, named[1]))
        return sorted(refs)


class _Signature(msgspec.Struct, frozen=True):
    """Differs once a file has been written or replaced."""

    inode: int
    size_bytes: int
    mtime_ns: int


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return _Signature(status.st_ino, status.st_size, status.st_mtime_ns)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
