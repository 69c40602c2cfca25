"""From a slot in memory to a file on a disk: copied in bounded pieces, checked on the way, durable, then described."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from checkpointing import disk
from checkpointing.checksum import CHUNK_BYTES, Checksum
from checkpointing.layout import (
    ShardMeta,
    SnapshotDamagedError,
    decode_document,
    encode_document,
    shard_file_name,
    sidecar_name,
)
from checkpointing.segment import CONTROL_BYTES, Control
from checkpointing.shardfile import header_size_bytes, parse_header


def write_shard(fd: int, control: Control, folder: Path, start_bytes: int = CONTROL_BYTES) -> ShardMeta:
    """Write the shard of an open slot, and then its sidecar, to a step's folder, which is made.

    start_bytes: where its bytes begin, in a file that is no slot.

    A shard that is there already is left alone: a retry after another rank's failure writes nothing anew.

    Raises:
        OSError: if the disk refuses. SnapshotDamagedError: if memory no longer holds what was staged. Nothing
        half-written stays either way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / shard_file_name(control.generation, control.rank)
    # Where a snapshot is rescued, another node may be at the same shard.
    temporary = path.with_name(f"{path.name}.{int.from_bytes(os.urandom(6))}.tmp")
    name = f"{folder.name}/{path.name}"
    replaced = False
    try:
        found = _copy_out(fd, start_bytes, control.size_bytes, temporary)
        if found != control.checksum:
            raise SnapshotDamagedError(f"{name}: bytes in memory have changed since they were staged")
        meta = _describe(fd, start_bytes, control, name)
        if _is_there(folder, control, meta):
            temporary.unlink()
            return meta
        temporary.replace(path)
        replaced = True
        disk.sync_dir(folder)
        disk.write_atomic(folder / sidecar_name(control.generation, control.rank), encode_document(meta))
    except (OSError, SnapshotDamagedError):
        with contextlib.suppress(OSError):  # a disk that fails once often fails again; the first error is the one told
            temporary.unlink(missing_ok=True)
            if replaced:
                path.unlink(missing_ok=True)
            folder.rmdir()  # others may have files in it
        raise
    return meta


def identity(meta: ShardMeta) -> tuple[int, int, int, int]:
    """Step, generation, number of ranks and rank that a shard says it is of."""
    return meta.step, meta.generation, meta.world_size, meta.shard.rank


def words(error: OSError | SnapshotDamagedError) -> str:
    """An error in one line for a person."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


def _is_there(folder: Path, control: Control, meta: ShardMeta) -> bool:
    sidecar = folder / sidecar_name(control.generation, control.rank)
    with contextlib.suppress(OSError, SnapshotDamagedError):
        known = decode_document(sidecar.read_bytes(), ShardMeta, sidecar.name)
        return known == meta and disk.file_problem(folder / meta.shard.file, meta.shard) is None
    return False


def _copy_out(fd: int, start_bytes: int, size_bytes: int, path: Path) -> str:
    """Copy a slot's shard to a new, durable file; returns the checksum of what was written."""
    running = Checksum()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(size_bytes, 1))))
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        done = 0
        while done < size_bytes:
            count = os.preadv(fd, [buffer[: min(len(buffer), size_bytes - done)]], start_bytes + done)
            if count == 0:
                break
            running.update(buffer[:count])
            disk.write_all(out, buffer[:count])
            done += count
        os.fsync(out)
    finally:
        os.close(out)
    return running.hex()


def _describe(fd: int, start_bytes: int, control: Control, name: str) -> ShardMeta:
    length = header_size_bytes(os.pread(fd, 8, start_bytes), control.size_bytes, name)
    meta = parse_header(os.pread(fd, length, start_bytes), control.size_bytes, control.checksum, name)
    if identity(meta) != (control.step, control.generation, control.world_size, control.rank):
        raise SnapshotDamagedError(f"{name}: control block and header in memory disagree")
    return meta
