"""Promise: with fewer nodes a job goes on with the largest legal layout, and each step reads the same samples."""

from __future__ import annotations

from math import prod

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from configs.check import check_job
from configs.check_layout import check_layout
from configs.load import ConfigError, load_job, preset_paths
from configs.models import FAMILIES
from configs.schema import JobConfig
from configs.shrinking import (
    Layout,
    check_shrinking,
    effective,
    fewest_nodes,
    largest_layout,
    layout_of,
    sizes,
    words_about_sizes,
)
from trainer.sampler import step_samples

FACTORS = st.sampled_from([1, 1, 2, 3, 4])


def job(nodes: int, per_node: int, batch: int = 48, **other: int | str) -> JobConfig:
    """A job of the debug model; other: degrees, and whatever else of [parallelism] and [training]."""
    config = load_job("debug_moe" if other.get("ep", 1) != 1 else "debug_dense")
    replace, mesh = msgspec.structs.replace, {}
    for key in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "pp_schedule", "pp_microbatch_size"):
        mesh[key] = other.pop(key, getattr(type(config.parallelism)(), key))
    cluster = {key: other.pop(key) for key in ("min_nodes", "shrink") if key in other}
    return replace(
        config,
        parallelism=replace(config.parallelism, **mesh),
        cluster=replace(config.cluster, nodes=nodes, ranks_per_node=per_node, spares=1, **cluster),
        training=replace(config.training, global_batch_size=batch, microbatch_size=other.pop("microbatch_size", 1)),
    )


