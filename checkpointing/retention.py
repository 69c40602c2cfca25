"""What is kept in the run directory, and how the rest goes away without ever looking like a snapshot."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME, SnapshotDamagedError, parse_shard_name


def apply_retention(run_dir: Path, keep_last: int, keep_every_steps: int) -> list[int]:
    """Remove what no longer has to stay, after a commit; returns the steps removed, newest first.

    The keep_last newest snapshots that look whole stay (damaged ones do not count), and every keep_every_steps-th
    (0: none). Newest means of the latest generation first: after a run went on from an older step, the steps beyond
    it belong to a history that was given up, and may be damaged in ways that only reading them all would show.
    Uncommitted leftovers of older generations, or older than the newest whole snapshot, go as well. OSError if a
    removal fails.
    """
    ages = {step: age for step in disk.committed_steps(run_dir) if (age := _age_if_whole(run_dir, step)) is not None}
    if not ages:
        return []
    newest_first = sorted(ages, key=lambda step: ages[step], reverse=True)
    kept = set(newest_first[:keep_last])
    if keep_every_steps:
        kept |= {step for step in ages if step % keep_every_steps == 0}
    removed = []
    for step in disk.all_steps(run_dir):
        has_manifest = (disk.step_dir(run_dir, step) / MANIFEST_NAME).is_file()
        # A folder without a manifest beyond the newest may be a snapshot under way; a damaged one is left to a person
        # as long as anything newer than it could still need it.
        if step not in kept and (step in ages or (step < newest_first[0] and (not has_manifest or step < min(kept)))):
            remove_snapshot(run_dir, step)
            removed.append(step)
    return removed


def remove_snapshot(run_dir: Path, step: int) -> None:
    """Remove a step's folder: its manifest first, so that a removal cut short leaves no snapshot behind."""
    folder = disk.step_dir(run_dir, step)
    if (folder / MANIFEST_NAME).exists():
        (folder / MANIFEST_NAME).unlink()
        disk.sync_dir(folder)
    shutil.rmtree(folder)


def remove_superseded(run_dir: Path, step: int, generation: int) -> None:
    """Remove files of earlier generations from a folder whose manifest has just been replaced."""
    for path in disk.step_dir(run_dir, step).iterdir():
        named = parse_shard_name(path.name)
        if named is not None and named[0] < generation:
            path.unlink()


def remove_uncommitted_shards(run_dir: Path, rank: int, before_step: int, keep: int) -> None:
    """Remove a rank's shards of earlier steps that were never committed, but for the `keep` newest.

    Without this a node that cannot write would make all others fill the disk with snapshots that never get whole.
    """
    waiting = []
    for step in disk.all_steps(run_dir):
        folder = disk.step_dir(run_dir, step)
        if step < before_step and not (folder / MANIFEST_NAME).exists():
            own = [path for path in folder.iterdir() if (parse_shard_name(path.name) or (0, -1))[1] == rank]
            if own:
                waiting.append(own)
    for own in waiting[keep:]:
        for path in sorted(own):  # the sidecar (.json) goes before its shard (.safetensors)
            path.unlink(missing_ok=True)


def _age_if_whole(run_dir: Path, step: int) -> tuple[int, int] | None:
    """(generation, step) of a snapshot whose files are there in full size, None of any other."""
    try:
        manifest = disk.read_manifest(run_dir, step)
    except SnapshotDamagedError:
        return None
    if any(disk.size_problem(run_dir, step, shard) is not None for shard in manifest.shards):
        return None
    return manifest.generation, step
