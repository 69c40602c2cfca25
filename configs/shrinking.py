"""Which smaller mesh a job goes on with when it has fewer nodes than it asked for. Pure arithmetic, no torch.

The data-parallel axes give way: fewer replicas first, then fewer shards, so that the state of a rank grows as late as
it can. What a rank computes stays what it was: the axes that cut the model are kept, since they decide which links
carry its traffic and how much memory a layer takes. They give way only where no smaller job could keep them: the
pipeline first (its cut is between whole layers), then the axes within a layer. Expert parallelism lies across the
data-parallel axes and follows them, as far as it must.

The global batch stays what it was, and so does the order of samples: each rank takes a larger part of the same batch,
in more microbatches, never in larger ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import isqrt, prod

import msgspec

from configs.check_layout import check_layout
from configs.check_precision import check_precision
from configs.errors import Problem
from configs.models import FAMILIES
from configs.schema import JobConfig

_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
_DEGREES = (*_AXES, "ep")
# The axes that keep their degree, the best choice first.
_KEPT = (("pp", "cp", "tp"), ("cp", "tp"), ())


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A mesh over `nodes` nodes, and how many sequences a forward takes on it. All else is the configuration's."""

    nodes: int
    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int
    microbatch_size: int
    pp_microbatch_size: int

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return prod(getattr(self, axis) for axis in _AXES)

    @property
    def words(self) -> str:
        """The axes that are longer than one: `dp_shard 4 x tp 2`."""
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in _AXES if getattr(self, axis) > 1) or "one rank"


def layout_of(config: JobConfig) -> Layout:
    """The layout that the configuration asks for."""
    mesh = config.parallelism
    return Layout(
        nodes=config.cluster.nodes,
        microbatch_size=config.training.microbatch_size,
        pp_microbatch_size=mesh.pp_microbatch_size,
        **{axis: getattr(mesh, axis) for axis in _DEGREES},
    )


def effective(config: JobConfig, layout: Layout | None) -> JobConfig:
    """The configuration as it is on this layout; None: on its own. The nodes that hold no ranks then are spares."""
    if layout is None or layout == layout_of(config):
        return config
    replace, cluster = msgspec.structs.replace, config.cluster
    degrees = {axis: getattr(layout, axis) for axis in _DEGREES}
    return replace(
        config,
        cluster=replace(
            cluster, nodes=layout.nodes, spares=max(0, cluster.nodes + cluster.spares - layout.nodes)
        ),
        parallelism=replace(config.parallelism, pp_microbatch_size=layout.pp_microbatch_size, **degrees),
        training=replace(config.training, microbatch_size=layout.microbatch_size),
    )  # fmt: skip


