"""Dead and exploding layers, and experts that get no work: judged over time, in words for a person. Pure arithmetic.

What is found is only told: training goes on, as nothing says whose fault it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from trainer.events import Oddity

# A layer is dead whose gradients are so much smaller than the median layer's.
_DEAD = 1e-6
# A layer explodes whose gradients are so many times the median layer's, and so many times what they used to be.
_EXPLODES = 10.0
_KNOWN_LOOKS = 4
_KEPT_LOOKS = 16
# Experts have collapsed when the load is spread over less than this part of those that are free to share it.
_LEAST_SPREAD = 0.1
_LOOKS_IN_A_ROW = 2


class LayerFinding(msgspec.Struct, frozen=True):
    """What is wrong with one layer, in words."""

    oddity: Oddity
    detail: str


class LayerWatch:
    """Judges looks in order. A finding needs two looks in a row, and is told once until it is over."""

    def __init__(self, top_k: int) -> None:
        """top_k: experts that each token goes to; 0 for a dense model."""
        self._top_k = top_k
        self._ratios: dict[str, deque[float]] = {}
        self._in_a_row: dict[tuple[str, Oddity], int] = {}

    def judge(self, norms: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> list[LayerFinding]:
        """What is newly wrong. norms: 2-norm of each layer's gradients; loads: tokens of each expert of a layer."""
        middle = median(norms.values())
        odd: dict[tuple[str, Oddity], str] = {}
        for name, norm in norms.items():
            words = self._layer_words(name, norm, middle)
            if words:
                odd[name, Oddity.BAD_LAYER] = words
        for name, counts in loads.items():
            if spread(counts, self._top_k) < _LEAST_SPREAD:
                odd[name, Oddity.EXPERT_COLLAPSE] = _load_words(name, counts)
        self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in odd}
        return [LayerFinding(key[1], words) for key, words in odd.items() if self._in_a_row[key] == _LOOKS_IN_A_ROW]

    def _layer_words(self, name: str, norm: float, middle: float) -> str:
        if norm <= _DEAD * middle:
            return f"{name} is dead: its gradients have norm {norm:.3g}, the median layer's {middle:.3g}"
        if not middle:
            return ""  # most layers are dead: there is nothing to hold this one against
        ratio = norm / middle
        known = self._ratios.setdefault(name, deque(maxlen=_KEPT_LOOKS))
        if len(known) >= _KNOWN_LOOKS and ratio > _EXPLODES and ratio > _EXPLODES * median(known):
            return (
                f"{name} explodes: its gradients have norm {norm:.3g}, {ratio:.0f} times the median layer's; "
                f"{median(known):.2g} times is usual"
            )
        known.append(ratio)
        return ""


def spread(counts: Sequence[int], top_k: int) -> float:
    """How evenly tokens are spread over experts: 1 evenly, 0 if the same top_k experts get all of them.

    exp of the entropy is the number of experts that an even spread of the same entropy would take.
    """
    total, free = sum(counts), len(counts) - top_k
    if total == 0 or free <= 0:
        return 1.0
    return (math.exp(_entropy(counts)) - top_k) / free


class Balance(msgspec.Struct, frozen=True):
    """How evenly the worst layer spreads its tokens over its experts.

    entropy: of the load, as a part of the entropy of an even one: 1 evenly, 0 if one expert gets all. max_over_mean:
    load of the busiest expert over the mean: 1 evenly, which is how much longer than need be others wait for it.
    """

    entropy: float
    max_over_mean: float


def balance(loads: Mapping[str, Sequence[int]]) -> Balance | None:
    """Of the layers whose experts got tokens, by name; None if there is no such layer."""
    counted = [counts for counts in loads.values() if sum(counts) and len(counts) > 1]
    if not counted:
        return None
    return Balance(
        min(_entropy(counts) / math.log(len(counts)) for counts in counted),
        max(max(counts) * len(counts) / sum(counts) for counts in counted),
    )


def _entropy(counts: Sequence[int]) -> float:
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


def _load_words(name: str, counts: Sequence[int]) -> str:
    total, idle = sum(counts), sum(count == 0 for count in counts)
    busiest = max(range(len(counts)), key=lambda expert: counts[expert])
    share = f"expert {busiest} has {100 * counts[busiest] / total:.0f}% of the load"
    return f"the experts of {name} have collapsed: {idle} of {len(counts)} idle, {share}"
