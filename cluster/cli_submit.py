"""`everstep submit`, `cancel`, `drain` and `readmit`: the same words on this machine, SLURM and Kubernetes."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from tyro.conf import Positional

from cluster.backend import ClusterKind
from trainer.exits import ExitCode

if TYPE_CHECKING:
    from cluster.backend import Backend, JobRequest, JobStatus, Submission
    from configs.profile import ClusterProfile


@dataclasses.dataclass(frozen=True)
class Submit:
    """Submit a job to a cluster; it comes back by itself until it is done. Override with --section.key value."""

    config: Positional[str]
    """TOML file, or the name of a packaged preset."""
    cluster: ClusterKind = "local"
    """Whose machines."""
    profile: str = ""
    """TOML file with what is the site's own: partition, image, mounts, interfaces ..."""
    nodes: int = 0
    """Nodes that train; without it, what the configuration says."""
    spares: int = -1
    """Warm nodes besides; without it, what the configuration says."""
    dry_run: bool = False
    """Only print exactly what would be submitted."""


@dataclasses.dataclass(frozen=True)
class Cancel:
    """Have a submitted run save and leave, and not come back."""

    run: Positional[str]
    """Name of the run, or its folder."""
    profile: str = ""
    """The profile it was submitted with, where the cluster cannot be found without it."""
    dir: str = "runs"
    """Where runs are kept."""


@dataclasses.dataclass(frozen=True)
class Drain:
    """Give a node no more work: in the history of nodes, and with its owner."""

    node: Positional[str]
    """The node, as `everstep nodes` names it."""
    reason: str = ""
    """Why, for whoever administers it."""
    cluster: ClusterKind = "local"
    """Who owns it."""
    profile: str = ""
    """The site's profile."""
    history: str = ""
    """The file of nodes; without it `nodes.jsonl` in --dir."""
    dir: str = "runs"
    """Where runs are kept."""


@dataclasses.dataclass(frozen=True)
class Readmit:
    """Let a repaired node work again: in the history of nodes, and with its owner."""

    node: Positional[str]
    """The node, as `everstep nodes` names it."""
    reason: str = ""
    """What was done to it."""
    cluster: ClusterKind = "local"
    """Who owns it."""
    profile: str = ""
    """The site's profile."""
    history: str = ""
    """The file of nodes; without it `nodes.jsonl` in --dir."""
    dir: str = "runs"
    """Where runs are kept."""


def submit(command: Submit, overrides: Sequence[str]) -> int:
    """Check everything that can be checked here, then submit, or print what would be."""
    from cluster.backend import Submission, open_backend, read_submission, write_submission
    from configs.shrinking import words_about_sizes

    request = _request(command, overrides)
    backend = open_backend(command.cluster, request.profile)
    sys.stderr.write(f"{request.config.run.name}: {words_about_sizes(request.config)}\n")
    if command.dry_run:
        sys.stdout.write(backend.render(request))
        return ExitCode.DONE
    before = read_submission(request.run_dir)
    if before is not None:
        # Where it was submitted, which need not be where this profile leads.
        _refuse_second(before, _backend_of(before, request.profile))
    request.run_dir.mkdir(parents=True, exist_ok=True)
    job_id = backend.submit(request)
    kubernetes = request.profile.kubernetes if command.cluster == "kubernetes" else None
    made = Submission(
        run=request.config.run.name,
        cluster=command.cluster,
        job_id=job_id,
        t_wall_s=time.time(),
        namespace=kubernetes.namespace if kubernetes else "",
        context=kubernetes.context if kubernetes else "",
        runs=kubernetes.run_dir if kubernetes else "",
    )
    write_submission(request.run_dir, made)
    console = Console(soft_wrap=True)
    console.print(f"submitted {made.run} to {command.cluster} as {job_id}", highlight=False)
    console.print(f"everstep status {made.run} shows it, everstep cancel {made.run} ends it", highlight=False)
    return ExitCode.DONE


def cancel(command: Cancel, _overrides: Sequence[str]) -> int:
    """Cancel what was submitted."""
    from cluster.backend import read_submission
    from cluster.rundir import find_run_folder

    folder = find_run_folder(command.run, command.dir)
    submission = read_submission(folder)
    if submission is None:
        raise ValueError(f"run {folder.name!r} was not submitted; press Ctrl-C where `everstep run` runs")
    _backend_of(submission, _profile(command.profile)).cancel(submission.job_id)
    sys.stdout.write(f"cancelled {submission.run} ({submission.cluster} {submission.job_id})\n")
    return ExitCode.DONE


def drain(command: Drain, _overrides: Sequence[str]) -> int:
    """Drain a node: the history first, which every later run of the site reads."""
    from cluster.backend import open_backend
    from cluster.cli_nodes import note_drained

    profile = _profile(command.profile)
    backend = open_backend(command.cluster, profile)
    machine = command.cluster != "local"
    node = note_drained(command.node, command.reason, command.history, command.dir, machine)
    backend.drain(node.name, f"everstep: {command.reason}")
    _tell_runs_elsewhere("drain", node.name, command, profile)
    return ExitCode.DONE


