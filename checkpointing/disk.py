"""The run directory's tier: where snapshots lie, how files get there whole, how they are found again."""

from __future__ import annotations

import os
from pathlib import Path

from checkpointing.checksum import checksum, checksum_range
from checkpointing.layout import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    SnapshotDamagedError,
    decode_document,
    parse_step_dir,
    step_dir_name,
)


def checkpoints_dir(run_dir: Path) -> Path:
    """Folder of all persisted snapshots."""
    return run_dir / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    """Folder of one step's snapshot."""
    return checkpoints_dir(run_dir) / step_dir_name(step)


def sync_dir(path: Path) -> None:
    """Make renames and removals in a folder last through a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything, however the kernel cuts it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_atomic(path: Path, data: bytes) -> None:
    """Put a file in place as a whole or not at all. OSError if it cannot be; nothing half-written stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def all_steps(run_dir: Path) -> list[int]:
    """Every step that has a folder, newest first, committed or not."""
    try:
        names = os.listdir(checkpoints_dir(run_dir))
    except FileNotFoundError:
        return []
    return sorted((step for step in map(parse_step_dir, names) if step is not None), reverse=True)


def committed_steps(run_dir: Path) -> list[int]:
    """Every step that has a manifest (whole or damaged), newest first."""
    return [step for step in all_steps(run_dir) if (step_dir(run_dir, step) / MANIFEST_NAME).is_file()]


def manifest_checksum(run_dir: Path, step: int) -> int:
    """63 bits that tell one manifest's bytes from another's; -1 if it cannot be read."""
    try:
        data = (step_dir(run_dir, step) / MANIFEST_NAME).read_bytes()
    except OSError:
        return -1
    return int(checksum(data)[:16], 16) >> 1


def read_manifest(run_dir: Path, step: int) -> Manifest:
    """A step's manifest, checked in itself; SnapshotDamagedError if it is missing, unreadable or damaged."""
    path = step_dir(run_dir, step) / MANIFEST_NAME
    name = f"{step_dir_name(step)}/{MANIFEST_NAME}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SnapshotDamagedError(f"{name}: {error.strerror or error}") from error
    manifest = decode_document(data, Manifest, name)
    if manifest.step != step:
        raise SnapshotDamagedError(f"{name}: is of step {manifest.step}")
    return manifest


def size_problem(run_dir: Path, step: int, shard: Shard) -> str | None:
    """What is wrong with a shard file at a glance (missing, wrong size), in one line."""
    name = f"{step_dir_name(step)}/{shard.file}"
    try:
        size_bytes = (step_dir(run_dir, step) / shard.file).stat().st_size
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    if size_bytes != shard.size_bytes:
        return f"{name}: {size_bytes} bytes, should be {shard.size_bytes}"
    return None


def shard_problem(run_dir: Path, step: int, shard: Shard) -> str | None:
    """What is wrong with a shard file, in one line, after reading all of it; None if it is whole."""
    if problem := size_problem(run_dir, step, shard):
        return problem
    name = f"{step_dir_name(step)}/{shard.file}"
    try:
        fd = os.open(step_dir(run_dir, step) / shard.file, os.O_RDONLY)
        try:
            found = checksum_range(fd, 0, shard.size_bytes)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    return None if found == shard.checksum else f"{name}: checksum {found}, should be {shard.checksum}"
