"""Which snapshots there are to load, in the run directory and in a bucket, and the very manifest that all ranks use."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME, Manifest, SnapshotDamagedError, decode_document, step_dir_name
from checkpointing.sources import SnapshotSource, SourceError


class NoSnapshotError(ValueError):
    """Snapshots are there, and none of them can be trusted or reached: a person has to decide."""


class Candidates(msgspec.Struct, frozen=True):
    """Ages, (generation, step), newest first. rejected: how many were left out because they are known to be wrong."""

    ages: tuple[tuple[int, int], ...]
    rejected: int


def any_snapshot(
    run_dir: Path, far: SnapshotSource | None, abandoned: Container[tuple[int, int]] = ()
) -> bool:  # fmt: skip
    """Whether there is anything to go on from, whole or damaged. abandoned: ages of a history that was given up.

    Raises:
        SourceError: if the run directory has nothing, and whether the bucket has cannot be found out: beginning from
            the first step would then be a guess.
    """
    given_up = {age[1] for age in disk.committed_ages(run_dir) if age in abandoned}
    if set(disk.committed_steps(run_dir)) - given_up:
        return True
    try:
        if far is None or not far.anything():
            return False
        known = far.committed()
        return not known or any(age not in abandoned for age in known)
    except SourceError as error:
        assert far is not None
        raise SourceError(_nothing_here(run_dir, far, error)) from error


def list_candidates(
    run_dir: Path, far: SnapshotSource | None, rejected: Container[tuple[int, int]], trouble: Callable[[str], None]
) -> Candidates:  # fmt: skip
    """Every committed snapshot, near or far. trouble: hears that the bucket cannot be reached.

    Raises:
        NoSnapshotError: if the bucket cannot be reached and nothing is in the run directory.
    """
    known = set(disk.committed_ages(run_dir))
    try:
        known |= set(far.committed()) if far is not None else set()
        if not known and far is not None and far.anything():
            raise NoSnapshotError(f"every manifest in {far.name} is damaged, and {run_dir} has none")
    except SourceError as error:
        assert far is not None
        if not known:
            raise NoSnapshotError(_nothing_here(run_dir, far, error)) from error
        trouble(f"{far.name} cannot be reached, going on with the snapshots in the run directory: {error}")
    ages = sorted((age for age in known if age not in rejected), reverse=True)
    return Candidates(tuple(ages), len(known) - len(ages))


def read_candidate(run_dir: Path, far: SnapshotSource | None, age: tuple[int, int]) -> tuple[bytes, Manifest]:
    """A candidate's manifest, from the run directory or the bucket. SnapshotDamagedError if neither has it."""
    problems = []
    for data, problem in _copies(run_dir, far, age[1]):
        try:
            if problem:
                raise SnapshotDamagedError(problem)
            return data, _decode(data, age)
        except SnapshotDamagedError as error:
            problems.append(str(error))
    raise SnapshotDamagedError("; ".join(problems))


def read_same_candidate(
    run_dir: Path, far: SnapshotSource | None, age: tuple[int, int], manifest_checksum: int
) -> Manifest:  # fmt: skip
    """The manifest that rank 0 read, told by its checksum. SnapshotDamagedError if this rank cannot find that one."""
    for data, _ in _copies(run_dir, far, age[1]):
        if disk.bytes_checksum(data) == manifest_checksum:
            return _decode(data, age)
    raise SnapshotDamagedError(f"{step_dir_name(age[1])}: rank 0 sees another manifest")


def _copies(run_dir: Path, far: SnapshotSource | None, step: int) -> Iterator[tuple[bytes, str]]:
    """The manifest's bytes in each place, or why there are none."""
    try:
        yield (disk.step_dir(run_dir, step) / MANIFEST_NAME).read_bytes(), ""
    except OSError as error:
        yield b"", f"{step_dir_name(step)}/{MANIFEST_NAME}: {error.strerror or error}"
    if far is not None:
        try:
            yield far.manifest(step), ""
        except SourceError as error:
            yield b"", f"{far.name}: {error}"


def _decode(data: bytes, age: tuple[int, int]) -> Manifest:
    name = f"{step_dir_name(age[1])}/{MANIFEST_NAME}"
    manifest = decode_document(data, Manifest, name)
    if manifest.step != age[1]:
        raise SnapshotDamagedError(f"{name}: is of step {manifest.step}")
    if manifest.generation != age[0]:
        raise SnapshotDamagedError(f"{name}: is of generation {manifest.generation}, not {age[0]}")
    return manifest


def _nothing_here(run_dir: Path, far: SnapshotSource, error: SourceError) -> str:
    return (
        f"{disk.checkpoints_dir(run_dir)} has no snapshot, and whether {far.name} has one is not known ({error}): "
        "try again when it can be reached, or set s3.bucket = '' to do without it"
    )
