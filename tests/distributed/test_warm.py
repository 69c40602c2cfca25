"""What a restart does not have to import any more."""

from __future__ import annotations

import sys

import pytest

from configs.schema import JobConfig
from parallelism.engine import build_engine
from parallelism.mesh import World, world_size_of
from tests.distributed.layouts import tiny, train
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed


def imported_late(world: World, config: JobConfig) -> list[str]:
    """Modules that building an engine and three steps load, in a child of the forkserver."""
    before = set(sys.modules)
    train(build_engine(config, world), range(3))
    return sorted(set(sys.modules) - before)


@pytest.mark.parametrize(
    "config",
    [
        tiny(pp=2, dp_shard=2),
        tiny(layers=4, pp=2, pp_schedule="Interleaved1F1B"),
        tiny("deepseek_v3", dp_shard=2, ep=2),
        tiny("qwen3", tp=2),
    ],
    ids=["pp2_fsdp2", "interleaved", "ep2", "qwen3_tp2"],
)
def test_preload_covers_a_workers_imports(config: JobConfig) -> None:
    """A preloaded process imports at most a module or two more: seconds of imports are off the recovery path."""
    for late in run_ranks(world_size_of(config.parallelism), imported_late, config):
        assert len(late) <= 2, late