@st.composite
def jobs(draw: st.DrawFn) -> JobConfig:
    """Legal jobs of every kind of layout."""
    axes = {axis: draw(FACTORS) for axis in ("pp", "dp_replicate", "dp_shard", "tp")}
    axes["ep"] = draw(st.sampled_from([1, 1, 2, 4]))
    ranks = prod(axes[axis] for axis in ("pp", "dp_replicate", "dp_shard", "tp"))
    per_node = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    more: dict[str, int | str] = {
        "microbatch_size": draw(st.sampled_from([1, 2, 3, 6])),
        "pp_microbatch_size": draw(st.sampled_from([1, 2, 4])),
        "pp_schedule": draw(st.sampled_from(["1F1B", "Interleaved1F1B"])),
        "min_nodes": draw(st.integers(0, ranks // per_node)),
    }
    config = job(ranks // per_node, per_node, draw(st.sampled_from([12, 24, 48, 60])), **axes, **more)
    assume(not check_layout(config, facts(config)))
    return config


def facts(config: JobConfig) -> object:
    return FAMILIES[config.model.family][config.model.flavor]


SLOWLY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@SLOWLY
@given(config=jobs(), data=st.data())
def test_a_smaller_layout_is_legal_and_takes_no_more_than_there_is(config: JobConfig, data: st.DataObject) -> None:
    """Promise: never more ranks than there are, always legal, no axis longer, no microbatch larger than configured."""
    own = layout_of(config)
    nodes = data.draw(st.integers(0, config.cluster.nodes + 2))
    layout = largest_layout(config, nodes)
    if layout is None:
        assert nodes < config.cluster.nodes
        return
    assert fewest_nodes(config) <= layout.nodes <= nodes
    assert layout.ranks == layout.nodes * config.cluster.ranks_per_node
    assert not check_layout(effective(config, layout), facts(config))  # type: ignore[arg-type]
    for field in msgspec.structs.fields(Layout):
        assert getattr(layout, field.name) <= getattr(own, field.name), field.name
    if nodes >= own.nodes:
        assert layout == own


@SLOWLY
@given(config=jobs())
def test_more_nodes_never_make_a_smaller_job_and_the_sizes_are_all_that_there_are(config: JobConfig) -> None:
    found = [largest_layout(config, nodes) for nodes in range(config.cluster.nodes + 1)]
    taken = [layout.nodes if layout else 0 for layout in found]
    assert taken == sorted(taken)
    assert {layout.nodes for layout in sizes(config)} == set(taken) - {0}
    for layout in sizes(config):
        assert largest_layout(config, layout.nodes) == layout, "exactly so many nodes give the same layout again"


@SLOWLY
@given(config=jobs(), step=st.integers(1, 1000))
def test_every_layout_reads_the_same_samples_in_a_step(config: JobConfig, step: int) -> None:
    """Promise: the global batch and the order of samples stay; only who reads which of them changes."""
    batch = config.training.global_batch_size
    for layout in sizes(config):
        smaller = effective(config, layout)
        assert smaller.training.global_batch_size == batch
        degree = smaller.dp_degree
        read = [number for rank in range(degree) for number in step_samples(step, batch, rank, degree)]
        assert read == list(range((step - 1) * batch, step * batch))
        assert (batch // degree) % smaller.training.microbatch_size == 0


@SLOWLY
@given(config=jobs(), data=st.data())
def test_nothing_larger_would_have_fitted(config: JobConfig, data: st.DataObject) -> None:
    """Promise: the largest, against a search through all data-parallel degrees that keep the model's own axes."""
    nodes = data.draw(st.integers(1, config.cluster.nodes))
    layout, mesh = largest_layout(config, nodes), config.parallelism
    kept = mesh.pp * mesh.tp
    largest = 0
    for replicas in range(1, mesh.dp_replicate + 1):
        for shards in range(1, mesh.dp_shard + 1):
            used, odd = divmod(replicas * shards * kept, config.cluster.ranks_per_node)
            if odd or not fewest_nodes(config) <= used <= nodes:
                continue
            plain = msgspec.structs.replace(
                layout_of(config), nodes=used, dp_replicate=replicas, dp_shard=shards, ep=1, microbatch_size=1,
                pp_microbatch_size=1,
            )  # fmt: skip
            if not check_layout(effective(config, plain), facts(config)):  # type: ignore[arg-type]
                largest = max(largest, used)
    if largest:
        assert layout is not None
        assert layout.nodes >= largest
        assert (layout.pp, layout.tp) == (mesh.pp, mesh.tp), "the model's own axes are kept where they can be"


@pytest.mark.parametrize(
    ("config", "nodes", "expected"),
    [
        (job(4, 2, dp_shard=4, tp=2), 3, {"nodes": 3, "dp_shard": 3, "tp": 2}),
        (job(4, 2, 8, dp_shard=4, tp=2), 3, {"nodes": 2, "dp_shard": 2, "tp": 2}),
        (job(4, 2, 8, dp_replicate=2, dp_shard=4), 2, {"dp_replicate": 1, "dp_shard": 4}),
        (job(2, 2, 8, pp=2, dp_shard=2), 1, {"pp": 2, "dp_shard": 1}),
        (job(2, 2, 8, pp=2, tp=2), 1, {"pp": 1, "tp": 2}),
        (job(2, 2, 8, tp=4), 1, {"tp": 2}),
        (job(2, 2, 8, dp_shard=4, ep=4), 1, {"dp_shard": 2, "ep": 2}),
        (job(4, 1, 24, dp_shard=4, microbatch_size=6), 3, {"dp_shard": 3, "microbatch_size": 4}),
    ],
    ids=["three of four", "the batch decides", "replicas first", "a pipeline stays", "a pipeline gives way first",
         "tp where nothing else is left", "experts follow", "microbatches only shrink"],
)  # fmt: skip
def test_what_gives_way(config: JobConfig, nodes: int, expected: dict[str, int]) -> None:
    layout = largest_layout(config, nodes)
    assert layout is not None
    assert {key: getattr(layout, key) for key in expected} == expected


def test_a_job_never_becomes_smaller_than_it_may() -> None:
    config = job(8, 1, dp_shard=8)
    assert fewest_nodes(config) == 4
    assert largest_layout(config, 3) is None
    assert largest_layout(job(8, 1, dp_shard=8, min_nodes=2), 3) is not None
    assert largest_layout(job(8, 1, dp_shard=8, shrink=False), 7) is None
    assert sizes(job(1, 8, dp_shard=8)) == (layout_of(job(1, 8, dp_shard=8)),)


def test_what_holds_no_ranks_is_a_spare() -> None:
    config = job(4, 2, dp_shard=4, tp=2)
    smaller = effective(config, largest_layout(config, 3))
    assert (smaller.cluster.nodes, smaller.cluster.spares, smaller.world_size) == (3, 2, 6)
    assert effective(config, None) is config
    assert effective(config, layout_of(config)) is config


def test_an_impossible_bound_is_refused_with_one_that_works() -> None:
    """Promise: before any machine is taken."""
    overrides = ["--cluster.nodes=4", "--cluster.ranks_per_node=1", "--parallelism.dp_shard=4"]
    batch = ["--training.global_batch_size=8", "--training.microbatch_size=1"]
    with pytest.raises(ConfigError, match=r"cluster.min_nodes 3.*set 2, or cluster.shrink = false"):
        load_job("debug_dense", [*overrides, *batch, "--cluster.min_nodes=3"])
    with pytest.raises(ConfigError, match=r"cluster.min_nodes 5.*more than cluster.nodes = 4"):
        load_job("debug_dense", [*overrides, *batch, "--cluster.min_nodes=5"])
    for bound in (0, 1, 2, 4):
        assert check_shrinking(load_job("debug_dense", [*overrides, *batch, f"--cluster.min_nodes={bound}"])) == []


def test_a_person_is_told_how_small_a_job_may_become() -> None:
    words = words_about_sizes(job(4, 2, dp_shard=4, tp=2))
    assert words == "may shrink to 3 (dp_shard 3 x tp 2), 2 (dp_shard 2 x tp 2) of 4 nodes"
    assert "cannot run on fewer than 1" in words_about_sizes(job(1, 2, dp_shard=2))
    assert "stops when" in words_about_sizes(job(4, 2, dp_shard=4, tp=2, shrink=False))


def test_every_preset_that_has_several_nodes_can_lose_one() -> None:
    for name in preset_paths():
        config = load_job(name)
        assert check_job(config) == []
        assert config.cluster.nodes == 1 or largest_layout(config, config.cluster.nodes - 1) is not None, name
