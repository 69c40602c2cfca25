"""Steps of as many ranks as were recorded, with the noise that was recorded, and with what a test makes slow.

The noise is drawn in stretches of `BLOCK` recorded steps, so that slow waves stay what they are. How long ranks wait
for each other follows from their own times: a step takes what its slowest rank works, and the exchange.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.events import StepTimes

RECORDED = Path(__file__).parent / "recorded" / "step_times.txt"
BLOCK = 20
PARTS = ("data", "forward", "backward", "optimizer", "snapshot")


@dataclass(frozen=True)
class Slow:
    """From `step` on, up to before `until`, a part of these ranks takes so many times as long, and so much more.

    part "all" is all that a rank does itself, "exchange" what it does not: there ranks do not matter.
    """

    step: int
    ranks: tuple[int, ...]
    part: str
    factor: float = 1.0
    more_s: float = 0.0
    until: int = 1 << 60


@dataclass(frozen=True)
class Machine:
    """usual_s: what each part takes, by rank. noise: logs of how much more it took, by recorded step and rank."""

    usual_s: Mapping[int, Mapping[str, float]]
    noise: tuple[Mapping[int, float], ...]
    exchange_s: float

    @staticmethod
    def recorded() -> Machine:
        """The machine that was recorded."""
        rows = [[_parts(word) for word in line.split()] for line in RECORDED.read_text().splitlines()]
        ranks = range(len(rows[0]))
        usual = {rank: {part: statistics.median(row[rank][part] for row in rows) for part in PARTS} for rank in ranks}
        own = [{rank: sum(row[rank].values()) for rank in ranks} for row in rows]
        middle = {rank: statistics.median(row[rank] for row in own) for rank in ranks}
        noise = tuple({rank: math.log(row[rank] / middle[rank]) for rank in ranks} for row in own)
        return Machine(usual, noise, exchange_s=0.3 * statistics.median(middle.values()))

    def quiet(self, deviation: float) -> Machine:
        """The same shapes of noise, tails and waves included, but so small that half of all is within `deviation`."""
        middle = statistics.median(abs(value) for row in self.noise for value in row.values())
        factor = deviation / middle
        return replace(self, noise=tuple({rank: factor * value for rank, value in row.items()} for row in self.noise))

    def steps(self, count: int, seed: int, *slow: Slow) -> Iterator[dict[int, StepTimes]]:
        """Steps 1 to count."""
        dice = random.Random(seed)
        place = 0
        for step in range(1, count + 1):
            if (step - 1) % BLOCK == 0:
                place = dice.randrange(len(self.noise) - BLOCK)
            yield self._step(step, self.noise[place + (step - 1) % BLOCK], slow)

    def _step(self, step: int, noise: Mapping[int, float], slow: tuple[Slow, ...]) -> dict[int, StepTimes]:
        now = [each for each in slow if each.step <= step < each.until]
        own = {
            rank: {part: _slowed(math.exp(noise[rank]) * usual, rank, part, now) for part, usual in parts.items()}
            for rank, parts in self.usual_s.items()
        }
        exchange_s = _slowed(self.exchange_s, -1, "exchange", now)
        total_s = max(sum(parts.values()) for parts in own.values()) + exchange_s
        return {
            rank: StepTimes(
                step=step, wait_s=total_s - sum(parts.values()), total_s=total_s,
                **{f"{part}_s": seconds for part, seconds in parts.items()},
            )
            for rank, parts in own.items()
        }  # fmt: skip


def _slowed(seconds: float, rank: int, part: str, slow: list[Slow]) -> float:
    for each in slow:
        everything = each.part == "all" and part != "exchange"
        if (everything or each.part == part) and (part == "exchange" or rank in each.ranks):
            seconds = seconds * each.factor + each.more_s
    return seconds


def _parts(word: str) -> dict[str, float]:
    data, forward, backward, _, optimizer, snapshot, _ = (int(field) / 1e6 for field in word.split(","))
    return {"data": data, "forward": forward, "backward": backward, "optimizer": optimizer, "snapshot": snapshot}
