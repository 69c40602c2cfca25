"""The real NVML, in the probe and in a whole run, on a machine that has an NVIDIA GPU; anywhere else it says so."""

from __future__ import annotations

import os
import time

import pytest

from cluster.gpu_child import ProbeProcess
from cluster.gpu_devices import split_visible
from cluster.gpu_messages import Absent, Hello, ProbeLine, ProbeStart
from health.gpu import GpuJudge
from health.gpu_facts import Carrier, GpuSample
from health.gpu_signals import GpuLimits
from tests.chaos.conftest import MakeJob

pytestmark = [pytest.mark.gpu, pytest.mark.chaos]

_READINGS = 5


def _probe(readings: int) -> list[ProbeLine]:
    """What a probe of the first GPU says, up to so many readings."""
    visible = split_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    probe = ProbeProcess("here", ProbeStart(interval_s=0.5, timeout_s=10.0, ranks=1, visible=visible))
    said: list[ProbeLine] = []
    deadline = time.monotonic() + 60
    try:
        while sum(isinstance(each, GpuSample) for each in said) < readings and time.monotonic() < deadline:
            lines = probe.lines(1.0)
            said += lines or []
            if lines is None:
                break
    finally:
        probe.close()
    return said


@pytest.fixture(scope="session")
def said() -> list[ProbeLine]:
    """What the real driver says."""
    said = _probe(_READINGS)
    absent = [each.reason for each in said if isinstance(each, Absent)]
    if absent:
        pytest.skip(f"NO REAL GPU HERE, so the real NVML was not read: {absent[0]}")
    return said


def test_the_real_driver_is_read(said: list[ProbeLine]) -> None:
    """Promise: a real GPU has an identity, plausible values, and nobody accuses it without a reason."""
    (hello,) = (each for each in said if isinstance(each, Hello))
    assert hello.driver
    assert hello.devices[0].uuid.startswith("GPU-")
    samples = [each for each in said if isinstance(each, GpuSample)]
    assert len(samples) >= _READINGS
    judge = GpuJudge("here", GpuLimits())
    for sample in samples:
        assert sample.uuid == hello.devices[0].uuid
        assert not sample.lost
        assert not sample.unreadable
        assert sample.temperature_c is not None
        assert 5 <= sample.temperature_c <= 110
        assert sample.memory_total_bytes is not None
        assert sample.memory_total_bytes > 1 << 30
        assert judge.sample(sample, Carrier()) == []


def test_a_real_run_reads_the_real_driver(said: list[ProbeLine], make_job: MakeJob) -> None:
    """Promise: in a run on a real GPU the agent says which GPU it watches, and its readings; no verdict is given."""
    job = make_job(
        "gpu-real",
        (
            "--cluster.nodes", "1", "--cluster.ranks_per_node", "1", "--cluster.spares", "0", "--parallelism.tp", "1",
            "--parallelism.dp_shard", "1", "--health.gpu_interval_s", "0.5",
        ),
    ).start()  # fmt: skip
    assert job.finish() == 0, job.said()
    log = (job.run_dir / "logs" / "node0" / "agent.log").read_text()
    assert "GPUs are watched: gpu" in log
    assert "read last: GPU-" in log
    assert job.causes() == []
