"""SLURM's own commands, typed: each call names what it wants and parses what was said.

Only formats that are the same from 22.05 on are asked for, and nothing that needs slurmdbd. No call goes through a
shell, and each has a time-out: a controller that is busy must not stop us for good.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TIMEOUT_S = 30.0
_UNKNOWN_JOB = re.compile(r"Invalid job id|Job/step already completing or completed|already completed", re.IGNORECASE)
_UNKNOWN_NODE = re.compile(r"Invalid node name", re.IGNORECASE)
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_JOB = re.compile(r"[0-9]+(_[0-9]+)?")
_STEP = re.compile(r"[0-9]+(_[0-9]+)?\.[A-Za-z0-9+]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_REASON_CHARS = 200
# These change what the commands print, or which jobs and nodes they speak of.
_MISLEADING = ("SQUEUE_", "SINFO_", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS", "SCONTROL_")


class SlurmError(OSError):
    """SLURM refused, or could not be asked; the message has its own words."""


class UnknownJobError(SlurmError):
    """There is no such job any more."""


@dataclass(frozen=True)
class Job:
    """A row of `squeue`. id of an array's waiting jobs is like `12_[3-8%1]`; nodes is a list as SLURM writes it."""

    id: str
    state: str
    nodes: str
    reason: str


@dataclass(frozen=True)
class Step:
    """A step that is running."""

    id: str
    name: str


@dataclass(frozen=True)
class NodeRow:
    """A node; state as SLURM says it, with its suffix (`*`: it does not answer)."""

    name: str
    state: str
    reason: str

    @property
    def answers(self) -> bool:
        """Whether the controller hears of it, and may start something there."""
        return not self.state.endswith("*") and not self.state.startswith("down")

    @property
    def usable(self) -> bool:
        """Whether nobody wants it out of work either."""
        return self.answers and not self.state.startswith(("drain", "fail", "reboot", "maint"))


