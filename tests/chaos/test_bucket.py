"""The bucket, with a real S3 server: a run's state outlives the run directory, and an outage outlives nothing."""

from __future__ import annotations

import shutil

import pytest

from cluster.events import WorkersReported
from configs.schema import S3Config
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.s3server import S3Server

pytestmark = pytest.mark.chaos


def in_bucket(server: S3Server, name: str) -> tuple[str, ...]:
    """Settings of a job whose snapshots also go to a bucket of its own."""
    bucket = server.create_bucket()
    return ("--s3.bucket", bucket, "--s3.endpoint", server.endpoint, "--s3.interval_steps", "3", "--s3.part_mb", "5")


def facts(job: Job) -> list[str]:
    """Kinds of all facts in the journal."""
    return [event.fact.kind.value for event in job.events() if isinstance(event, WorkersReported)]


@pytest.mark.long
def test_a_lost_run_directory_is_brought_back_from_the_bucket(make_job: MakeJob, s3: S3Server) -> None:
    """Promise: with all snapshots of the run directory gone the same command goes on from the bucket, bit for bit."""
    undisturbed = make_job("bucket-undisturbed", ("--cluster.spares", "0")).start()
    job = make_job("bucket", ("--cluster.spares", "0", *in_bucket(s3, "bucket"))).start("--training.steps", "12")
    assert undisturbed.finish() == 0, undisturbed.said()
    assert job.finish() == 0, job.said()
    assert "step 12 is in S3" in job.said()
    shutil.rmtree(job.run_dir / "checkpoints")
    job.start()
    assert job.finish() == 0, job.said()
    assert "fetched from S3" in job.said()
    assert "state of step 12 loaded" in job.said()
    assert job.weights(24) == undisturbed.weights(24)
    assert job.losses() == undisturbed.losses()


def test_an_outage_stops_no_step_and_is_caught_up_with(make_job: MakeJob, s3: S3Server) -> None:
    """Promise: while the server is down training goes on and says so; when it is back the bucket gets the newest."""
    from checkpointing.s3 import Bucket

    settings = in_bucket(s3, "outage")
    job = make_job("outage", ("--cluster.spares", "0", *settings)).start()
    job.wait_for_step(2)
    s3.stop()
    try:
        job.wait_until(lambda: "tier_behind" in facts(job), "the outage")
        seen = max(record.step for record in job.steps())
        job.wait_for_step(seen + 4)
    finally:
        s3.start()
    assert job.finish() == 0, job.said()
    assert "tier_caught_up" in facts(job)
    bucket = Bucket(S3Config(bucket=settings[1], endpoint=s3.endpoint), "outage")
    assert bucket.committed()[0][1] == 24
