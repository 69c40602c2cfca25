"""Keys are in one folder that only their owner may read, and nowhere else while a job runs or after it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from cluster.keys import JobKeys
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job

pytestmark = pytest.mark.chaos

SMALL = (
    "--cluster.nodes", "1", "--cluster.ranks_per_node", "1", "--cluster.spares", "1", "--parallelism.tp", "1",
    "--parallelism.dp_shard", "1", "--training.steps", "6",
)  # fmt: skip


def secrets_of(job: Job) -> dict[str, bytes]:
    """Key material in every form in which it could be written down."""
    folder = job.run_dir / "secrets"
    keys = msgspec.json.decode((folder / "job.json").read_bytes(), type=JobKeys)
    transfer = (folder / "transfer.key").read_bytes()
    return {
        "the supervisor's key": keys.server.secret.encode(),
        "the agents' key": keys.client.secret.encode(),
        "the transfer key": transfer,
        "the transfer key in hex": transfer.hex().encode(),
        "the transfer key in base64": base64.b64encode(transfer).rstrip(b"="),
        "the transfer key as Python prints it": repr(transfer)[2:-1].encode(),
    }


def processes(job: Job) -> Iterator[psutil.Process]:
    """The supervisor, and whatever runs for it."""
    assert job.process is not None
    yield psutil.Process(job.process.pid)
    yield from job.processes()


def told(process: psutil.Process) -> Iterator[tuple[str, bytes]]:
    """What `ps` shows of a process, to its owner too."""
    for name in ("cmdline", "environ"):
        try:
            yield f"{name} of {process.pid} ({process.name()})", Path(f"/proc/{process.pid}/{name}").read_bytes()
        except (OSError, psutil.NoSuchProcess):
            continue


def test_keys_are_in_no_argument_no_environment_and_no_log(make_job: MakeJob) -> None:
    """Promise: neither `ps`, nor what a step inherits, nor any file that the job writes beside its secrets has one."""
    job = make_job("secrets", SMALL).start()
    job.wait_for_step(2)
    secrets, seen = secrets_of(job), dict[str, bytes]()
    for process in processes(job):
        seen |= dict(told(process))
    assert job.finish() == 0, job.said()
    assert sum("cmdline" in place for place in seen) >= 4, "supervisor, agents, workers"
    files = [path for path in job.run_dir.rglob("*") if path.is_file() and path.parent.name != "secrets"]
    seen |= {str(path): path.read_bytes() for path in [*files, job.output]}
    assert any("agent.log" in place for place in seen)
    found = [f"{what} in {place}" for place, data in seen.items() for what, key in secrets.items() if key in data]
    assert found == []
    for path in (job.run_dir / "secrets").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert (job.run_dir / "secrets").stat().st_mode & 0o777 == 0o700
