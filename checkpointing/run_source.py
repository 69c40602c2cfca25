"""A run directory (a backup of one, for instance) as a source of snapshots."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME, Shard, shard_file_name
from checkpointing.shardwriter import words
from checkpointing.sources import SourceError


class RunSource:
    """Snapshots in `run_dir`. Errors of reading are SourceErrors; those of writing stay OSErrors."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.name = str(run_dir)

    def committed(self) -> list[tuple[int, int]]:
        """(generation, step) of every committed snapshot, newest first."""
        try:
            return disk.committed_ages(self.run_dir)
        except OSError as error:
            raise SourceError(words(error)) from error

    def anything(self) -> bool:
        """Whether there is a manifest at all, sound or damaged."""
        return bool(disk.committed_steps(self.run_dir))

    def manifest(self, step: int) -> bytes:
        """The manifest's bytes, unchecked."""
        try:
            return (disk.step_dir(self.run_dir, step) / MANIFEST_NAME).read_bytes()
        except OSError as error:
            raise SourceError(words(error)) from error

    def fetch(self, step: int, generation: int, shard: Shard, into: Path) -> None:
        """Copy a shard to the new file `into`."""
        try:
            source = (disk.step_dir(self.run_dir, step) / shard_file_name(generation, shard.rank)).open("rb")
        except OSError as error:
            raise SourceError(words(error)) from error
        with source, into.open("xb") as target:
            shutil.copyfileobj(source, target, 2**20)
