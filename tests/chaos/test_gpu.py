"""Signals of GPUs, from the driver's library into an eviction: whole jobs whose agents read GPUs that are not there."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.events import GenerationPlanned, NodeEvicted, VerdictGiven
from health.verdict import Severity, Verdict
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.fake_gpus import FakeGpus

pytest.importorskip("pynvml")
pytestmark = pytest.mark.chaos

OVERRIDES = (
    "--training.steps", "2000", "--checkpoint.persist_interval_steps", "1000", "--health.gpu_interval_s", "0.2",
    "--health.gpu_timeout_s", "1.5", "--health.max_evictions_per_hour", "100",
)  # fmt: skip
TWO_RANKS = (
    "--cluster.nodes", "1", "--parallelism.tp", "2", "--parallelism.dp_shard", "1", "--cluster.spares", "1",
    "--health.gpu_throttle_samples", "100",
)  # fmt: skip
ONE_RANK = (
    "--cluster.nodes", "1", "--cluster.ranks_per_node", "1", "--parallelism.tp", "1", "--parallelism.dp_shard", "1",
    "--cluster.spares", "4", "--health.gpu_throttle_samples", "10",
)  # fmt: skip

Inject = Callable[[FakeGpus, str, int], None]


def sets(key: str, value: int | str, gpu: int | str | None = None) -> Inject:
    """The driver says this from now on."""
    return lambda gpus, node, mine: gpus.set(node, mine if gpu is None else gpu, key, value)


def xid(number: int) -> Inject:
    """The driver reports this XID."""
    return lambda gpus, node, mine: gpus.xid(node, mine, number)


def both(first: Inject, second: Inject) -> Inject:
    """One after the other."""

    def inject(gpus: FakeGpus, node: str, mine: int) -> None:
        first(gpus, node, mine)
        second(gpus, node, mine)

    return inject


EVICTS: dict[str, Inject] = {
    "xid 79": xid(79),
    "gpu lost": sets("lost", 1),
    "gpu recovery gpu_reset": sets("recovery", 1),
    "ecc uncorrected": sets("uncorrected", 1),
    "remap failed": sets("remap_failed", 1),
    "xid 95": xid(95),
    "xid 48": xid(48),
    "nvlink down": sets("links_up", 16),
    "gpu recovery drain_and_reset": both(sets("recovery", 4), xid(154)),
    "remap pending": both(sets("rows_uncorrectable", 1), sets("remap_pending", 1)),
    "pcie width": sets("pcie_width", 8),
    "pcie replays": sets("pcie_replays", 5000),
    "throttled": sets("reasons", 0x48),
    "nvml hangs": sets("hang", "nvmlDeviceGetPowerUsage"),
    "nvlink errors": sets("link_errors", 90000),
    "gpu driver gone": both(sets("driver_down", 1, "*"), sets("hang", "nvmlDeviceGetPowerUsage")),
}
"""What must evict, by the fingerprint of the verdict."""
GROUPS = [list(EVICTS)[start : start + 4] for start in range(0, len(EVICTS), 4)]
NOTED = (14, 43, 63, 92, 121, 162, 500)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> FakeGpus:
    """The library, built once."""
    return FakeGpus(tmp_path_factory.mktemp("gpus"))


@pytest.fixture
def start(make_job: MakeJob, library: FakeGpus) -> Callable[..., Job]:
    """Starts a job whose nodes have GPUs of their own, and waits until it trains."""

    def begin(name: str, overrides: Sequence[str]) -> Job:
        job = make_job(name, (*OVERRIDES, *overrides))
        job.environment.update(library.environment())
        nodes = [f"node{number}" for number in range(6)]
        library.add(*nodes)
        for node in nodes:
            library.heal(node)
        job.start()
        job.wait_for_step(3)
        return job

    return begin


def newest_plan(job: Job) -> GenerationPlanned:
    """The newest plan."""
    return [event for event in job.events() if isinstance(event, GenerationPlanned)][-1]


def verdicts(job: Job) -> list[Verdict]:
    """All verdicts, companions too."""
    given = [event for event in job.events() if isinstance(event, VerdictGiven)]
    return [verdict for event in given for verdict in (event.verdict, *event.others)]


def evicted(job: Job) -> list[str]:
    """Nodes that were evicted."""
    return [event.node for event in job.events() if isinstance(event, NodeEvicted)]


def inject_and_await_eviction(job: Job, gpus: FakeGpus, name: str, gpu: int) -> Verdict:
    """Break a GPU of the first node that holds ranks; returns the verdict, once its spare trains."""
    plan = newest_plan(job)
    node, step = plan.nodes[0], job.steps()[-1].step
    job.wait_for_step(step + 2)
    EVICTS[name](gpus, node, gpu)
    job.wait_until(lambda: node in evicted(job), f"the eviction of {node} for {name}")
    job.wait_until(lambda: newest_plan(job).generation > plan.generation, "a new generation")
    before = max(record.step for record in job.steps())
    job.wait_for_step(before + 1)
    found = [verdict for verdict in verdicts(job) if verdict.node == node and verdict.fingerprint == name]
    assert found, f"{name}: {[(verdict.node, verdict.fingerprint) for verdict in verdicts(job)]}"
    return found[-1]


def leave(job: Job) -> None:
    """End the job as a person would."""
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    assert job.finish(timeout_s=120) == 75, job.said()


def has_evidence(run_dir: Path, words: str) -> bool:
    """Whether some incident's folder holds these words."""
    return any(words in path.read_text() for path in run_dir.glob("incidents/*/verdicts.json"))


