"""What the agent's side of snapshots has to say, for the journal."""

from __future__ import annotations

import enum

import msgspec

from checkpointing.layout import Tier


class StoreEventKind(enum.StrEnum):
    """What happened to a snapshot in the background."""

    PERSISTED = "persisted"
    COMMITTED = "committed"
    FAILED = "failed"


class StoreEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened: for the journal. rank -1: concerns the whole snapshot. detail: one line for a person."""

    kind: StoreEventKind
    step: int
    generation: int
    rank: int
    seconds: float
    detail: str
    size_bytes: int = 0
    tier: Tier = Tier.RUN
