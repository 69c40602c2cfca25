"""Hangs and lost nodes, from what the supervisor itself saw and when: all times are its own monotonic seconds.

No other machine's clock is ever read: a beat counts from the moment its message arrived here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from configs.schema import HealthConfig
from configs.timeouts import SILENT_INTERVALS, last_hang_bound_s
from health.verdict import Cause, Severity, Verdict
from trainer.events import Beat, Phase

RECENT_STEPS = 32
_STOPPED_STATES = frozenset("TZX")
_STATE_WORDS = {"T": "stopped", "t": "traced", "Z": "dead", "X": "dead", "D": "uninterruptible wait", "": "unknown"}
_STEP_PHASES = frozenset({Phase.DATA, Phase.FORWARD_BACKWARD, Phase.VOTE, Phase.OPTIMIZER})


class RankSeen(Protocol):
    """One rank in a message: its latest beat (None before the first), its state letter in /proc ("" unknown)."""

    @property
    def rank(self) -> int: ...
    @property
    def process_state(self) -> str: ...
    @property
    def beat(self) -> Beat | None: ...


def hang_bound_s(recent_step_s: Sequence[float], config: HealthConfig) -> float:
    """How long no rank may advance: hang_factor times the slowest of the last RECENT_STEPS steps, at least
    hang_floor_s; startup_timeout_s while no step of the generation has finished."""
    if not recent_step_s:
        return config.startup_timeout_s
    return max(config.hang_floor_s, config.hang_factor * max(recent_step_s[-RECENT_STEPS:]))


def lost_nodes(
    now_s: float,
    last_heard_s: Mapping[str, float],
    config: HealthConfig,
    step: int = -1,
    watching_since_s: float = float("-inf"),
) -> list[Verdict]:
    """A NODE_LOST for each node silent for more than heartbeat_timeout_s.

    watching_since_s (see `Attention`): silence before it is not held against a node.
    """
    verdicts = []
    for node, heard_s in sorted(last_heard_s.items()):
        silence_s = now_s - max(heard_s, watching_since_s)
        if silence_s > config.heartbeat_timeout_s:
            line = (
                f"no heartbeat from {node} for {silence_s:.1f} s (limit {config.heartbeat_timeout_s:g} s, "
                f"one is due every {config.heartbeat_interval_s:g} s)"
            )
            verdicts.append(
                Verdict(
                    node=node, rank=-1, cause=Cause.NODE_LOST, severity=Severity.NODE, step=step,
                    fingerprint=Cause.NODE_LOST.value, evidence=(line,),
                )
            )  # fmt: skip
    return verdicts


class Attention:
    """Since when the observer has looked without a break: a supervisor that was itself stopped or starved must not
    blame the silence on the nodes."""

    def __init__(self, now_s: float, longest_break_s: float) -> None:
        self.since_s = now_s
        self._last_s = now_s
        self._longest_break_s = longest_break_s

    def tick(self, now_s: float) -> float:
        """Note that the observer looks now; returns since when it has been looking."""
        if now_s - self._last_s > self._longest_break_s:
            self.since_s = now_s
        self._last_s = now_s
        return self.since_s


@dataclass(frozen=True)
class Standing:
    """Ranks that stand still: what the beats alone say of it, since when, for how long, and where each rank is.

    bound_s: when evidence counts; last_s: when it is called a hang whatever the evidence says. fact: how long no rank
    advanced, without a word on who is suspected.
    """

    verdict: Verdict
    fact: str
    since_s: float
    still_s: float
    bound_s: float
    last_s: float
    phases: Mapping[int, Phase | None]


class _Rank:
    """What is known of one rank: its latest beat, when it last advanced, and how it stands."""

    __slots__ = (
        "advanced_s",
        "beat",
        "finished_steps",
        "node",
        "recent_step_s",
        "slowest_s",
        "state",
        "stopped_since_s",
    )

    def __init__(self, node: str, now_s: float) -> None:
        self.node = node
        self.beat: Beat | None = None
        self.state = ""
        self.stopped_since_s: float | None = None
        self.advanced_s = now_s
        self.recent_step_s: list[float] = []
        self.slowest_s = 0.0
        self.finished_steps = 0

    @property
    def position(self) -> tuple[int, int]:
        return (-1, -1) if self.beat is None else (self.beat.step, int(self.beat.phase))

    def see(self, now_s: float, beat: Beat | None, state: str) -> bool:
        """Whether the rank has advanced."""
        before = self.beat
        self.state = "" if before is not None and before.phase is Phase.FINISHED else state
        if self.state and self.state in _STOPPED_STATES:
            self.stopped_since_s = now_s if self.stopped_since_s is None else self.stopped_since_s
        else:
            self.stopped_since_s = None
        if beat is None or (before is not None and _stands(before, beat)):
            return False
        self.beat = beat
        self.advanced_s = now_s
        if beat.last_step_s > 0 and (before is None or beat.last_step_s != before.last_step_s):
            self._record(beat.last_step_s)
        return True

    def _record(self, step_s: float) -> None:
        self.finished_steps += 1
        recent = self.recent_step_s
        # Compilation and first allocations make a generation's first step slow: it must not set the bound for long.
        if len(recent) == RECENT_STEPS or (self.finished_steps == 5 and len(recent) > 1):
            recent.pop(0)
        recent.append(step_s)
        self.slowest_s = max(recent)


class Progress:
    """The progress of one generation's ranks, and whether it has stopped.

    ranks: the node of each rank. Beats of other generations (left over in the slots) are not looked at.
    """

    def __init__(self, generation: int, ranks: Mapping[int, str], config: HealthConfig, now_s: float) -> None:
        self.generation = generation
        self._config = config
        self._ranks = {rank: _Rank(ranks[rank], now_s) for rank in sorted(ranks)}
        # In the order of hearing: whoever is silent is found at the front.
        self._heard_s = dict.fromkeys(ranks.values(), now_s)
        self._stopped: dict[int, float] = {}
        self._newest_step = -1
        self._last_advance_s = now_s if ranks else 0.0
        self._slowest_s: float | None = None
        self._attention = Attention(now_s, config.heartbeat_timeout_s)

    def feed(self, now_s: float, node: str, beats: Iterable[RankSeen]) -> None:
        """Take in one agent's message, which arrived now."""
        if node not in self._heard_s:
            return
        del self._heard_s[node]
        self._heard_s[node] = now_s
        for seen in beats:
            rank = self._ranks.get(seen.rank)
            if rank is None or rank.node != node:
                continue
            beat = seen.beat if seen.beat is not None and seen.beat.generation == self.generation else None
            if rank.see(now_s, beat, seen.process_state) and beat is not None:
                self._last_advance_s = max(self._last_advance_s, now_s)
                self._newest_step = max(self._newest_step, beat.step)
                self._slowest_s = None
            if rank.stopped_since_s is not None:
                self._stopped[seen.rank] = rank.stopped_since_s
            elif self._stopped:
                self._stopped.pop(seen.rank, None)

    @property
    def newest_step(self) -> int:
        """The newest step that any rank was in; -1 before the first beat."""
        return self._newest_step

    @property
    def last_advance_s(self) -> float:
        """When any rank was last seen to advance."""
        return self._last_advance_s

    def hushed(self, now_s: float) -> list[str]:
        """Nodes that are silent, if only for SILENT_INTERVALS: nothing is known of their ranks for now."""
        config, nodes = self._config, []
        limit_s = min(config.heartbeat_timeout_s, SILENT_INTERVALS * config.heartbeat_interval_s)
        for node, heard_s in self._heard_s.items():
            if now_s - heard_s <= limit_s:
                break
            nodes.append(node)
        return nodes

    def bound_s(self) -> float:
        """How long the ranks may stand still now."""
        return hang_bound_s(self._recent(), self._config)

    def judge(self, now_s: float) -> Verdict | None:
        """What the beats alone say of ranks that stand still, see `standing`."""
        standing = self.standing(now_s)
        return None if standing is None else standing.verdict

    def standing(self, now_s: float) -> Standing | None:
        """Whether no rank has advanced for the bound and one heartbeat (what an advance needs to get here).

        None as long as a node is `hushed`: that may become a lost node's matter. But an agent that falls silent again
        and again, and is never lost, does not keep a hang from being told for ever: heartbeat_timeout_s past the last
        bound the others are judged without it. A rank that is stopped or dead by its /proc state needs no more proof
        than hang_floor_s without progress, even during start-up. Ranks that all have finished may take
        startup_timeout_s to leave.
        """
        config = self._config
        since_s = self._attention.tick(now_s)
        hushed = self.hushed(now_s)
        still_s = now_s - max(self.last_advance_s, since_s)
        if still_s <= min(config.hang_floor_s, config.startup_timeout_s) + config.heartbeat_interval_s:
            return None  # no bound is shorter, and this is asked many times a second
        bound_s, derived = self._derive_bound(now_s)
        last_s = last_hang_bound_s(config, bound_s)
        patience_s = last_s + config.heartbeat_timeout_s if hushed else bound_s + config.heartbeat_interval_s
        if not self._ranks or still_s <= patience_s:
            return None
        suspects, why = self._suspects(hushed)
        nodes = {self._ranks[rank].node for rank in suspects}
        started = self._started()
        stopped = any(self._ranks[rank].stopped_since_s is not None for rank in suspects)
        cause = Cause.HANG if started or stopped else Cause.STARTUP_TIMEOUT
        where = f"rank {suspects[0]} on {self._ranks[suspects[0]].node}: {why}" if len(nodes) == 1 else why
        fact = f"no rank advanced for {still_s:.1f} s (limit {bound_s:.1f} s: {derived})"
        verdict = Verdict(
            node=nodes.pop() if len(nodes) == 1 else "",
            rank=suspects[0] if suspects and len({self._ranks[rank].node for rank in suspects}) == 1 else -1,
            cause=cause,
            severity=Severity.WORKERS,
            step=self.newest_step,
            fingerprint=cause.value,
            evidence=(f"{fact}; {where}", *self.table(now_s)),
        )
        phases = {number: rank.beat.phase if rank.beat else None for number, rank in self._ranks.items()}
        return Standing(
            verdict=verdict,
            fact=fact,
            since_s=self.last_advance_s,
            still_s=still_s,
            bound_s=bound_s,
            last_s=last_s,
            phases=phases,
        )

    def table(self, now_s: float) -> list[str]:
        """One line a rank: where it stands, for how long, and its process state."""
        lines = []
        for number, rank in self._ranks.items():
            place = "no heartbeat yet"
            if rank.beat is not None:
                place = f"step {rank.beat.step} {Phase(rank.beat.phase).name.lower()}"
            state = _STATE_WORDS.get(rank.state, "running or waiting")
            letter = rank.state or "?"
            age_s = now_s - rank.advanced_s
            lines.append(f"rank {number} on {rank.node}: {place} for {age_s:.1f} s, process state {letter} ({state})")
        return lines

    def _recent(self) -> list[float]:
        """The slowest recent step of all ranks; none before the first."""
        if self._slowest_s is None:
            self._slowest_s = max((rank.slowest_s for rank in self._ranks.values()), default=0.0)
        return [self._slowest_s] if self._slowest_s else []

    def _started(self) -> bool:
        return bool(self._recent())

    def _derive_bound(self, now_s: float) -> tuple[float, str]:
        config, recent = self._config, self._recent()
        bound_s, derived = hang_bound_s(recent, config), "health.startup_timeout_s, no step has finished yet"
        if recent:
            derived = f"{config.hang_factor:g} x the slowest recent step of {recent[0]:.2f} s"
            derived += f", at least {config.hang_floor_s:g} s"
        everyone = self._ranks.values()
        if everyone and all(rank.beat is not None and rank.beat.phase is Phase.FINISHED for rank in everyone):
            return config.startup_timeout_s, "health.startup_timeout_s, all ranks have finished but do not leave"
        stopped_s = min(self._stopped.values(), default=now_s)
        if now_s - stopped_s > config.hang_floor_s and config.hang_floor_s < bound_s:
            return config.hang_floor_s, "health.hang_floor_s, a process is stopped or dead"
        return bound_s, derived

    def _suspects(self, hushed: Sequence[str]) -> tuple[list[int], str]:
        """The ranks that hold the others up, and why they are suspected; none if all of them wait. What was last heard
        of nodes that are hushed is old."""
        everyone = {number: rank for number, rank in self._ranks.items() if rank.node not in hushed}
        if not everyone:
            return [], "all nodes are silent"
        for letters, why in ((_STOPPED_STATES, "its process is stopped or dead"), (frozenset("tD"), "it is blocked")):
            found = [number for number, rank in everyone.items() if rank.state in letters and rank.state]
            if found and len(found) < len(everyone):
                return found, why
        least = min(rank.position for rank in everyone.values())
        behind = [number for number, rank in everyone.items() if rank.position == least]
        if len(behind) * 2 < len(everyone):
            return behind, f"furthest behind, with {len(behind)} of {len(everyone)} ranks"
        return [], "all ranks wait"


def _stands(before: Beat, beat: Beat) -> bool:
    """Whether a rank has not advanced. Outside the step (building, loading, a long save) any new beat is an advance;
    inside, only another step or phase is."""
    if before.step != beat.step or before.phase is not beat.phase:
        return False
    return beat.phase in _STEP_PHASES or before.monotonic_s == beat.monotonic_s
