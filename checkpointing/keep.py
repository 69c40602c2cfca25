"""Which snapshots stay: pure, and the same rule for every tier that keeps more than the newest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from checkpointing.layout import Manifest

VALIDATION_LOSS = "validation_loss"
"""Name of the scalar that holds a snapshot's validation loss, null if it was not measured; the same on all ranks."""


class KeptInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the rule needs to know of a whole snapshot. validation_loss: None where it was not measured."""

    step: int
    generation: int
    validation_loss: float | None = None


def kept_info(manifest: Manifest) -> KeptInfo:
    """What the rule needs to know of a committed snapshot. A loss that cannot be read counts as not measured."""
    try:
        raw = manifest.shards[0].scalars.get(VALIDATION_LOSS, msgspec.Raw(b"null"))
        loss = msgspec.json.decode(raw, type=float | None)
    except msgspec.DecodeError:
        loss = None
    return KeptInfo(step=manifest.step, generation=manifest.generation, validation_loss=loss)


def kept_steps(snapshots: Sequence[KeptInfo], keep_last: int, keep_every_steps: int, keep_best: int) -> frozenset[int]:
    """Steps that stay: the keep_last newest, every keep_every_steps-th (0: none), and the keep_best best (0: none).

    Newest means of the latest generation first, then by step: after a run went on from an older step, the steps
    beyond it belong to a history that was given up. Best means the lowest validation loss, of equal ones the newer;
    a loss that is missing or not finite is never best. `snapshots` are the whole ones only; damaged ones do not count.
    """
    newest_first = sorted(snapshots, key=_age, reverse=True)
    kept = {info.step for info in newest_first[:keep_last]}
    if keep_every_steps:
        kept |= {info.step for info in snapshots if info.step % keep_every_steps == 0}
    losses = {info.step: loss for info in newest_first if (loss := _finite(info.validation_loss)) is not None}
    # sorted() is stable: of equal losses the newer stays in front.
    kept |= set(sorted(losses, key=losses.__getitem__)[:keep_best])
    return frozenset(kept)


def _age(info: KeptInfo) -> tuple[int, int]:
    return info.generation, info.step


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
