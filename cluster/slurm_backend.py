"""`everstep submit --cluster slurm` and its companions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cluster.backend import JobRequest, JobState, JobStatus, NodeStatus
from cluster.slurm_commands import Job, SlurmCommands
from cluster.slurm_exclude import excluded
from cluster.slurm_script import render_script
from configs.profile import ClusterProfile

OURS = "everstep:"
"""How the reason of every node begins that was taken out of work by Everstep."""

_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_CANCELLED = ("CANCELLED", "REVOKED")
# Of an array's jobs, the one that matters most says how the whole stands.
_WEIGHT: tuple[JobState, ...] = ("running", "pending", "done", "failed", "cancelled", "unknown")


class SlurmBackend:
    """See `cluster.backend.Backend`. All calls raise SlurmError, an OSError, with SLURM's own words."""

    def __init__(self, profile: ClusterProfile, commands: SlurmCommands | None = None) -> None:
        self.profile = profile
        self.commands = commands or SlurmCommands()

    def render(self, request: JobRequest) -> str:
        """The script for sbatch. ValueError if something in the request cannot stand in one."""
        return render_script(request, request.profile.python or sys.executable, excluded(request.run_dir))

    def submit(self, request: JobRequest) -> str:
        """Hand the script to sbatch; the job's output goes to `slurm-<job>.out` in the run's folder."""
        script = self.render(request)
        request.run_dir.mkdir(parents=True, exist_ok=True)
        return self.commands.submit(script)

    def status(self, job_id: str) -> JobStatus:
        """What squeue says. Of a job that SLURM has forgotten (`MinJobAge`), only the run's folder tells the end."""
        jobs = self.commands.jobs(job_id)
        if not jobs:
            return JobStatus("unknown", f"SLURM has forgotten job {job_id}")
        job = min(jobs, key=lambda each: _WEIGHT.index(_state_of(each)))
        state, nodes = _state_of(job), job.nodes if _state_of(job) == "running" else ""
        why = f" ({job.reason})" if job.reason not in ("", "None") else ""
        on = f" on {nodes}" if nodes else ""
        return JobStatus(state, f"{job.state.lower()}{on}{why}", tuple(self.commands.hostnames(nodes)))

    def cancel(self, job_id: str) -> None:
        """Jobs that wait are dropped; one that runs saves, leaves and is not requeued. Told twice, it does not wait."""
        jobs = self.commands.jobs(job_id)
        if any(_state_of(job) == "pending" for job in jobs):
            self.commands.cancel(job_id, "--state=PENDING")
        for job in jobs:
            if _state_of(job) == "running":
                # The script knows this signal. To forbid a requeue, SLURM would need its database once nodes failed.
                self.commands.cancel(job.id, "--signal=USR2", "--batch")

    def drain(self, node: str, reason: str) -> None:
        """`scontrol update state=drain`: work that runs there ends in its own time."""
        said = reason if reason.startswith(OURS) else f"{OURS} {reason}"
        self.commands.update_node(node, "drain", said)

    def readmit(self, node: str) -> None:
        """`scontrol update state=resume`, unless the node is at work already."""
        rows = self.commands.nodes([node])
        if not rows:
            raise ValueError(f"SLURM has no node {node!r}; `everstep nodes` and `sinfo -N` list them")
        if rows[0].state.startswith(("down", "drain", "fail")):
            self.commands.update_node(node, "resume")

    def nodes(self) -> Sequence[NodeStatus]:
        """What sinfo shows."""
        return tuple(
            NodeStatus(row.name, row.state, row.reason, row.reason.startswith(OURS)) for row in self.commands.nodes()
        )


def _state_of(job: Job) -> JobState:
    if job.state in _PENDING:
        return "pending"
    if job.state in _RUNNING:
        return "running"
    if job.state in _CANCELLED:
        return "cancelled"
    return "done" if job.state == "COMPLETED" else "failed"
