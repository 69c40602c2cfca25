"""A node that is not fit does not join, whatever is wrong with it; its spare does, and training is what it would be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from cluster.events import GenerationPlanned, NodeEvicted, VerdictGiven
from cluster.rundir import RunDir
from health.examination import Examination, Grade
from health.verdict import Verdict
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.storage import Volume

pytestmark = pytest.mark.chaos

SHIM = Path(__file__).parents[1] / "shims" / "sick_node"
SHORT = ("--health.preflight", "true", "--training.steps", "3", "--checkpoint.persist_interval_steps", "3")


def sick(job: Job, how: str) -> Job:
    """Make a node of the job sick, as the shim's docstring says."""
    job.environment = {"PYTHONPATH": str(SHIM), "EVERSTEP_TEST_SICK": how}
    return job


def accused(job: Job) -> list[Verdict]:
    return [event.verdict for event in job.events() if isinstance(event, VerdictGiven)]


def check_replaced(job: Job, words: str) -> None:
    """node1 was accused in these words and never held ranks; node2 did in its place."""
    assert job.finish() == 0, job.said()
    (verdict,) = accused(job)
    assert (verdict.cause, verdict.node) == ("preflight_failed", "node1")
    assert any(words in line for line in verdict.evidence), verdict.evidence
    plans = [event.nodes for event in job.events() if isinstance(event, GenerationPlanned)]
    assert plans == [("node0", "node2")]
    assert [event.node for event in job.events() if isinstance(event, NodeEvicted)] == ["node1"]
    kept = msgspec.json.decode((job.run_dir / "incidents" / "1" / "verdict.json").read_bytes(), type=Verdict)
    assert kept == verdict


def examination(job: Job, node: str) -> Examination:
    return msgspec.json.decode((job.run_dir / "logs" / node / "preflight.json").read_bytes(), type=Examination)


def test_a_node_that_computes_wrongly_does_not_join(make_job: MakeJob) -> None:
    """Promise: one wrong element of a known-answer matmul keeps a node out; its spare takes its place at once."""
    job = sick(make_job("miscounts", SHORT), "node1:matmul").start()
    check_replaced(job, "results are wrong")
    failed = {check.name for check in examination(job, "node1").checks if check.grade is Grade.FAIL}
    assert failed
    assert all(name.startswith("matmul") for name in failed)
    for node in ("node0", "node2"):
        assert examination(job, node).grade is Grade.PASS, examination(job, node).checks


@pytest.mark.long
def test_a_node_with_another_torch_does_not_join(make_job: MakeJob) -> None:
    """Promise: versions are compared before ranks are handed out, and the odd one out is left out."""
    check_replaced(sick(make_job("mixed", SHORT), "node1:torch").start(), "torch is 9.9.9 on node1")


@pytest.mark.long
def test_a_node_without_room_in_memory_does_not_join(make_job: MakeJob) -> None:
    """Promise: a file system without room for snapshots in memory is found before training needs it."""
    job = make_job("no-room", SHORT)
    folder = RunDir(job.run_dir.absolute()).ram_root("/dev/shm") / "node1"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "everstep-test", str(folder)], check=True)
    try:
        check_replaced(job.start(), "is nearly full")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder.parent)


@pytest.mark.long
def test_a_spare_that_goes_bad_is_let_go(make_job: MakeJob, tmp_path: Path) -> None:
    """Promise: nodes without ranks repeat the known-answer tests; one that fails is no spare any more."""
    trigger = tmp_path / "now"
    job = make_job(
        "rusty", ("--health.preflight", "true", "--training.steps", "200", "--health.selftest_interval_minutes", "0.02")
    )
    sick(job, f"node2:matmul:{trigger}").start()
    job.wait_for_step(2)
    trigger.touch()
    job.wait_until(lambda: "preflight_failed" in job.causes(), "the accusation")
    job.wait_until(lambda: any(isinstance(event, NodeEvicted) for event in job.events()), "the eviction")
    (verdict,) = accused(job)
    assert verdict.node == "node2"
    assert [event.nodes for event in job.events() if isinstance(event, GenerationPlanned)] == [("node0", "node1")]
    assert job.process is not None
    job.process.terminate()
    assert job.finish() == 75, job.said()


@pytest.mark.long
def test_a_disk_that_fails_under_a_run_is_noticed_and_costs_no_step(make_job: MakeJob, tmp_path: Path) -> None:
    """Promise: probes and repeated tests say nothing of a healthy fleet; one node's disk that becomes read-only, as
    kernels make one that fails, is that node's fault, and training goes on without it."""
    job = make_job(
        "worn-disk",
        (
            "--health.preflight", "true",
            "--training.steps", "1000", "--checkpoint.node_dir", str(tmp_path), "--checkpoint.node_interval_steps", "2",
            "--health.node_probe_interval_s", "0.5", "--health.selftest_interval_minutes", "0.03",
        ),
    )  # fmt: skip
    with Volume(RunDir(job.run_dir.absolute()).node_root(str(tmp_path)) / "node1", 256 << 20) as disk:
        job.start()
        job.wait_for_step(20)
        assert job.causes() == []
        assert disk.read_only()
        job.wait_until(lambda: job.causes() != [], "the accusation")
        seen = max(record.step for record in job.steps())
        job.wait_for_step(seen + 3)
        (verdict,) = accused(job)
        assert (verdict.cause, verdict.node, verdict.device) == ("node_fault", "node1", "node_dir")
        assert "read-only" in verdict.evidence[0]
        assert job.actions() == ["nothing"]
        disk.writable()
        assert job.process is not None
        job.process.terminate()
        assert job.finish() == 75, job.said()
