"""The run directory's tier: where snapshots lie, how files get there whole, how they are found again."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpointing.blocks import BlockDigests
from checkpointing.checksum import CHUNK_BYTES, Checksum, checksum
from checkpointing.layout import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    SnapshotDamagedError,
    decode_document,
    parse_shard_name,
    parse_step_dir,
    step_dir_name,
)

PULLING_NAME = "pulling"
_PULL_S = 6 * 3600.0
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})


def checkpoints_dir(run_dir: Path) -> Path:
    """Folder of all persisted snapshots."""
    return run_dir / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    """Folder of one step's snapshot."""
    return checkpoints_dir(run_dir) / step_dir_name(step)


def begin_pull(folder: Path) -> None:
    """Say that a step's folder is being filled from elsewhere: without a manifest it would pass for a leftover.

    OSError if the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PULLING_NAME).touch()


def end_pull(folder: Path) -> None:
    """Say that it is not, any more, as far as the disk lets us: it is believed for some hours only."""
    with contextlib.suppress(OSError):
        (folder / PULLING_NAME).unlink(missing_ok=True)


def is_being_pulled(folder: Path) -> bool:
    """Whether somebody has said so, and not too long ago."""
    with contextlib.suppress(OSError):
        return time.time() - (folder / PULLING_NAME).stat().st_mtime < _PULL_S
    return False


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
    with _written(path, data) as temporary:
        temporary.replace(path)
    sync_dir(path.parent)


def create_atomic(path: Path, data: bytes) -> bool:
    """The same, but only if there is no such file yet; False if there is one, whoever was first.

    A file system without hard links cannot tell in one step: there, it is looked at right before. OSError.
    """
    with _written(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            temporary.replace(path)
    sync_dir(path.parent)
    return True


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """A durable file beside `path` under a name of its own: another writer may be at the same file."""
    temporary = path.with_name(f"{path.name}.{int.from_bytes(os.urandom(6))}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # the error at hand is the one to tell
            temporary.unlink(missing_ok=True)


def all_steps(run_dir: Path) -> list[int]:
    """Every step that has a folder (or a link to one), committed or not, in falling order."""
    folder = checkpoints_dir(run_dir)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = (step for name in names if (step := parse_step_dir(name)) is not None and (folder / name).is_dir())
    return sorted(steps, reverse=True)


def committed_steps(run_dir: Path) -> list[int]:
    """Every step that has a manifest (whole or damaged), in falling order."""
    return [step for step in all_steps(run_dir) if (step_dir(run_dir, step) / MANIFEST_NAME).is_file()]


def committed_ages(run_dir: Path) -> list[tuple[int, int]]:
    """(generation, step) of the same, newest first: a later generation's snapshot is newer whatever its step."""
    return sorted(((named_generation(run_dir, step), step) for step in committed_steps(run_dir)), reverse=True)


def manifest_checksum(run_dir: Path, step: int) -> int:
    """63 bits that tell one manifest's bytes from another's; -1 if it cannot be read."""
    try:
        return bytes_checksum((step_dir(run_dir, step) / MANIFEST_NAME).read_bytes())
    except OSError:
        return -1


def bytes_checksum(data: bytes) -> int:
    """63 bits of a document's checksum: a collective carries them as one number."""
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


def read_generation(run_dir: Path, step: int) -> int:
    """Which generation wrote the step's manifest; -1 if there is none or it is damaged. Shards are not looked at."""
    try:
        return read_manifest(run_dir, step).generation
    except SnapshotDamagedError:
        return -1


def named_generation(run_dir: Path, step: int) -> int:
    """The generation of a step's snapshot: its manifest's, or, if that is damaged, the newest that has files there."""
    generation = read_generation(run_dir, step)
    return generation if generation >= 0 else newest_generation(step_dir(run_dir, step))


def newest_generation(folder: Path) -> int:
    """The newest generation that has a file in a step's folder; -1 if none has."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return -1
    return max((named[0] for name in names if (named := parse_shard_name(name))), default=-1)


def size_problem(run_dir: Path, step: int, shard: Shard) -> str | None:
    """What is wrong with a shard file at a glance (missing, wrong size), in one line."""
    return _size_problem(step_dir(run_dir, step) / shard.file, shard)


def shard_problem(run_dir: Path, step: int, shard: Shard) -> str | None:
    """What is wrong with a shard file, in one line, after reading all of it; None if it is whole."""
    return file_problem(step_dir(run_dir, step) / shard.file, shard)


def file_problem(
    path: Path, shard: Shard, tick: Callable[[int], None] = lambda done_bytes: None, digests: BlockDigests | None = None
) -> str | None:
    """The same for a file anywhere. tick: hears how many more bytes have been read; digests: gets all of them.

    Plain reads and no mapping: a medium that fails is an OSError in words here, where a mapping would give SIGBUS.
    """
    if problem := _size_problem(path, shard):
        return problem
    name = f"{path.parent.name}/{path.name}"
    running, done = Checksum(), 0
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(shard.size_bytes, 1))))
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            while count := os.preadv(fd, [buffer[: shard.size_bytes - done]], done):
                running.update(buffer[:count])
                if digests is not None:
                    digests.update(buffer[:count])
                done += count
                tick(count)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    found = running.hex()
    return None if found == shard.checksum else f"{name}: checksum {found}, should be {shard.checksum}"


def drop_cached(path: Path) -> None:
    """Have the next read come from the medium and not from memory, as far as the kernel obliges. OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _size_problem(path: Path, shard: Shard) -> str | None:
    name = f"{path.parent.name}/{path.name}"
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    return None if size_bytes == shard.size_bytes else f"{name}: {size_bytes} bytes, should be {shard.size_bytes}"
