"""Which rank is slow, or whether the network, the data source or everything is. Pure: step times in, verdicts out.

In a synchronous job everybody waits for the slowest, so what a step takes says nothing about who took it. What is
judged is each rank's own time, net of waiting, in logs: a rank is a straggler if it is above its own past and, in the
same steps, further above it than its peers are above theirs. Peers are the ranks of one pipeline stage, which do the
same work; a rank without any is compared with all others. What rises for everybody is judged apart: `health.slowness`.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from configs.schema import HealthConfig, JobConfig
from health.changes import LEARNT_AFTER, PAST, Alarm, Bounds, Held, Newest, Noise, Past, ladder_for, percent
from health.slowness import Common, own_s
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import StepTimes

PARTS = ("data", "forward", "backward", "optimizer", "snapshot")
SKIPPED_STEPS = 2
"""A generation's first steps, in which kernels are compiled and memory is allocated."""

_COLUMNS = (*PARTS, "total")
_WINDOW_STEPS = 16
_USUAL_STEPS = 64
_SETTLED = 4 * LEARNT_AFTER
_FIRST_LOOK = SKIPPED_STEPS + _SETTLED
_SAMPLED = 64
_YIELD_AFTER = 512


def peer_groups(config: JobConfig) -> dict[int, int]:
    """The group of ranks that do the same work, by rank: its pipeline stage (ranks are numbered with pp outermost)."""
    per_stage = config.world_size // config.parallelism.pp
    return {rank: rank // per_stage for rank in range(config.world_size)}


class _Standing(msgspec.Struct, frozen=True, gc=False):
    """How far a rank was above its past in a step, and how much further than its peers."""

    step: int
    above: float
    excess: float


class _Rank:
    """One rank: its past, its last steps, and whether it is slow.

    gap: how far its past was above its peers' when that was last told; less if it has come nearer.
    """

    def __init__(self, node: str) -> None:
        self.node = node
        self.past = Past()
        self.undisturbed = Newest(len(_COLUMNS), _USUAL_STEPS)
        self.recent: deque[StepTimes] = deque(maxlen=_WINDOW_STEPS)
        self.lately: deque[_Standing] = deque(maxlen=_WINDOW_STEPS)
        self.held: Held[tuple[StepTimes, float | None]] = Held()
        self.alarm = Alarm()
        self.accused = False
        self.gap = 0.0

    def learn(self, times: StepTimes, excess: float | None, suspected: bool) -> list[float]:
        """Make the step part of the past once it is known to be undisturbed; returns the excess of those that are."""
        if self.alarm.ringing:
            self.held.clear()
            return []
        if not self.past.learnt:
            self._remember(times)
            return []
        released = self.held.push((times, excess), suspected)
        for each, _ in released:
            self._remember(each)
        return [noise for _, noise in released if noise is not None]

    def _remember(self, times: StepTimes) -> None:
        self.past.add(_log(own_s(times)))
        self.undisturbed.add(*(_seconds(times, part) for part in _COLUMNS))

    def rose(self, since: int, change: float) -> bool:
        """Whether the rank is above its own past, too, by half of the change, on average over these steps."""
        return statistics.fmean(each.above for each in self.lately if each.step >= since) > change / 2

    def usual_s(self, part: str) -> float:
        """What a part of a step, or its total, used to take."""
        return self.undisturbed.median(_COLUMNS.index(part))


@dataclass(frozen=True)
class Floor:
    """How noisy the steps of a group of peers are; what slowdown shows in it (0.2: 20%), and in how many steps."""

    noise: float
    slowdown: float
    steps: int


class Stragglers:
    """One generation's ranks.

    ranks: the node of each; groups: which ranks do the same work (`peer_groups`).
    """

    def __init__(self, ranks: Mapping[int, str], groups: Mapping[int, int], config: HealthConfig) -> None:
        self._config = config
        self._change = math.log1p(config.straggler_pct / 100)
        self._ranks = {rank: _Rank(ranks[rank]) for rank in sorted(ranks)}
        self._groups: dict[int, list[int]] = {}
        for rank in self._ranks:
            self._groups.setdefault(groups[rank], []).append(rank)
        self._noise = {group: Noise() for group in self._groups}
        self._common = Common(self._change, config.straggler_steps)
        self._waiting: dict[int, dict[int, StepTimes]] = {}
        self._judging: Generator[int, None, list[Verdict]] | None = None
        self._judged = -1
        self._begun = 0
        self._next_look = _FIRST_LOOK

    def feed(self, rank: int, steps: Sequence[StepTimes]) -> None:
        """Take in what one report says of a rank; what was said before may be repeated."""
        if rank in self._ranks:
            for times in steps:
                if times.step > self._judged:
                    self._waiting.setdefault(times.step, {})[rank] = times

    @property
    def due(self) -> bool:
        """Whether there is something to judge; quick, since it is asked many times a second."""
        return self._judging is not None or self._next_step() is not None

    def judge(self, may_replace: bool, ranks_at_once: int = 0) -> list[Verdict]:
        """What is new about the steps that all ranks have told (or will not: some rank is 16 steps further).

        may_replace: whether there is a spare, without which a slow node is only noted. ranks_at_once: leave off after
        about so many, and go on with the next call (0: judge all there is). What is found is the same.
        """
        verdicts: list[Verdict] = []
        looked_at = 0
        while self.due and not 0 < ranks_at_once <= looked_at:
            if self._judging is None:
                step = self._next_step()
                assert step is not None
                self._judging = self._judge_step(step, self._waiting.pop(step), may_replace)
                self._judged = step
                self._begun += 1
            try:
                looked_at += next(self._judging)
            except StopIteration as done:
                verdicts += done.value
                self._judging = None
        return verdicts

    def _next_step(self) -> int | None:
        """The oldest step that nothing more will be told of."""
        if not self._waiting:
            return None
        step = min(self._waiting)
        all_told = len(self._waiting[step]) >= len(self._ranks)
        return step if all_told or step + _WINDOW_STEPS <= max(self._waiting) else None

    def floors(self) -> dict[int, Floor]:
        """What can be seen in each group by now; empty while too little is known."""
        if self._begun < _FIRST_LOOK:
            return {}
        lowest = {group: self._ladder(group)[0] for group in self._groups}
        return {group: Floor(each.scale, math.expm1(each.change), each.steps) for group, each in lowest.items()}

    def _ladder(self, group: int) -> tuple[Bounds, ...]:
        return ladder_for(self._change, self._config.straggler_steps, self._noise[group].scale)

    def _judge_step(
        self, step: int, by_rank: Mapping[int, StepTimes], may_replace: bool
    ) -> Generator[int, None, list[Verdict]]:
        """Returns what is new about one step; yields now and then how many ranks it has looked at since."""
        if self._begun <= SKIPPED_STEPS:
            return []
        above = {}
        for count, (rank, times) in enumerate(by_rank.items(), 1):
            self._ranks[rank].recent.append(times)
            if self._ranks[rank].past.learnt:
                above[rank] = _log(own_s(times)) - self._ranks[rank].past.median
            if count % _YIELD_AFTER == 0:
                yield _YIELD_AFTER // 4  # this is the lesser part of the work
        verdicts = []
        for group, members in self._groups.items():
            ladder = self._ladder(group)
            excess = _excess(above, [rank for rank in members if rank in above])
            noise: dict[int, list[float]] = {}
            for count, rank in enumerate(members, 1):
                it = self._ranks[rank]
                judged = rank in excess and self._noise[group].known
                if rank in excess:
                    it.lately.append(_Standing(step, above[rank], excess[rank]))
                if judged and it.alarm.add(step, excess[rank], ladder, it.rose):
                    verdicts.append(self._slow(rank, step, above, ladder[0]))
                if rank in by_rank:
                    noise[rank] = it.learn(by_rank[rank], excess.get(rank), it.alarm.suspects(ladder))
                if count % _YIELD_AFTER == 0:
                    yield _YIELD_AFTER
            self._noise[group].add({rank: noise[rank] for rank in members[:_SAMPLED] if noise.get(rank)}, ladder[0].cap)
        verdicts += self._common.judge(step, by_rank, self._nobody_stands_out)
        return verdicts + self._compare_pasts(step) + self._persisting(step, may_replace)

    def _nobody_stands_out(self, since: int, change: float) -> bool:
        """Whether no rank was above its peers in these steps, by half of the change and more than noise explains.

        Where one rank is slow, others wait, and it may itself wait longer: what it does not do in time, its part in
        collectives included, comes back to it.
        """
        for group, members in self._groups.items():
            for rank in members:
                it = self._ranks[rank]
                values = [each.excess for each in it.lately if each.step >= since]
                if it.alarm.ringing:
                    return False
                chance = 2.5 * self._noise[group].scale / math.sqrt(max(len(values), 1))
                if values and statistics.fmean(values) > max(change / 2, chance):
                    return False
        return True

    def _slow(self, rank: int, step: int, above: Mapping[int, float], lowest: Bounds) -> Verdict:
        it = self._ranks[rank]
        peers = self._peers(rank)
        now = [times for times in it.recent if times.step >= it.alarm.since]
        before_s, now_s = math.exp(it.past.median), statistics.fmean(own_s(times) for times in now)
        others = statistics.median(above[peer] for peer in peers if peer in above)
        rises = {part: _mean(now, part) - it.usual_s(part) for part in PARTS}
        part = max(rises, key=lambda name: rises[name])
        share = rises[part] / max(sum(rise for rise in rises.values() if rise > 0), 1e-9)
        evidence = (
            f"rank {rank} on {it.node} works {now_s:.4g} s a step instead of {before_s:.4g} s "
            f"({percent(now_s / before_s - 1)}), since step {it.alarm.since}; "
            f"its {len(peers)} peers {percent(math.expm1(others))} in step {step}",
            f"slow is its {part}: {_mean(now, part):.4g} s instead of {it.usual_s(part):.4g} s, "
            f"{percent(share)} of the difference",
            lowest.words(),
        )
        return self._verdict(rank, step, evidence, (now_s - before_s) / max(it.usual_s("total"), 1e-9))

    def _persisting(self, step: int, may_replace: bool) -> list[Verdict]:
        """Ranks that were noted and stay slow: their node may go, once for each time it became slow."""
        verdicts = []
        for rank, it in self._ranks.items():
            if not it.alarm.ringing:
                it.accused = False
            elif may_replace and not it.accused and step - it.alarm.rang_at >= self._config.straggler_persist_steps:
                it.accused = True
                now_s = statistics.median(own_s(times) for times in it.recent)
                before_s = math.exp(it.past.median)
                line = (
                    f"rank {rank} on {it.node} has been slow since step {it.alarm.since}: {now_s:.4g} s a step instead "
                    f"of {before_s:.4g} s ({percent(now_s / before_s - 1)}), and its peers have not"
                )
                verdict = self._verdict(rank, step, (line,), (now_s - before_s) / max(it.usual_s("total"), 1e-9))
                verdicts.append(_escalated(verdict))
        return verdicts

    def _compare_pasts(self, step: int) -> list[Verdict]:
        """Ranks whose usual step is longer than their peers': from the beginning on, or since the last look.

        The first look tells of unequal work, or of an unequal device. Later ones, which are rare, find what became slow
        while noise hid it, or too slowly for a sum to notice.
        """
        if self._begun < self._next_look:
            return []
        first = self._next_look == _FIRST_LOOK
        self._next_look = self._begun + PAST
        return [
            self._unlike(rank, step, others, "from the first steps on" if first else "of late")
            for group, members in self._groups.items()
            for rank, others in self._behind(group, members, _SETTLED if first else min(self._begun, PAST))
        ]

    def _behind(self, group: int, members: Sequence[int], seen: int) -> Iterator[tuple[int, float]]:
        """Ranks whose past is further above their peers' than was told before, and where that is; seen: how many steps
        the pasts are of."""
        usual = {rank: self._ranks[rank].past.median for rank in members if self._ranks[rank].past.learnt}
        doubt = 6.0 * self._noise[group].scale / math.sqrt(seen)
        ordered = sorted(usual.values())
        for rank in usual if len(usual) > 1 else ():
            it, others = self._ranks[rank], _median_without(ordered, usual[rank])
            gap = max(0.0, usual[rank] - others)
            told = gap - it.gap > max(self._change / 2, doubt) and not it.alarm.ringing
            it.gap = gap if told else min(it.gap, gap)
            if told:
                yield rank, others

    def _unlike(self, rank: int, step: int, others: float, since: str) -> Verdict:
        it, peers = self._ranks[rank], self._peers(rank)
        own_s, others_s = math.exp(it.past.median), math.exp(others)
        line = (
            f"rank {rank} on {it.node} has worked {own_s:.4g} s a step {since}, "
            f"its {len(peers)} peers {others_s:.4g} s: its work or its device is unlike theirs"
        )
        return self._verdict(rank, step, (line,), (own_s - others_s) / max(it.usual_s("total"), 1e-9))

    def _peers(self, rank: int) -> list[int]:
        for members in self._groups.values():
            if rank in members and len(members) > 1:
                return [each for each in members if each != rank]
        return [each for each in self._ranks if each != rank]

    def _verdict(self, rank: int, step: int, evidence: tuple[str, ...], slowdown: float) -> Verdict:
        return Verdict(
            node=self._ranks[rank].node,
            rank=rank,
            cause=Cause.STRAGGLER,
            severity=Severity.NOTICE,
            step=step,
            fingerprint=Cause.STRAGGLER.value,
            evidence=evidence,
            certainty=Certainty.HINT,
            slowdown=max(0.0, slowdown),
        )


def _log(seconds: float) -> float:
    return math.log(max(seconds, 1e-6))


def _seconds(times: StepTimes, part: str) -> float:
    return float(getattr(times, f"{part}_s"))


def _mean(steps: Sequence[StepTimes], part: str) -> float:
    return statistics.fmean(_seconds(times, part) for times in steps)


def _excess(above: Mapping[int, float], members: Sequence[int]) -> dict[int, float]:
    """By rank, how much further it is above its past than its peers are above theirs; peers: see the module."""
    pool = members if len(members) > 1 else list(above)
    ordered = sorted(above[rank] for rank in pool)
    if len(ordered) < 2:
        # A job of one rank: there is only its past.
        return {rank: above[rank] for rank in members}
    return {rank: above[rank] - _median_without(ordered, above[rank]) for rank in members}


def _median_without(ordered: Sequence[float], value: float) -> float:
    """The median of sorted values, one that equals `value` left out."""
    place, count = bisect.bisect_left(ordered, value), len(ordered) - 1
    low, high = ((count - 1) // 2, count // 2)
    return (ordered[low + (low >= place)] + ordered[high + (high >= place)]) / 2


def _escalated(verdict: Verdict) -> Verdict:
    return msgspec.structs.replace(verdict, severity=Severity.NODE, certainty=Certainty.LIKELY)
