"""On how many nodes a job goes on: fewer when nodes are lost and no spare is left, more again when others come. Pure.

Shrinking is what remains when a node is gone, so nothing bounds it but the restarts of the run. Growing is a choice:
it costs a restart, and a node that comes and goes would cost one each time. So it waits until the job has been at its
size for a while, until few changes of size lie behind it, and until the time that is left is worth a restart; and it
takes no node on probation.
"""

from __future__ import annotations

from collections.abc import Collection

from cluster.actions import Decision, Grow
from cluster.events import VerdictGiven
from cluster.evidence import GONE, verdicts_of
from cluster.fleet import natural_order
from cluster.jobstate import JobState, NodeStatus
from cluster.messages import Plan
from cluster.policy_pricing import restart_cost_s, time_left_s
from cluster.policy_words import duration
from configs.schema import JobConfig
from configs.shrinking import Layout, fewest_nodes, largest_layout
from health.verdict import Severity

_HOUR_S = 3600.0


def gone_nodes(given: VerdictGiven) -> frozenset[str]:
    """All nodes that an incident says are lost or must go."""
    return frozenset(
        each.node for each in verdicts_of(given) if each.severity is Severity.NODE and each.cause in GONE
    )  # fmt: skip


def smaller_order(out: Collection[str], state: JobState, config: JobConfig) -> tuple[str, ...]:
    """Who holds ranks, by rank, without the nodes `out`; none if the job cannot run on so few.

    Those that stay keep their order. Where the layout takes fewer than there are, nodes with a past go first.
    """
    unusable = (NodeStatus.LOST, NodeStatus.EVICTED)
    left = [node for node in state.order if node not in out and state.status(node) not in unusable]
    layout = largest_layout(config, len(left))
    if layout is None:
        return ()
    chosen = frozenset(sorted(left, key=state.doubtful.__contains__)[: layout.nodes])
    return tuple(node for node in left if node in chosen)


def why_not_smaller(config: JobConfig) -> str:
    """Why there is no smaller order, as the end of a sentence."""
    cluster = config.cluster
    if not cluster.shrink:
        return "cluster.shrink is false"
    return f"no layout of {fewest_nodes(config)} nodes or more fits on those that are left (cluster.min_nodes)"


def size_words(nodes: int, config: JobConfig) -> str:
    """`2 of 4 nodes (dp_shard 4 x tp 2)`."""
    layout = largest_layout(config, nodes)
    mesh = f" ({layout.words})" if layout is not None and layout.nodes == nodes else ""
    return f"{nodes} of {config.cluster.nodes} nodes{mesh}"


def size_for(usable: int, config: JobConfig) -> tuple[int, str]:
    """On how many of so many nodes a job begins, 0 if on none, and why on fewer than it asked for."""
    layout = largest_layout(config, usable)
    if layout is None:
        return 0, ""
    few = layout.nodes < config.cluster.nodes
    return layout.nodes, f"only {size_words(layout.nodes, config)} can be used" if few else ""


def resumed_words(plan: Plan, state: JobState, newest_step: int) -> str:
    """Where a job goes on whose size changes, and what that costs; "" for one of the same size. newest_step: the
    newest one that was begun."""
    if not state.order or plan.layout == state.layout:
        return ""
    step = plan.ram_step if plan.ram_step >= 0 else max(state.newest_snapshot, 0)
    lost = max(0, newest_step - 1 - step)
    return f"; it goes on from step {step}" + (f", finished steps that are computed again: {lost}" if lost else "")


def unproven(state: JobState, config: JobConfig) -> bool:
    """Whether the job is smaller than it should be, and has not finished a step in this size yet."""
    return 0 < len(state.order) < config.cluster.nodes and not state.proven_size


def decide_growth(state: JobState, config: JobConfig, now_wall_s: float) -> Decision | None:
    """To go on with more nodes, if it is time to; None to stay as it is."""
    now, wanted = len(state.order), config.cluster.nodes
    if not (config.cluster.shrink and 0 < now < wanted and state.proven_size) or state.growing:
        return None
    fresh = grown_by(state)
    layout = largest_layout(config, now + len(fresh))
    if layout is None or layout.nodes <= now or state.open_incidents:
        return None
    because = _may_grow(state, config, now_wall_s, layout)
    if because is None:
        return None
    added = fresh[: layout.nodes - now]
    reason = (
        f"{', '.join(added)} can take ranks again: all save, and the job grows from {now} to "
        f"{size_words(layout.nodes, config)}."
    )
    return Decision(Grow((*state.order, *added), reason), (f"nodes without ranks: {', '.join(fresh)}", *because))


def grown_by(state: JobState) -> tuple[str, ...]:
    """Nodes that a growing job may take: they are ready, and nothing is held against them."""
    ready = (name for name in state.with_status(NodeStatus.READY) if name not in state.order)
    return tuple(sorted((name for name in ready if name not in state.doubtful), key=natural_order))


def _may_grow(state: JobState, config: JobConfig, now_wall_s: float, layout: Layout) -> tuple[str, ...] | None:
    cluster = config.cluster
    since_s = now_wall_s - state.resizes[-1].t_wall_s if state.resizes else float("inf")
    recent = [each for each in state.resizes if now_wall_s - each.t_wall_s < _HOUR_S]
    if since_s < cluster.grow_after_minutes * 60 or len(recent) >= cluster.max_resizes_per_hour:
        return None
    cost_s, source = restart_cost_s(state, config)
    left_s = time_left_s(state.newest_step, state)
    # Steps take about as much longer as there are fewer ranks.
    gain_s = None if left_s is None else left_s * (1.0 - len(state.order) / layout.nodes)
    if gain_s is not None and gain_s <= cost_s:
        return None
    worth = "the time that is left is not known" if gain_s is None else f"it saves about {duration(gain_s)}"
    at_size = f"{duration(since_s)} at this size" if state.resizes else "never another size"
    return (
        f"{at_size} (cluster.grow_after_minutes = {cluster.grow_after_minutes:g})",
        f"changes of size in the last hour: {len(recent)} of {cluster.max_resizes_per_hour}",
        f"a restart takes {duration(cost_s)} ({source}), {worth}",
    )
