"""Submitting to this machine: `everstep run` in a session of its own, going on when the terminal is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import psutil

from cluster.backend import JobRequest, JobStatus, NodeStatus

_BEGUN_S = 2.0


class LocalBackend:
    """See `cluster.backend.Backend`. A job's name is `pid:start time`, so that a recycled pid is never mistaken."""

    def render(self, request: JobRequest) -> str:
        """The command, and where its output goes."""
        return f"cd {request.working_dir}\n{' '.join(_command(request))} >> {_log(request)} 2>&1 &\n"

    def submit(self, request: JobRequest) -> str:
        """Start it detached. OSError if it ends at once with an error, with its last line."""
        request.run_dir.mkdir(parents=True, exist_ok=True)
        with open(_log(request), "ab") as log:
            child = subprocess.Popen(
                _command(request),
                cwd=request.working_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            if code := child.wait(_BEGUN_S):
                raise OSError(f"`everstep run` ended at once with {code}; {_log(request)} says why")
        started = psutil.Process(child.pid).create_time() if child.poll() is None else 0.0
        return f"{child.pid}:{started:.2f}"

    def status(self, job_id: str) -> JobStatus:
        """Whether the process is there; how it ended stands in the run's journal."""
        process = _find(job_id)
        return JobStatus("running", f"process {process.pid}") if process else JobStatus("unknown", "its process ended")

    def cancel(self, job_id: str) -> None:
        """SIGTERM: the job saves and leaves."""
        if process := _find(job_id):
            process.send_signal(signal.SIGTERM)

    def drain(self, node: str, reason: str) -> None:
        """This machine has no owner but its runs; their own history of nodes has the word."""

    def readmit(self, node: str) -> None:
        """See `drain`."""

    def nodes(self) -> Sequence[NodeStatus]:
        """This machine."""
        return (NodeStatus(os.uname().nodename, "up", "", False),)


def _command(request: JobRequest) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", "run", request.config_path, *request.overrides]


def _log(request: JobRequest) -> str:
    return str(request.run_dir / "submit.log")


def _find(job_id: str) -> psutil.Process | None:
    pid, _, started = job_id.partition(":")
    try:
        process = psutil.Process(int(pid))
        same = f"{process.create_time():.2f}" == started and process.status() != psutil.STATUS_ZOMBIE
    except (ValueError, psutil.NoSuchProcess):
        return None
    return process if same else None
