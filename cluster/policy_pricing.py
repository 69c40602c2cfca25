"""What it costs to keep a suspect node, and what to evict it, in seconds of the whole job. Pure.

All nodes stand still together, so the job's seconds are the unit and the number of nodes cancels. With

    p   how likely the node is really bad
    R   what a restart costs, from a decision to the first step after it (this run's median; before any,
        health.restart_cost_s)
    D   how long a failure goes without being understood at worst: the bound of a hang, and health.evidence_timeout_s
    u   1 if the workers still run, 0 if they must be started again anyway
    S   what one spare less costs: the chance that just this spare will be missing, times cluster.requeue_s
    x   the part by which a step is longer, T the time the run has left at its present pace

evicting now costs `u R + S`. Keeping a bad node costs a failure that is noticed late, and then its eviction all the
same: `p (R + D + S)`. Keeping a slow one costs `p T x / (1 + x)`. Of the two the cheaper is taken.

S: failures that cost a spare come as a Poisson process with mean m over H, the time until an evicted node is back
(cluster.repair_hours) or the run ends. With s spares one is missing if more than s fail, with one less if s do; the
difference is P(K = s) = m^s e^-m / s!.

Sources: 6.5 failures per 1,000 node-days is RSC-1's rate (Meta, "Revisiting Reliability in Large-Scale Machine Learning
Research Clusters"); an eviction is what mends 32.5% of failures (ByteDance, over 200,000 GPUs); the best published
detector of faulty machines is right in 0.904 of its alarms (Minder), which is what `likely` is taken to mean; the
fastest published restart takes about 20 s on 1,024 GPUs (TrainMover), the default of health.restart_cost_s.
"""

from __future__ import annotations

import math

import msgspec

from cluster.evidence import Weight
from cluster.jobstate import JobState
from cluster.policy_words import duration
from configs.schema import JobConfig
from health.verdict import Certainty

FLEET_FAILURES_PER_NODE_DAY = 6.5e-3
EVICTION_SHARE = 0.325
BAD = {Certainty.HINT: 0.325, Certainty.LIKELY: 0.9, Certainty.PROOF: 1.0}
_DAY_S = 86400.0


class Price(msgspec.Struct, frozen=True):
    """Both sides in seconds of the job, and how they came about."""

    evict_s: float
    keep_s: float
    words: str

    @property
    def evict(self) -> bool:
        """Whether evicting is the cheaper side."""
        return self.evict_s <= self.keep_s


def price(weight: Weight, running: bool, step: int, state: JobState, config: JobConfig) -> Price:
    """Price the eviction of a node. running: whether the workers still work; step: where the run is."""
    left_s = time_left_s(step, state)
    horizon_s = config.cluster.repair_hours * 3600.0
    horizon_s = horizon_s if left_s is None else min(horizon_s, left_s)
    restart_s, source = restart_cost_s(state, config)
    spare_s = spare_cost_s(len(state.spares), len(state.order), horizon_s, config.cluster.requeue_s)
    bad = _bad(weight, state, horizon_s)
    evict_s = running * restart_s + spare_s
    if weight.slow:
        left = horizon_s if left_s is None else left_s
        keep_s = bad * left * weight.slowdown / (1.0 + weight.slowdown)
        cause = f"{duration(left)} left at {weight.slowdown:.0%} longer steps"
    else:
        unknown_s = _unknown_s(state, config)
        keep_s = bad * (restart_s + unknown_s + spare_s)
        cause = f"a failure that is understood within {duration(unknown_s)}"
    words = (
        f"evicting costs {duration(evict_s)} of the job, keeping {duration(keep_s)}: bad with probability {bad:.2f}, "
        f"{cause}, a restart takes {duration(restart_s)} ({source}), one spare less {duration(spare_s)}"
    )
    return Price(evict_s, keep_s, words)


def restart_cost_s(state: JobState, config: JobConfig) -> tuple[float, str]:
    """What a restart costs, and how that is known."""
    measured = sorted(state.recoveries_s)
    if not measured:
        return config.health.restart_cost_s, "health.restart_cost_s"
    return measured[len(measured) // 2], f"median of {len(measured)}"


def spare_cost_s(spares: int, nodes: int, horizon_s: float, requeue_s: float) -> float:
    """What the job is expected to wait because it has one spare less."""
    mean = nodes * FLEET_FAILURES_PER_NODE_DAY * EVICTION_SHARE * horizon_s / _DAY_S
    if mean <= 0:
        return 0.0
    return requeue_s * math.exp(spares * math.log(mean) - mean - math.lgamma(spares + 1))


def time_left_s(step: int, state: JobState) -> float | None:
    """How long the run goes on at the pace that its journal shows; None if that is not known yet."""
    if state.step_s is None or not state.target_steps:
        return None
    return max(0, state.target_steps - max(step, state.newest_step)) * state.step_s


def _unknown_s(state: JobState, config: JobConfig) -> float:
    """How long it may take until a failure is noticed and its evidence collected."""
    health = config.health
    return max(health.hang_floor_s, health.hang_factor * (state.step_s or 0.0)) + health.evidence_timeout_s


def _bad(weight: Weight, state: JobState, horizon_s: float) -> float:
    """The chance that the node is bad; what earlier runs saw of it is one more way to fail within the horizon."""
    remembered = state.remembered.get(weight.node)
    rate_per_day = 0.0 if remembered is None else remembered.failures_per_day
    return 1.0 - (1.0 - BAD[weight.certainty]) * math.exp(-rate_per_day * horizon_s / _DAY_S)