class SlurmCommands:
    """Calls of sbatch, squeue, sinfo, scontrol and scancel.

    Raises, all calls:
        SlurmError: if the command is not installed, did not answer in time, or failed.
        ValueError: if a name cannot be one of SLURM's.
    """

    def __init__(self, environ: Mapping[str, str] | None = None, timeout_s: float = _TIMEOUT_S) -> None:
        source = os.environ if environ is None else environ
        self.environ = {name: value for name, value in source.items() if not name.startswith(_MISLEADING)}
        self.timeout_s = timeout_s

    def submit(self, script: str) -> str:
        """Submit a script; returns the job's id."""
        said = self._run(["sbatch", "--parsable"], script).strip()
        job_id = said.partition(";")[0]
        if not _JOB.fullmatch(job_id):
            raise SlurmError(f"sbatch said {said!r}, which names no job")
        return job_id

    def jobs(self, job_id: str) -> list[Job]:
        """The job, or every job of an array; none if SLURM has forgotten it."""
        try:
            said = self._run(["squeue", "-h", "-t", "all", "-j", checked_job(job_id), "-o", "%i|%T|%N|%r"])
        except UnknownJobError:
            return []
        return [Job(*line.split("|", 3)) for line in said.splitlines() if line.count("|") >= 3]

    def steps(self, job_id: str) -> list[Step]:
        """The job's running steps."""
        try:
            said = self._run(["squeue", "-h", "-s", "-j", checked_job(job_id), "-o", "%i|%j"])
        except UnknownJobError:
            return []
        return [Step(*line.split("|", 1)) for line in said.splitlines() if "|" in line]

    def nodes(self, names: Sequence[str] = ()) -> list[NodeRow]:
        """The nodes of that name, or all, each once; one that SLURM does not know is left out."""
        only = ["-n", ",".join(checked_node(name) for name in names)] if names else []
        rows = [line.split("|", 2) for line in self._run(["sinfo", "-h", "-N", *only, "-o", "%N|%T|%E"]).splitlines()]
        found = {row[0]: NodeRow(row[0], row[1], "" if row[2] == "none" else row[2]) for row in rows if len(row) == 3}
        return list(found.values())

    def hostnames(self, node_list: str) -> list[str]:
        """The names in a list as SLURM writes it: `node[1-3,7]`."""
        return self._run(["scontrol", "show", "hostnames", node_list]).split() if node_list else []

    def update_node(self, node: str, state: str, reason: str = "") -> None:
        """Set a node's state. ValueError if there is no such node."""
        words = [f"nodename={checked_node(node)}", f"state={state}"]
        self._run(["scontrol", "update", *words, *([f"reason={one_line(reason)}"] if reason else [])])

    def update_job(self, job_id: str, key: str, value: str) -> None:
        """Set one field of a job: `Requeue`, `Comment`, `ExcNodeList`."""
        self._run(["scontrol", "update", f"JobId={checked_job(job_id)}", f"{key}={_CONTROL.sub(' ', value)}"])

    def requeue(self, job_id: str) -> None:
        """End a job, and put it back into the queue."""
        self._run(["scontrol", "requeue", checked_job(job_id)])

    def job_field(self, job_id: str, field: str) -> str:
        """One word of `scontrol show job`, "" if the job has none such. UnknownJobError if SLURM has forgotten it."""
        said = self._run(["scontrol", "--oneliner", "show", "job", checked_job(job_id)])
        found = re.search(rf"(?:^|\s){re.escape(field)}=(\S*)", said)
        return found[1] if found else ""

    def cancel(self, job_id: str, *options: str) -> None:
        """scancel; options are its own. A job that is over is no error."""
        try:
            self._run(["scancel", *options, checked_job(job_id)])
        except UnknownJobError:
            return

    def kill_step(self, step_id: str, timeout_s: float) -> None:
        """SIGKILL all of a step, and look whether it is gone: scancel reports errors that are none.

        It does not return for a long time if the node is dead, hence timeout_s.
        """
        if not _STEP.fullmatch(step_id):
            raise ValueError(f"{step_id!r} is no step")
        command = ["scancel", "--signal=KILL", step_id]
        try:
            subprocess.run(
                command, env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return
        except FileNotFoundError as error:
            raise _not_installed("scancel") from error

    def _run(self, command: Sequence[str], said: str = "") -> str:
        try:
            done = subprocess.run(
                command,
                env=self.environ,
                input=said,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise _not_installed(command[0]) from error
        except subprocess.TimeoutExpired as error:
            raise SlurmError(f"{command[0]} did not answer in {self.timeout_s:g} s; is slurmctld up?") from error
        if done.returncode == 0:
            return done.stdout
        words = one_line(done.stderr or done.stdout) or f"it ended with {done.returncode}"
        if _UNKNOWN_JOB.search(words):
            raise UnknownJobError(words)
        if _UNKNOWN_NODE.search(words):
            raise ValueError(f"{words}; `everstep nodes` and `sinfo -N` list them")
        raise SlurmError(f"{' '.join(command[:3])}: {words}")


def checked_node(name: str) -> str:
    """The name, if it is one node's and no pattern. ValueError if not."""
    if not _NODE.fullmatch(name):
        raise ValueError(f"{name!r} is no node's name; use one as `sinfo -N` lists it")
    return name


def checked_job(job_id: str) -> str:
    """The id, if it is one. ValueError if not."""
    if not _JOB.fullmatch(job_id):
        raise ValueError(f"{job_id!r} is no job of SLURM's; `squeue --me` lists them")
    return job_id


def one_line(text: str) -> str:
    """Text as SLURM keeps it in a reason or comment: one line, not too long."""
    return _CONTROL.sub(" ", text).strip()[:_REASON_CHARS]


def _not_installed(command: str) -> SlurmError:
    return SlurmError(f"{command} is not installed here; run this on a node that SLURM's commands are on")