def readmit(command: Readmit, _overrides: Sequence[str]) -> int:
    """Readmit a node: its owner last, so that it gets no work before its history says that it may."""
    from cluster.backend import open_backend
    from cluster.cli_nodes import note_readmitted

    profile = _profile(command.profile)
    backend = open_backend(command.cluster, profile)
    machine = command.cluster != "local"
    node = note_readmitted(command.node, command.reason, command.history, command.dir, machine)
    _tell_runs_elsewhere("readmit", node.name, command, profile)
    backend.readmit(node.name)
    return ExitCode.DONE


def scheduler_view(submission: Submission) -> JobStatus:
    """How the owner of the machines sees a run's job. OSError or ValueError if it cannot be asked."""
    return _backend_of(submission, _profile("")).status(submission.job_id)


def logs_elsewhere(submission: Submission) -> str:
    """Where to read the logs of a run of which this machine sees only the submission; "" if it must see all."""
    if not submission.runs:
        return ""
    there = _in_pod(submission, "logs", submission.run)
    return f"run {submission.run!r} keeps its logs on a volume that is not here; there: {there}"


def _in_pod(submission: Submission, *words: str) -> str:
    """The command that runs `everstep` with these words where a run's volume is."""
    kind, _, name = submission.job_id.partition("/")
    begin = ["kubectl", *(["--context", submission.context] if submission.context else []), "exec"]
    job = f"job/{name}-supervisor" if kind == "job" else f"job/{name}-supervisor-0"
    return shlex.join([*begin, "-n", submission.namespace, job, "--", "everstep", *words, "--dir", submission.runs])


def _tell_runs_elsewhere(word: str, node: str, command: Drain | Readmit, profile: ClusterProfile) -> None:
    """Runs whose volume is not here remember nodes there: say how they hear of it."""
    from cluster.backend import read_submission

    place = (profile.kubernetes.namespace, profile.kubernetes.context)
    if command.cluster != "kubernetes" or command.history:
        return
    seen: set[str] = set()
    for path in sorted(Path(command.dir).glob("*/submission.json")):
        each = read_submission(path.parent)
        if each is None or not each.runs or each.runs in seen or (each.namespace, each.context) != place:
            continue
        seen.add(each.runs)
        # Of both names, which a node has that its history does not know yet.
        there = _in_pod(each, word, f"{node}/{node}", "--reason", command.reason)
        sys.stdout.write(f"runs in {each.runs} of the cluster remember nodes for themselves; tell them: {there}\n")


def _request(command: Submit, overrides: Sequence[str]) -> JobRequest:
    from cluster.backend import JobRequest
    from cluster.rundir import RunDir
    from configs.load import ConfigError, check_files, load_job

    profile = _profile(command.profile)
    words = [*overrides, "--cluster.backend", command.cluster]
    words += ["--cluster.nodes", str(command.nodes)] if command.nodes else []
    words += ["--cluster.spares", str(command.spares)] if command.spares >= 0 else []
    words += ["--cluster.interface", profile.interface] if profile.interface else []
    if command.cluster != "local":
        chosen = profile.slurm.bad_node if command.cluster == "slurm" else profile.kubernetes.bad_node
        words += ["--cluster.bad_node", chosen]
    config = load_job(command.config, words)
    if command.cluster != "kubernetes" and (problems := check_files(config)):
        raise ConfigError(problems)
    path = Path(command.config)
    return JobRequest(
        config_path=str(path.absolute()) if path.is_file() else command.config,
        overrides=tuple(words),
        config=config,
        profile=profile,
        run_dir=RunDir.of(config).path,
        working_dir=Path.cwd(),
    )


def _refuse_second(before: Submission, backend: Backend) -> None:
    status = backend.status(before.job_id)
    if status.state in ("pending", "running"):
        raise ValueError(
            f"run {before.run!r} is already submitted as {before.cluster} {before.job_id} ({status.detail}); "
            f"`everstep cancel {before.run}` first, or choose another run.name"
        )


def _backend_of(submission: Submission, profile: ClusterProfile) -> Backend:
    import msgspec

    from cluster.backend import open_backend

    if submission.cluster == "kubernetes":
        there = msgspec.structs.replace(
            profile.kubernetes,
            namespace=submission.namespace or profile.kubernetes.namespace,
            # A submission has a namespace; its context may be "", the current one.
            context=submission.context if submission.namespace else profile.kubernetes.context,
        )
        profile = msgspec.structs.replace(profile, kubernetes=there)
    return open_backend(submission.cluster, profile)


def _profile(path: str) -> ClusterProfile:
    from configs.profile import ClusterProfile, load_profile

    return load_profile(path) if path else ClusterProfile()
