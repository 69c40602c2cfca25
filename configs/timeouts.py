"""All time-outs of a job, derived from one another, and the order that they must be in. Pure.

Here and not in `health`: workers take their part, and they know no more of us than the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import Problem
from configs.schema import HealthConfig, JobConfig

# A report may be this many intervals late before its sender counts as silent where standing still is judged.
SILENT_INTERVALS = 3
# A report that asks nothing is answered if the last answer is about so many intervals old: each costs the supervisor.
ANSWERED_INTERVALS = 2
_UNHEARD_INTERVALS = 4


@dataclass(frozen=True)
class Timeouts:
    """Seconds. What is shorter is noticed first: the supervisor must be done before torch loses its patience.

    heartbeat: between reports. hushed: a node so long silent is no witness against others. lost: a node so long silent
    is gone. hang_floor: no rank advances, and evidence is collected; longer where steps are longer. hang_last: the
    least after which evidence that speaks for patience no longer helps. evidence: an agent's time to collect it, and
    `answer`, until it is here. settle: lost peers name no culprit, a silent node may be one. rendezvous: until all
    nodes are ready, and then for the first step. store and collective: torch's own, which end a worker that the
    supervisor has not ended. unheard: an agent looks for another supervisor. leave: to save and go. orphaned: agents
    without a supervisor.
    """

    heartbeat_s: float
    hushed_s: float
    lost_s: float
    hang_floor_s: float
    hang_last_s: float
    evidence_s: float
    answer_s: float
    settle_s: float
    rendezvous_s: float
    store_s: float
    collective_s: float
    unheard_s: float
    leave_s: float
    orphaned_s: float


def derive(config: JobConfig) -> Timeouts:
    """The time-outs of a job."""
    health, cluster = config.health, config.cluster
    interval_s, startup_s = health.heartbeat_interval_s, health.startup_timeout_s
    answer_s = health.evidence_timeout_s + interval_s
    return Timeouts(
        heartbeat_s=interval_s,
        hushed_s=min(SILENT_INTERVALS * interval_s, health.heartbeat_timeout_s),
        lost_s=health.heartbeat_timeout_s,
        hang_floor_s=health.hang_floor_s,
        hang_last_s=last_hang_bound_s(health, health.hang_floor_s),
        evidence_s=health.evidence_timeout_s,
        answer_s=answer_s,
        settle_s=health.heartbeat_timeout_s + 2 * interval_s,
        rendezvous_s=startup_s,
        store_s=startup_s,
        # No step is longer than the first one may be, and no hang is looked at for longer than this.
        collective_s=max(health.hang_factor, 1.0) * startup_s + interval_s + answer_s + health.heartbeat_timeout_s,
        # Answers come at most three intervals apart, even where one heartbeat is late.
        unheard_s=max(health.heartbeat_timeout_s, (_UNHEARD_INTERVALS - 0.5) * interval_s),
        leave_s=cluster.leave_timeout_s,
        orphaned_s=cluster.supervisor_lost_timeout_s,
    )


def last_hang_bound_s(health: HealthConfig, first_s: float) -> float:
    """How long ranks may stand still that by all evidence are at work; first_s: when evidence is asked for."""
    return max(first_s, min(health.hang_patience * first_s, health.startup_timeout_s))


def check_timeouts(config: JobConfig) -> list[Problem]:
    """Time-outs that are not in their order: each problem names both keys, and what to set."""
    health, cluster, checkpoint = config.health, config.cluster, config.checkpoint
    interval_s, lost_s, floor_s = health.heartbeat_interval_s, health.heartbeat_timeout_s, health.hang_floor_s
    startup_s = health.startup_timeout_s
    ordered = [
        ("health.heartbeat_timeout_s", lost_s, "more than two intervals", "health.heartbeat_interval_s", interval_s, 2,
         "one late heartbeat loses a node", 5 * interval_s),
        ("health.hang_floor_s", floor_s, "more than two intervals", "health.heartbeat_interval_s", interval_s, 2,
         "a late heartbeat is taken for a hang", 6 * interval_s),
        ("health.startup_timeout_s", startup_s, "more than", "health.hang_floor_s", floor_s, 1,
         "a rank that is building its model is taken for a hang", 60 * floor_s),
        ("health.startup_timeout_s", startup_s, "more than", "health.heartbeat_timeout_s", lost_s, 1,
         "a lost node is taken for a slow start", 60 * lost_s),
        ("cluster.supervisor_lost_timeout_s", cluster.supervisor_lost_timeout_s, "more than",
         "health.heartbeat_timeout_s", lost_s, 1, "agents leave before they look for the new supervisor", 60 * lost_s),
        ("cluster.lease_timeout_s", cluster.lease_timeout_s, "more than", "health.heartbeat_timeout_s", lost_s, 1,
         "a node stops before it has looked for the supervisor elsewhere", 4 * lost_s),
        ("cluster.lease_timeout_s", cluster.lease_timeout_s, f"more than {_UNHEARD_INTERVALS} intervals",
         "health.heartbeat_interval_s", interval_s, _UNHEARD_INTERVALS,
         "a node stops before it has looked for the supervisor elsewhere", 2 * _UNHEARD_INTERVALS * interval_s),
        ("cluster.supervisor_lost_timeout_s", cluster.supervisor_lost_timeout_s,
         f"more than {_UNHEARD_INTERVALS} intervals", "health.heartbeat_interval_s", interval_s, _UNHEARD_INTERVALS,
         "agents leave before they look for the new supervisor", 60 * interval_s),
    ]  # fmt: skip
    problems = [
        Problem(key, value, f"must be {how} ({other} = {least:g}), or {else_}; set {fix:g}")
        for key, value, how, other, least, times, else_, fix in ordered
        if value <= times * least
    ]
    collective_s = derive(config).collective_s
    if 2 * cluster.leave_timeout_s >= collective_s:  # a rank may take it once for a busy disk and once to be secure
        what = f"must be less than half of {collective_s:.0f}, the time-out of collectives that follows from "
        what += f"health.startup_timeout_s, or ranks that wait for a slow disk are ended; set {collective_s / 3:.0f}"
        problems.append(Problem("cluster.leave_timeout_s", cluster.leave_timeout_s, what))
    if checkpoint.peer_copies and checkpoint.peer_wait_s >= floor_s:
        what = f"must be less than health.hang_floor_s = {floor_s:g}, or a step that waits for copies is taken for a "
        problems.append(Problem("checkpoint.peer_wait_s", checkpoint.peer_wait_s, what + f"hang; set {floor_s / 2:g}"))
    return problems