def fewest_nodes(config: JobConfig) -> int:
    """How few nodes the job may be left with: `cluster.min_nodes`, or half of `cluster.nodes`; all if it may not
    shrink."""
    cluster = config.cluster
    if not cluster.shrink:
        return cluster.nodes
    return min(cluster.nodes, cluster.min_nodes or -(-cluster.nodes // 2))


def largest_layout(config: JobConfig, nodes: int) -> Layout | None:
    """The largest layout that fits on so many nodes; None if there is none of `fewest_nodes` or more.

    Each node holds cluster.ranks_per_node ranks or none, so the layout may leave some nodes without.
    """
    own, fewest = layout_of(config), fewest_nodes(config)
    if nodes >= own.nodes:
        return own
    for kept in _KEPT:
        for layout in _candidates(config, kept, fewest, nodes):
            if _is_legal(config, layout):
                return layout
    return None


def sizes(config: JobConfig) -> tuple[Layout, ...]:
    """Every layout that the job may run on, its own first, then those that it may shrink to, from large to small."""
    found = [layout_of(config)]
    while (smaller := largest_layout(config, found[-1].nodes - 1)) is not None:
        found.append(smaller)
    return tuple(found)


def check_shrinking(config: JobConfig) -> list[Problem]:
    """What is impossible of what `cluster.min_nodes` asks for. The configuration's own layout must be legal."""
    cluster = config.cluster
    if cluster.min_nodes > cluster.nodes:
        what = f"more than cluster.nodes = {cluster.nodes}; set at most that, or 0 for half of them"
        return [Problem("cluster.min_nodes", cluster.min_nodes, what)]
    if not cluster.shrink or cluster.min_nodes in (0, cluster.nodes) or len(sizes(config)) > 1:
        return []
    anything = msgspec.structs.replace(config, cluster=msgspec.structs.replace(cluster, min_nodes=1))
    lower = [layout.nodes for layout in sizes(anything)[1:]]
    fix = f"set {lower[0]}, " if lower else ""
    what = (
        f"no smaller layout of {cluster.min_nodes} nodes or more has training.global_batch_size = "
        f"{config.training.global_batch_size} sequences and the model cut evenly; {fix}"
        f"{'or ' if lower else 'set '}cluster.shrink = false"
    )
    return [Problem("cluster.min_nodes", cluster.min_nodes, what)]


def words_about_sizes(config: JobConfig) -> str:
    """What a person should know before any machine is taken: how small the job may become."""
    if not config.cluster.shrink:
        return "stops when nodes are lost and no spare is left"
    smaller = sizes(config)[1:]
    if not smaller:
        return f"cannot run on fewer than {config.cluster.nodes} nodes"
    told = ", ".join(f"{layout.nodes} ({layout.words})" for layout in smaller[:4])
    more = f" and {len(smaller) - 4} sizes more, down to {smaller[-1].nodes}" if len(smaller) > 4 else ""
    return f"may shrink to {told}{more} of {config.cluster.nodes} nodes"


def _candidates(config: JobConfig, kept: Sequence[str], fewest: int, nodes: int) -> Iterator[Layout]:
    """Layouts worth trying, the best first: most ranks, then closest to the configuration's own."""
    mesh, batch = config.parallelism, config.training.global_batch_size
    axes = {axis: [getattr(mesh, axis)] if axis in kept else _divisors(getattr(mesh, axis))
            for axis in ("pp", "cp", "tp")}  # fmt: skip
    per_node = config.cluster.ranks_per_node
    found = []
    for pp, cp, tp in product(axes["pp"], axes["cp"], axes["tp"]):
        for readers in _divisors(batch):
            used, odd = divmod(pp * cp * tp * readers, per_node)
            if not odd and fewest <= used <= nodes and readers <= config.dp_degree:
                found.append((used, tp, cp, pp, readers))
    for used, tp, cp, pp, readers in sorted(found, reverse=True):
        for dp_shard in (n for n in _divisors(readers) if n <= mesh.dp_shard and readers // n <= mesh.dp_replicate):
            for ep, size, pp_size in product(
                _divisors(mesh.ep), _microbatches(config.training.microbatch_size, batch // readers),
                _microbatches(mesh.pp_microbatch_size, batch // readers) if pp > 1 else [mesh.pp_microbatch_size],
            ):  # fmt: skip
                yield Layout(
                    nodes=used, pp=pp, dp_replicate=readers // dp_shard, dp_shard=dp_shard, cp=cp, tp=tp, ep=ep,
                    microbatch_size=size, pp_microbatch_size=pp_size,
                )  # fmt: skip


def _is_legal(config: JobConfig, layout: Layout) -> bool:
    smaller, facts = effective(config, layout), FAMILIES[config.model.family].get(config.model.flavor)
    return not check_layout(smaller, facts) and not (facts and check_precision(smaller, facts))


def _microbatches(size: int, sequences: int) -> list[int]:
    """Sizes, none larger than the configured one, that cut a rank's sequences evenly; the largest first."""
    return [n for n in _divisors(sequences) if n <= size]


def _divisors(number: int) -> list[int]:
    """All of them, the largest first."""
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)}, reverse=True)
