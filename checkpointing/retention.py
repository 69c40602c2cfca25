"""What is kept in the run directory, and how the rest goes away without ever looking like a snapshot.

Only snapshots that were read back from the disk count as kept: the last good one never goes before a newer one has
verified. Age is (generation, step) everywhere: after a run went on from an older step, the steps beyond it belong to
a history that was given up, and may be damaged in ways that only reading them all would show.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.keep import kept_info, kept_steps
from checkpointing.layout import MANIFEST_NAME, Manifest, SnapshotDamagedError, parse_shard_name
from checkpointing.marks import is_marked, leave_mark

_BEING_MADE_S = 600.0


class Keep(msgspec.Struct, frozen=True):
    """What stays: see `keep.kept_steps`."""

    last: int
    every_steps: int
    best: int


class Retention:
    """Retention of one run directory. It remembers what it found damaged, so that it reads that only once."""

    def __init__(self, run_dir: Path, keep: Keep) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self._damaged: set[tuple[int, int]] = set()

    def apply(self) -> list[int]:
        """Remove what no longer has to stay; returns the steps removed, newest first. OSError if a removal fails.

        Nothing goes as long as nothing has verified. What looks whole, is older than the newest verified snapshot and
        would be kept is read first if it has no marks (its node may have died before it left them). Damaged snapshots
        and leftovers go when they are older than all of the newest that are kept.
        """
        whole = self._look_whole()
        verified = {step: info for step, info in whole.items() if self._marked(info)}
        while unread := self._unread(whole, verified):
            if self._read(unread):
                verified[unread.step] = unread
            else:
                del whole[unread.step]
        if not verified:
            return []
        kept = self._kept(verified)
        recent = sorted((_age(info) for info in verified.values()), reverse=True)[: self.keep.last]
        removed = []
        for step in disk.all_steps(self.run_dir):
            if step not in kept and self._may_go(step, whole.get(step), recent):
                remove_snapshot(self.run_dir, step)
                removed.append(step)
        return removed

    def _may_go(self, step: int, info: Manifest | None, recent: list[tuple[int, int]]) -> bool:
        if info is not None:
            return _age(info) < recent[-1] or (_age(info) < recent[0] and self._marked(info))
        folder = disk.step_dir(self.run_dir, step)
        if disk.is_being_pulled(folder):
            return False
        generation = disk.newest_generation(folder)
        if (folder / MANIFEST_NAME).is_file():  # damaged: a person may want it while it is newer than what is kept
            return (generation, step) < recent[-1]
        if generation < 0:
            return step < recent[0][1] and time.time() - folder.stat().st_mtime > _BEING_MADE_S
        return (generation, step) < recent[0]

    def _kept(self, snapshots: dict[int, Manifest]) -> frozenset[int]:
        infos = [kept_info(manifest) for manifest in snapshots.values()]
        return kept_steps(infos, self.keep.last, self.keep.every_steps, self.keep.best)

    def _unread(self, whole: dict[int, Manifest], verified: dict[int, Manifest]) -> Manifest | None:
        """The newest snapshot that would be kept and has not verified, but should have by now."""
        newest = max(map(_age, verified.values()), default=(-1, -1))
        late = {step: info for step, info in whole.items() if step in verified or _age(info) < newest}
        found = [late[step] for step in self._kept(late) if step not in verified]
        return max(found, key=_age, default=None)

    def _read(self, info: Manifest) -> bool:
        """Read a snapshot through, in place of nodes that are gone; marks it or remembers that it is damaged."""
        folder = disk.step_dir(self.run_dir, info.step)
        for shard in info.shards:
            if disk.shard_problem(self.run_dir, info.step, shard):
                self._damaged.add(_age(info))
                return False
            leave_mark(folder, info.generation, shard.rank)
        return True

    def _marked(self, info: Manifest) -> bool:
        return is_marked(disk.step_dir(self.run_dir, info.step), info)

    def _look_whole(self) -> dict[int, Manifest]:
        """Snapshots whose files are there in full size, but for those that are known to be damaged."""
        found = {}
        for step in disk.committed_steps(self.run_dir):
            manifest = _if_whole(self.run_dir, step)
            if manifest is not None and _age(manifest) not in self._damaged:
                found[step] = manifest
        return found


def remove_snapshot(run_dir: Path, step: int) -> None:
    """Remove a step's folder: its manifest first, so that a removal cut short leaves no snapshot behind.

    Of a folder that somebody has put elsewhere only the link goes. OSError if the file system refuses.
    """
    folder = disk.step_dir(run_dir, step)
    if folder.is_symlink():
        folder.unlink()
        return
    if (folder / MANIFEST_NAME).exists():
        (folder / MANIFEST_NAME).unlink()
        disk.sync_dir(folder)
    shutil.rmtree(folder)


def commit_pulled(run_dir: Path, manifest: Manifest, data: bytes) -> None:
    """Put the manifest (`data`) of a snapshot whose shards were fetched in place.

    OSError if the disk refuses, or if a running job has committed the step in a newer generation meanwhile.
    """
    folder = disk.step_dir(run_dir, manifest.step)
    if not disk.create_atomic(folder / MANIFEST_NAME, data):
        if (there := disk.read_generation(run_dir, manifest.step)) > manifest.generation:
            raise OSError(f"{folder.name}: generation {there} has committed it meanwhile, which is newer")
        disk.write_atomic(folder / MANIFEST_NAME, data)
    disk.end_pull(folder)
    remove_superseded(run_dir, manifest.step, manifest.generation)


def remove_superseded(run_dir: Path, step: int, generation: int) -> None:
    """Remove files of earlier generations from a folder whose manifest has just been replaced."""
    for path in disk.step_dir(run_dir, step).iterdir():
        named = parse_shard_name(path.name)
        if named is not None and named[0] < generation:
            path.unlink(missing_ok=True)


def remove_uncommitted_shards(run_dir: Path, rank: int, before: tuple[int, int], keep: int) -> None:
    """Remove a rank's shards older than `before` (generation, step) that were never committed, but the `keep` newest.

    Without this a node that cannot write would make all others fill the disk with snapshots that never get whole.
    """
    waiting: dict[tuple[int, int], list[Path]] = {}
    for step in disk.all_steps(run_dir):
        folder = disk.step_dir(run_dir, step)
        if (folder / MANIFEST_NAME).exists() or disk.is_being_pulled(folder):
            continue
        with contextlib.suppress(FileNotFoundError):  # another node's retention may be removing it just now
            for path in folder.iterdir():
                named = parse_shard_name(path.name)
                if named is not None and named[1] == rank and (named[0], step) < before:
                    waiting.setdefault((named[0], step), []).append(path)
    for age in sorted(waiting, reverse=True)[keep:]:
        for path in sorted(waiting[age]):  # the sidecar (.json) goes before its shard (.safetensors)
            path.unlink(missing_ok=True)


def _age(manifest: Manifest) -> tuple[int, int]:
    return manifest.generation, manifest.step


def _if_whole(run_dir: Path, step: int) -> Manifest | None:
    try:
        manifest = disk.read_manifest(run_dir, step)
    except SnapshotDamagedError:
        return None
    if any(disk.size_problem(run_dir, step, shard) is not None for shard in manifest.shards):
        return None
    return manifest
