"""Promise: norms of layers and loads of experts are those of the whole model, however it is laid out."""

from __future__ import annotations

import math

import msgspec
import pytest

from parallelism.engine import build_engine
from parallelism.layers import LayerGauge
from parallelism.mesh import World
from tests.distributed.layouts import BATCH, SEQ_LEN, batch, tiny
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

MOE = {"family": "deepseek_v3", "layers": 2}


class Seen(msgspec.Struct, frozen=True):
    norms: dict[str, float]
    loads: dict[str, tuple[int, ...]]
    whole: float


def look(world: World, family: str, layers: int, layout: dict[str, int]) -> Seen:
    config = tiny(family, layers=layers, microbatch_size=2, **layout)
    engine = build_engine(config, world)
    engine.seed_step(1)
    engine.forward_backward(batch(engine, 1))
    whole = float(engine.clip_grad_norm(1e9))
    seen = LayerGauge(config, engine.parts, world.world_size // config.parallelism.pp).look()
    return Seen(seen.norms, seen.loads, whole)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama3", {"dp_shard": 2}), ("llama3", {"pp": 2}), ("deepseek_v3", {"dp_shard": 2, "ep": 2})],
    ids=["fsdp", "pp", "ep"],
)
def test_a_look_sees_the_whole_model(family: str, layout: dict[str, int]) -> None:
    """All ranks see the same; the layers' norms make up the whole norm, and are those of one rank alone."""
    (alone,) = run_ranks(1, look, family, 2, {})
    first, second = run_ranks(2, look, family, 2, layout)
    assert first == second
    assert list(first.norms) == ["the embeddings", "layer 0", "layer 1", "the output"]
    assert math.sqrt(sum(norm**2 for norm in first.norms.values())) == pytest.approx(first.whole, rel=1e-5)
    assert first.norms == pytest.approx(alone.norms, rel=1e-3)
    assert first.loads.keys() == alone.loads.keys()
    if family == "deepseek_v3":
        (counts,) = first.loads.values()
        assert sum(counts) == BATCH * SEQ_LEN * 3