def test_a_dead_gpu_evicts_its_node_and_a_rumour_does_not(start: Callable[..., Job], library: FakeGpus) -> None:
    """Promise: an XID that is only logged and a short spell of heat are noted at most; XID 79 on one GPU evicts its
    node, the incident holds the GPU, the rank and the reading, and the spare goes on."""
    job = start("gpu", TWO_RANKS)
    library.xid("node0", 1, 63)
    library.set("node0", 0, "reasons", 0x40)
    job.wait_until(lambda: any(each.fingerprint == "xid 63" for each in verdicts(job)), "the note")
    library.heal("node0")
    job.wait_for_step(job.steps()[-1].step + 5)
    assert newest_plan(job).generation == 1
    assert [(each.fingerprint, each.severity) for each in verdicts(job)] == [("xid 63", Severity.NOTICE)]
    verdict = inject_and_await_eviction(job, library, "xid 79", 1)
    assert (verdict.rank, verdict.device, verdict.severity) == (1, "gpu1", Severity.NODE)
    assert evicted(job) == ["node0"]
    assert newest_plan(job).nodes == ("node1",)
    assert has_evidence(job.run_dir, "fallen off the bus")
    assert has_evidence(job.run_dir, "GPU-fa4e0001")
    leave(job)


@pytest.mark.long
@pytest.mark.parametrize("names", GROUPS, ids=["+".join(names).replace(" ", "-") for names in GROUPS])
def test_every_signal_that_must_evicts(names: list[str], start: Callable[..., Job], library: FakeGpus) -> None:
    """Promise: each signal that the driver can give of a bad GPU evicts the node that has it, and only that one."""
    job = start(f"gpu-{GROUPS.index(names)}", ONE_RANK)
    for name in names:
        verdict = inject_and_await_eviction(job, library, name, 0)
        assert verdict.severity is Severity.NODE
        assert verdict.device == ("" if name == "gpu driver gone" else "gpu0")
    assert evicted(job) == ["node0", "node1", "node2", "node3"]
    leave(job)


@pytest.mark.long
def test_what_is_only_noted_stops_nobody(start: Callable[..., Job], library: FakeGpus) -> None:
    """Promise: XIDs to be logged, unknown ones and those for an operator, GPUs that no rank uses, a power cap, old
    errors: no restart, no eviction."""
    job = start("gpu-noted", ONE_RANK)
    for number in NOTED:
        library.xid("node0", 0, number)
    library.xid("node0", 5, 79)
    library.set("node0", 5, "lost", 1)
    library.set("node0", 0, "reasons", 0x4)
    library.set("node0", 0, "corrected", 40)
    job.wait_until(
        lambda: {f"xid {number}" for number in NOTED} <= {each.fingerprint for each in verdicts(job)}, "notes"
    )
    job.wait_for_step(job.steps()[-1].step + 20)
    assert newest_plan(job).generation == 1
    assert {each.severity for each in verdicts(job)} == {Severity.NOTICE}
    leave(job)


@pytest.mark.long
def test_a_gpu_that_asks_for_restarts_twice_is_evicted(start: Callable[..., Job], library: FakeGpus) -> None:
    """Promise: an XID that asks for a restart of the program gets one; when the same GPU asks again, its node goes."""
    job = start("gpu-again", ONE_RANK)
    library.xid("node0", 0, 94)
    job.wait_until(lambda: newest_plan(job).generation == 2, "a restart")
    assert newest_plan(job).nodes == ("node0",)
    job.wait_for_step(max(record.step for record in job.steps()) + 2)
    library.xid("node0", 0, 94)
    job.wait_until(lambda: evicted(job) == ["node0"], "the eviction")
    assert [each.fingerprint for each in verdicts(job)].count("xid 94") == 2
    leave(job)


@pytest.mark.long
def test_a_sick_spare_is_not_used(start: Callable[..., Job], library: FakeGpus) -> None:
    """Promise: a GPU that dies on an idle spare costs no step, and the spare does not get ranks afterwards."""
    job = start("gpu-spare", ONE_RANK)
    library.set("node1", 0, "lost", 1)
    job.wait_until(lambda: any(each.node == "node1" for each in verdicts(job)), "the verdict on the spare")
    inject_and_await_eviction(job, library, "xid 79", 0)
    assert "node1" not in newest_plan(job).nodes
    leave(job)
