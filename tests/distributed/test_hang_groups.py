"""A rank that one group of a real model waits for is named, from the true flight records and stacks of all ranks."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cluster.collecting import Worker, collect
from configs.schema import JobConfig
from health.hang import Finding, judge_hang
from health.hang_evidence import read_evidence
from health.verdict import Cause, Severity, Verdict
from health.watchdog import Standing
from parallelism.mesh import World, world_size_of
from tests.distributed.layouts import tiny, train
from tests.harness import run_ranks
from trainer.events import Phase

pytestmark = pytest.mark.distributed


class Fault(msgspec.Struct, frozen=True):
    """A rank stays before its count-th communication of a step in a group; words: the group for a person."""

    culprit: int
    group: str
    count: int
    words: str


def run_into(world: World, config: JobConfig, faults: list[Fault], folder: Path) -> None:
    """Train a step for each fault; its culprit stays there until it is released."""
    from parallelism.engine import build_engine
    from tests.stuck import Before, wait_for_release
    from trainer.witness import Witness, log_peers

    witness = Witness(folder, world.rank, world.rank)
    witness.open(2000, os.environ)
    log_peers(witness, 2000)
    engine = build_engine(config, world)
    (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
    for step, fault in enumerate(faults):
        if world.rank == fault.culprit:
            with Before(fault.group, fault.count, wait_for_release(folder / f"stuck-{step}")):
                train(engine, range(step, step + 1))
        else:
            train(engine, range(step, step + 1))


def hangs(config: JobConfig, faults: list[Fault], folder: Path) -> Iterator[tuple[Fault, Finding]]:
    """What is found during each fault; then its culprit lets the others go, and all end well."""
    size = world_size_of(config.parallelism)
    failed: list[BaseException] = []

    def ranks() -> None:
        try:
            run_ranks(size, run_into, config, faults, folder, timeout_s=300.0)
        except BaseException as error:  # noqa: BLE001  it is told by the test's own thread
            failed.append(error)

    job = threading.Thread(target=ranks)
    job.start()
    for step, fault in enumerate(faults):
        stuck = folder / f"stuck-{step}"
        while job.is_alive() and not stuck.exists() and len(list(folder.glob("stuck-*"))) <= step:
            job.join(0.02)
        assert stuck.exists(), failed
        yield fault, look(folder, size)
        with stuck.open("wb") as file:
            file.write(b"x")
    job.join()
    assert not failed, failed


def look(folder: Path, size: int) -> Finding:
    """Collect and judge, as agents and the supervisor do: again, as long as the evidence speaks for patience."""
    workers = [Worker(rank, rank, int((folder / f"pid-{rank}").read_text())) for rank in range(size)]
    verdict = Verdict(
        node="", rank=-1, cause=Cause.HANG, severity=Severity.WORKERS, step=1, fingerprint="hang", evidence=("still",)
    )
    phases = dict.fromkeys(range(size), Phase.FORWARD_BACKWARD)
    standing = Standing(verdict, "no rank advanced", 0.0, 3.0, 3.0, 15.0, phases)
    deadline_s = time.monotonic() + 120
    for number in itertools.count(1):
        evidence = read_evidence(collect(folder, workers, number, 4.0))
        found = judge_hang(standing, {rank: f"node{rank}" for rank in range(size)}, evidence)
        told = all(each.record is not None and each.stack for each in evidence.values())
        if (found.sure and told) or time.monotonic() > deadline_s:
            assert told
            return found
    raise AssertionError


LAYOUTS = {
    "fsdp_tp": (
        tiny(dp_shard=2, tp=2),
        [
            Fault(3, "mesh_tp", 9, "TP (ranks 2, 3)"),
            Fault(2, "mesh_fsdp", 5, "FSDP (ranks 0, 2)"),
            Fault(0, "default_pg", 1, "the whole job (ranks 0-3)"),
        ],
    ),
    "pp_fsdp": (
        tiny(pp=2, dp_shard=2),
        [
            Fault(2, "mesh_pp", 2, "PP (ranks 0, 2)"),
            Fault(3, "mesh_fsdp", 3, "FSDP (ranks 2, 3)"),
            Fault(0, "mesh_pp", 1, "PP (ranks 0, 2)"),
        ],
    ),
    "ep": (
        tiny("deepseek_v3", dp_shard=4, ep=2),
        [Fault(1, "mesh_ep", 3, "EP (ranks 0, 1)"), Fault(2, "mesh_efsdp", 1, "the experts' FSDP (ranks 0, 2)")],
    ),
}
LONG = {
    "fsdp": (tiny(dp_shard=2), [Fault(1, "default_pg", n, "the whole job (ranks 0, 1)") for n in (1, 4, 9)]),
    "hsdp": (
        tiny(dp_replicate=2, dp_shard=2),
        [Fault(3, "mesh_dp_replicate", 2, "DP (replicas) (ranks 1, 3)"), Fault(1, "mesh_fsdp", 3, "FSDP (ranks 0, 1)")],
    ),
    "interleaved": (
        tiny(layers=4, pp=2, pp_schedule="Interleaved1F1B"),
        [Fault(culprit, "default_pg", n, "the whole job (ranks 0, 1)") for culprit, n in ((0, 2), (1, 5), (0, 7))],
    ),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_the_rank_that_a_group_waits_for_is_named(name: str, tmp_path: Path) -> None:
    """Promise: whichever group a rank does not come to, the verdict names it and the group, and its stack says why."""
    config, faults = {**LAYOUTS, **LONG}[name]
    for fault, found in hangs(config, faults, tmp_path):
        assert (found.verdict.rank, found.verdict.node) == (fault.culprit, f"node{fault.culprit}"), (fault, found)
        assert found.sure, (fault, found.doubt)
        assert fault.words in found.verdict.evidence[0], fault
        assert "stuck.py" in found.verdict.evidence[1], fault
