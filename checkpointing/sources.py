"""Where a shard of a committed snapshot can be had from, if the run directory's own file will not do."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from checkpointing.layout import Shard


class SourceError(Exception):
    """A source cannot give what it was asked for; the message is one line that says why."""


class ShardSource(Protocol):
    """A place with whole shards of committed snapshots: the node's own disk, peers, a bucket.

    name: what a person calls it in a sentence ("from S3").
    """

    name: str

    def fetch(self, step: int, generation: int, shard: Shard, into: Path) -> None:
        """Write the shard's bytes to the file `into`, which is new. The caller verifies them, whatever was promised.

        Raises:
            SourceError: if it has no such shard, or cannot be reached.
        """


class SnapshotSource(ShardSource, Protocol):
    """A source that also knows which snapshots are committed there: the run directory, a bucket."""

    def committed(self) -> list[tuple[int, int]]:
        """(generation, step) of every committed snapshot, newest first. Raises SourceError."""

    def anything(self) -> bool:
        """Whether there is a manifest at all, sound or damaged. Raises SourceError."""

    def manifest(self, step: int) -> bytes:
        """The manifest's bytes, unchecked. Raises SourceError."""
