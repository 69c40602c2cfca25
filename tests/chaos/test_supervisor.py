"""Control-plane promises: training does not depend on the supervisor's life, and nothing stays behind."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.chaos import faults
from tests.chaos.conftest import MakeJob

pytestmark = pytest.mark.chaos


def test_training_outlives_its_supervisor(make_job: MakeJob) -> None:
    """Promise: SIGKILL of the supervisor stops no step; the next one takes over and handles the next fault."""
    job = make_job("orphaned").start()
    job.wait_for_step(3)
    assert job.process is not None
    job.process.kill()
    job.process.wait()
    seen = max(record.step for record in job.steps())
    job.wait_for_step(seen + 3)
    job.start()
    job.wait_until(lambda: "took over" in job.said(), "the take-over")
    job.wait_until(lambda: "worker_killed" in job.causes() or kill_once(job), "the second fault")
    assert job.finish() == 0, job.said()
    assert job.causes() == ["worker_killed"]
    assert job.said().count("run orphaned begins") == 1


def kill_once(job) -> bool:  # type: ignore[no-untyped-def]
    """Kill rank 1, the first time this is called."""
    if not getattr(job, "killed", False):
        faults.kill_worker(job.run_dir, "node0", 1)
        job.killed = True
    return False


def test_silence_alone_is_noticed(make_job: MakeJob) -> None:
    """Promise: a node whose processes all exist but no longer speak is lost by its missing heartbeats, and replaced."""
    job = make_job("silent", ("--training.steps", "10")).start()
    job.wait_for_step(3)
    faults.freeze_node(job.run_dir, "node1")
    assert job.finish() == 0, job.said()
    assert job.causes() == ["node_lost"]
    assert "no heartbeat" in job.said()


@pytest.mark.long
def test_everything_killed_goes_on_with_the_same_command(make_job: MakeJob) -> None:
    """Promise: SIGKILL of every process of the job, as a reboot does, costs no more than the steps not yet on disk."""
    job = make_job("rebooted", ("--training.steps", "10")).start()
    job.wait_for_step(5)
    job.end()
    job.start()
    assert job.finish() == 0, job.said()
    assert sorted(job.losses()) == list(range(1, 11))


def test_one_error_again_and_again_stops_the_job(make_job: MakeJob, home, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Promise: bad data fails on every node alike; the job stops with 93 and says the error, instead of looping."""
    job = make_job("bad-data", ("--training.steps", "10", "--run.seed", "11"))
    damage_corpus(home, tmp_path, job)
    job.start()
    assert job.finish() == 93, job.said()
    assert "Traceback" not in job.said()


def damage_corpus(home, tmp_path, job) -> None:  # type: ignore[no-untyped-def]
    """Give the job a copy of the corpus in which most tokens are none of the vocabulary."""
    import shutil
    import tomllib

    corpus = tomllib.loads((home / "job.toml").read_text())["data"]["sets"][0]["path"].removesuffix("/corpus")
    shutil.copytree(corpus, tmp_path / "corpus")
    with (tmp_path / "corpus" / "corpus.bin").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    job.arguments += ["--data.sets", f'[{{path = "{tmp_path}/corpus/corpus"}}]']


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_leaves_nothing(make_job: MakeJob, number: signal.Signals) -> None:
    """Promise: Ctrl-C while nodes are still starting ends everything, and says how to go on."""
    job = make_job(f"early-{number.name}").start()
    job.wait_until(lambda: "begins" in job.said(), "the beginning")
    assert job.process is not None
    job.process.send_signal(number)
    assert job.finish(timeout_s=60) == 75
    assert "Traceback" not in job.said()


def test_a_bad_update_is_never_applied(make_job: MakeJob) -> None:
    """Promise: when numbers are not finite all ranks skip the update, it is logged, and the weights stay finite."""
    never_back = ("--numbers.max_skips", "0")
    overrides = ("--training.steps", "6", "--optimizer.lr", "1e30", "--cluster.spares", "0", *never_back)
    job = make_job("diverged", overrides).start()
    assert job.finish() == 0, job.said()
    assert "nonfinite" in job.causes()
    assert [record.step for record in job.steps() if record.skipped]
    shards = list((job.run_dir / "checkpoints" / "step-6").glob("*.safetensors"))
    assert len(shards) == 4
    for shard in shards:
        assert all(np.isfinite(tensor).all() for tensor in load_file(shard).values()), shard
