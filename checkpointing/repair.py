"""Makes a shard whole: reads all of the run directory's file, and fetches it from elsewhere if it is not right."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.blocks import BlockDigests
from checkpointing.layout import Manifest, Shard, SnapshotDamagedError, step_dir_name
from checkpointing.marks import leave_mark, remove_mark
from checkpointing.shardwriter import words
from checkpointing.sources import ShardSource, SourceError

_PROGRESS_S = 0.3
_SCRATCH_PREFIX = "everstep-load-"


class Repair(msgspec.Struct, frozen=True, kw_only=True):
    """One shard that was fetched. source: from where, in words; reason: what was wrong, in one line.

    in_place: whether it is in the run directory now, or only where this rank reads it from.
    """

    step: int
    generation: int
    file: str
    source: str
    reason: str
    in_place: bool


class Progress:
    """Adds up bytes and says so at most a few times a second. report: done and total bytes."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report
        self._done_bytes = 0
        self._total_bytes = 0
        self._said_s = 0.0

    def expect(self, size_bytes: int) -> None:
        """So many bytes more are to be read."""
        self._total_bytes += size_bytes

    def add(self, size_bytes: int) -> None:
        """So many bytes more have been read."""
        self._done_bytes += size_bytes
        if time.monotonic() - self._said_s >= _PROGRESS_S:
            self._said_s = time.monotonic()
            self._report(self._done_bytes, max(self._total_bytes, self._done_bytes))


class Scratch:
    """A folder for files that the run directory does not take; made when first needed, removed by close().

    parent: where to make it; None, or if that fails too: among the system's temporary files.
    """

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        self._dir: Path | None = None

    def folder(self, step: int) -> Path:
        """The folder for a step's files. OSError if none can be made."""
        if self._dir is None:
            self._dir = self._make()
        folder = self._dir / step_dir_name(step)
        folder.mkdir(exist_ok=True)
        return folder

    def close(self) -> None:
        """Remove all of it."""
        if self._dir is not None:
            shutil.rmtree(self._dir, ignore_errors=True)
            self._dir = None

    def _make(self) -> Path:
        for parent in (self._parent, Path(tempfile.gettempdir())):
            with contextlib.suppress(OSError):
                if parent is not None:
                    parent.mkdir(parents=True, exist_ok=True)
                    _remove_abandoned(parent)
                    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH_PREFIX}{os.getpid()}-", dir=parent))
        raise OSError("no folder for temporary files can be written")


class Repairer:
    """Repairs shards of one run directory from `sources`, near ones first.

    scratch: for what the run directory does not take; None: it must. digests: of every file that was found whole.
    """

    def __init__(
        self, run_dir: Path, sources: Sequence[ShardSource], scratch: Scratch | None,
        repaired: Callable[[Repair], None], progress: Progress,
    ) -> None:  # fmt: skip
        self.run_dir = run_dir
        self.sources = sources
        self.scratch = scratch
        self.repaired = repaired
        self.progress = progress
        self.elsewhere = False
        self.digests: dict[Path, BlockDigests] = {}

    def make_whole(self, manifest: Manifest, shard: Shard, in_place: bool = True) -> Path:
        """A file that holds the shard and whose every byte has been read and is right.

        in_place: put it where it belongs if it has to be fetched; else, or if the run directory does not take it, it
        is a temporary file of `scratch`, and `elsewhere` is true from then on. SnapshotDamagedError, in one line with
        what each source said, if no source has it whole.
        """
        path = disk.step_dir(self.run_dir, manifest.step) / shard.file
        self.progress.expect(shard.size_bytes)
        problem = self._problem(path, path, shard)
        if problem is None:
            return path
        problems = [problem]
        for source in self.sources:
            failure, into = "", ""
            for folder in self._folders(manifest.step, in_place and not self.elsewhere):
                try:
                    into = f" to {(place := folder())}"
                    found = self._fetch(source, manifest, shard, place)
                except (SourceError, SnapshotDamagedError) as error:
                    failure = str(error)
                    break
                except OSError as error:  # the folder's, most likely: another may take it
                    failure = f"not copied{into}: {words(error)}"
                    continue
                self.elsewhere = self.elsewhere or found != path
                self._tell(manifest, shard, source, problem, found == path)
                return found
            problems.append(f"{source.name}: {failure}")
        remove_mark(path.parent, manifest.generation, shard.rank)
        raise SnapshotDamagedError("; ".join(problems))

    def _folders(self, step: int, in_place: bool) -> list[Callable[[], Path]]:
        """Where to put a file: in the run directory, and in scratch if that takes none."""
        kept = self.scratch
        scratch = [] if kept is None else [lambda: kept.folder(step)]
        return [lambda: _made(disk.step_dir(self.run_dir, step)), *scratch] if in_place else scratch

    def _fetch(self, source: ShardSource, manifest: Manifest, shard: Shard, folder: Path) -> Path:
        path = folder / shard.file
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            self.progress.expect(2 * shard.size_bytes)
            self._watched(temporary, lambda: source.fetch(manifest.step, manifest.generation, shard, temporary))
            _sync_file(temporary)
            disk.drop_cached(temporary)
            if problem := self._problem(temporary, path, shard):
                raise SnapshotDamagedError(f"what came is not the shard ({problem})")
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the error at hand is the one to tell
                temporary.unlink(missing_ok=True)
            raise
        disk.sync_dir(folder)
        if folder == disk.step_dir(self.run_dir, manifest.step):
            with contextlib.suppress(OSError):  # without it, it will be read back once more
                leave_mark(folder, manifest.generation, shard.rank)
        return path

    def _problem(self, path: Path, later: Path, shard: Shard) -> str | None:
        """What is wrong with a file; of one that is right the digests are kept, under the name that it will have."""
        digests = BlockDigests()
        problem = disk.file_problem(path, shard, self.progress.add, digests)
        if problem is None:
            self.digests[later] = digests
        return problem

    def _watched(self, path: Path, fetch: Callable[[], None]) -> None:
        """Run `fetch` and say meanwhile how far the file at `path` has grown."""
        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
            running = pool.submit(fetch)
            known = 0
            while not wait([running], timeout=_PROGRESS_S).done:
                with contextlib.suppress(FileNotFoundError):
                    # Blocks, not length: what comes in parallel parts has its full length from the start.
                    now = max(known, path.stat().st_blocks * 512)
                    self.progress.add(now - known)
                    known = now
            running.result()

    def _tell(self, manifest: Manifest, shard: Shard, source: ShardSource, reason: str, in_place: bool) -> None:
        self.repaired(
            Repair(
                step=manifest.step,
                generation=manifest.generation,
                file=shard.file,
                source=source.name,
                reason=reason,
                in_place=in_place,
            )
        )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_abandoned(parent: Path) -> None:
    """Remove what processes that were killed in the middle of a load have left."""
    for path in parent.glob(f"{_SCRATCH_PREFIX}*-*"):
        pid = path.name.removeprefix(_SCRATCH_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
