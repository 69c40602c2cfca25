"""`everstep checkpoint ...`: a composition root beside `cluster.cli`; each command imports what it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.filesize import decimal
from tyro.conf import Positional, subcommand

from cluster.cli_snapshots import (
    bucket_of,
    bytes_bar,
    check_step,
    chosen_steps,
    find_bucket,
    known_steps,
    make_console,
    name_steps,
    named_snapshot,
    newest_step,
    node_disks_of,
    print_lines,
    say_repair,
    stages_bar,
)
from trainer.exits import ExitCode


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfRun:
    run: Positional[str]
    """Name of the run, or its folder."""
    dir: str = "runs"
    """Where runs are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithS3(_OfRun):
    s3: str = ""
    """s3://BUCKET/PREFIX to use instead of the run's own [s3]."""
    endpoint: str = ""
    """URL of the S3 server, if it is not AWS's; goes with --s3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ls(_WithS3):
    """List a run's snapshots in every tier that this machine sees; newest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(_OfRun):
    """Verify every byte of the snapshots in the run directory; exit 1 if one is damaged."""

    step: int = -1
    """Only this step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepairSnapshots(_WithS3):
    """Verify every byte, and replace what is damaged or missing from this machine's node disks, S3 or another copy."""

    step: int = -1
    """Only this step."""
    source: Path | None = None
    """A copy of the run directory to take shards from, before S3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull(_WithS3):
    """Bring a snapshot from S3 into the run directory, verified, its manifest last."""

    step: int = -1
    """This step, instead of the newest in S3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push(_WithS3):
    """Send a snapshot from the run directory to S3, its manifest last."""

    step: int = -1
    """This step, instead of the newest in the run directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rm(_WithS3):
    """Remove snapshots, each one's manifest first."""

    steps: Positional[tuple[int, ...]]
    """Steps of the snapshots."""
    where: Literal["run", "s3"] = "run"
    """From the run directory, or from S3."""
    yes: bool = False
    """Really do it."""
    force: bool = False
    """Even if no good snapshot is left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two snapshots, tensor by tensor, whatever their layouts; exit 1 if they differ."""

    a: Positional[str]
    """RUN:STEP, or RUN for its newest."""
    b: Positional[str]
    """RUN:STEP, or RUN for its newest."""
    dir: str = "runs"
    """Where runs are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(_OfRun):
    """Write a snapshot for other tools: a Hugging Face model, or torch's distributed-checkpoint folder."""

    format: Literal["hf", "dcp"]
    """hf: loads in transformers; dcp: loads with torch.distributed.checkpoint, and in torchtitan."""
    output: Path
    """Folder to write."""
    step: int = -1
    """This step, instead of the newest."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights in a Hugging Face model."""
    ema: bool = False
    """The weights' average, in their place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make another tool's checkpoint the first snapshot of a new run. Override with --section.key value."""

    source: Positional[Path]
    """Folder of the checkpoint."""
    config: Positional[str]
    """TOML file, or the name of a packaged preset."""
    format: Literal["hf", "dcp"]
    """hf: safetensors with a config.json; dcp: torch's distributed-checkpoint folder."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Look after a run's snapshots."""

    command: (
        Annotated[Ls, subcommand("ls")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[RepairSnapshots, subcommand("repair")]
        | Annotated[Pull, subcommand("pull")]
        | Annotated[Push, subcommand("push")]
        | Annotated[Rm, subcommand("rm")]
        | Annotated[Diff, subcommand("diff")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Import, subcommand("import")]
    )


def run_checkpoint(command: Any, overrides: Sequence[str]) -> int:
    """Run one of the commands above; returns its exit code. ValueError or OSError for what the user can mend."""
    from checkpointing.layout import SnapshotDamagedError
    from checkpointing.sources import SourceError

    try:
        with tidy_when_terminated():
            return _COMMANDS[type(command)](command, overrides)
    except (SourceError, SnapshotDamagedError) as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def tidy_when_terminated() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: half-written folders and files go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _verify(command: Verify, _overrides: Sequence[str]) -> int:
    from checkpointing.verify import verify_snapshot
    from cluster.rundir import find_run

    run_dir = find_run(command.run, command.dir)
    console, damaged = make_console(), 0
    for step in chosen_steps(run_dir, command.step):
        problems = verify_snapshot(run_dir.path, step)
        damaged += bool(problems)
        console.print(f"step {step}: {'[red]damaged[/]' if problems else 'whole'}", highlight=False)
        print_lines(console, problems)
    return ExitCode.FAILED if damaged else ExitCode.DONE


def _repair(command: RepairSnapshots, _overrides: Sequence[str]) -> int:
    from checkpointing.disk import checkpoints_dir
    from checkpointing.maintenance import repair_snapshot
    from checkpointing.run_source import RunSource
    from cluster.rundir import find_run

    run_dir = find_run(command.run, command.dir)
    if command.source is not None and not checkpoints_dir(command.source).is_dir():
        raise ValueError(f"--source {command.source}: is no copy of a run directory, it has no folder checkpoints")
    copies = [] if command.source is None else [RunSource(command.source)]
    bucket = find_bucket(run_dir, command.s3, command.endpoint, must=False)
    far = bucket or (copies[0] if copies else None)
    console, damaged = make_console(), 0
    for step in chosen_steps(run_dir, command.step):
        with bytes_bar(f"step {step}") as progress:
            problems = repair_snapshot(
                run_dir.path, step, [*node_disks_of(run_dir), *copies], far, say_repair(console), progress
            )
        damaged += bool(problems)
        console.print(f"step {step}: {'[red]cannot be repaired[/]' if problems else 'whole'}", highlight=False)
        print_lines(console, problems)
    return ExitCode.FAILED if damaged else ExitCode.DONE


def _pull(command: Pull, _overrides: Sequence[str]) -> int:
    from checkpointing.maintenance import pull_snapshot
    from cluster.rundir import find_run

    run_dir = find_run(command.run, command.dir)
    bucket = find_bucket(run_dir, command.s3, command.endpoint, must=True)
    assert bucket is not None
    check_step(command.step)
    step = command.step if command.step >= 0 else newest_step(bucket.committed(), "S3")
    console = make_console()
    with bytes_bar(f"step {step}") as progress:
        problems = pull_snapshot(run_dir.path, step, bucket, node_disks_of(run_dir), say_repair(console), progress)
    console.print(f"step {step}: {'[red]not pulled[/]' if problems else 'in the run directory'}", highlight=False)
    print_lines(console, problems)
    return ExitCode.FAILED if problems else ExitCode.DONE


def _push(command: Push, _overrides: Sequence[str]) -> int:
    from checkpointing import disk
    from checkpointing.maintenance import push_snapshot
    from cluster.rundir import find_run

    run_dir = find_run(command.run, command.dir)
    bucket = find_bucket(run_dir, command.s3, command.endpoint, must=True)
    assert bucket is not None
    check_step(command.step)
    if command.step < 0:
        step = newest_step(disk.committed_ages(run_dir.path), str(disk.checkpoints_dir(run_dir.path)))
    else:
        [step] = chosen_steps(run_dir, command.step)
    with bytes_bar(f"step {step}") as progress:
        sent_bytes = push_snapshot(run_dir.path, step, bucket, progress)
    make_console().print(f"step {step}: in S3 ({decimal(sent_bytes)} sent)", highlight=False)
    return ExitCode.DONE


def _rm(command: Rm, _overrides: Sequence[str]) -> int:
    from checkpointing.maintenance import last_good_in_bucket_is_among, last_good_is_among, remove_snapshots
    from cluster.rundir import find_run

    run_dir = find_run(command.run, command.dir)
    bucket = find_bucket(run_dir, command.s3, command.endpoint, must=True) if command.where == "s3" else None
    place = "S3" if bucket else "the run directory"
    known = [step for _, step in bucket.committed()] if bucket else known_steps(run_dir)
    if unknown := sorted(set(command.steps) - set(known)):
        raise ValueError(f"{place} has no snapshot of step {unknown[0]}; it has {name_steps(known)}")
    if not command.steps:
        raise ValueError(f"name the steps to remove; {place} has {name_steps(known)}")
    if not command.force and (
        last_good_in_bucket_is_among(bucket, command.steps)
        if bucket
        else last_good_is_among(run_dir.path, command.steps)
    ):
        raise ValueError(f"no good snapshot would be left in {place}: keep one, or add --force")
    if not command.yes:
        raise ValueError(
            f"this removes {name_steps(command.steps)} of {run_dir.path.name} from {place}: add --yes to do it"
        )
    if bucket:
        for step in command.steps:
            bucket.remove(step)
    else:
        remove_snapshots(run_dir.path, command.steps)
    make_console().print(f"removed {name_steps(command.steps)} from {place}", highlight=False)
    return ExitCode.DONE


def _diff(command: Diff, _overrides: Sequence[str]) -> int:
    from checkpointing.compare import Finding, compare_snapshots

    a, b = (named_snapshot(name, command.dir) for name in (command.a, command.b))
    console = make_console()
    found: dict[Finding, int] = {}
    with bytes_bar("verify") as progress:
        for diff in compare_snapshots(a, b, progress):
            found[diff.finding] = found.get(diff.finding, 0) + 1
            if diff.finding is Finding.DIFFER:
                size = "" if diff.max_abs is None else f", at most {diff.max_abs:.3g}"
                line = f"{diff.name}: {diff.differing:,} of {diff.elements:,} elements differ{size}"
                console.print(line, highlight=False, markup=False)
            elif diff.finding is not Finding.EQUAL:
                console.print(f"{diff.name}: {diff.finding.value}", highlight=False, markup=False)
    counts = ", ".join(f"{count} {finding.value}" for finding, count in found.items())
    console.print(f"step {a[1]} and step {b[1]}: {counts or 'no tensors'}", highlight=False)
    return ExitCode.DONE if set(found) <= {Finding.EQUAL} else ExitCode.FAILED


def _export(command: Export, _overrides: Sequence[str]) -> int:
    from cluster.rundir import find_run

    run_dir = find_run(command.run, command.dir)
    check_step(command.step)
    step = named_snapshot(command.run if command.step < 0 else f"{command.run}:{command.step}", command.dir)[1]
    with stages_bar() as progress:
        if command.format == "hf":
            from checkpointing.export_hf import export_hf

            export_hf(run_dir.path, step, command.output, command.dtype, progress, averaged=command.ema)
        else:
            from checkpointing.export_dcp import export_dcp

            export_dcp(run_dir.path, step, command.output, progress, averaged=command.ema)
    make_console().print(f"step {step} of {run_dir.path.name} exported to {command.output}", highlight=False)
    return ExitCode.DONE


def _import(command: Import, overrides: Sequence[str]) -> int:
    from cluster.rundir import RunDir, write_atomically
    from configs.load import load_job, resolve_toml

    config = load_job(command.config, overrides)
    run_dir = RunDir.of(config)
    bucket = bucket_of(config, run_dir)
    if bucket is not None and (there := [step for _, step in bucket.committed()]):
        raise ValueError(
            f"S3 has snapshots of a run {run_dir.path.name} already, {name_steps(there)}, and a job would go on from "
            "them: import into a run of another name"
        )
    with stages_bar() as progress:
        if command.format == "hf":
            from checkpointing.import_hf import import_hf

            step = import_hf(command.source, config, run_dir.path, progress)
        else:
            from checkpointing.import_dcp import import_dcp

            step = import_dcp(command.source, config, run_dir.path, progress)
    if not run_dir.config.exists():
        write_atomically(run_dir.config, resolve_toml(config).encode())
    make_console().print(
        f"{command.source} is step {step} of {config.run.name}; "
        f"`{shlex.join(['everstep', 'run', command.config, *overrides])}` goes on from there",
        highlight=False,
    )
    return ExitCode.DONE


def _ls(command: Ls, _overrides: Sequence[str]) -> int:
    from cluster.cli_listing import print_listing
    from cluster.rundir import find_run
    from configs.load import load_job

    run_dir = find_run(command.run, command.dir)
    unreachable = print_listing(
        run_dir,
        load_job(run_dir.config),
        find_bucket(run_dir, command.s3, command.endpoint, must=False),
        make_console(),
    )
    return ExitCode.FAILED if unreachable else ExitCode.DONE


_COMMANDS: Mapping[type, Callable[[Any, Sequence[str]], int]] = {
    Ls: _ls,
    Verify: _verify,
    RepairSnapshots: _repair,
    Pull: _pull,
    Push: _push,
    Rm: _rm,
    Diff: _diff,
    Export: _export,
    Import: _import,
}
