"""What the commands about snapshots share: finding runs, steps and buckets, and showing how far something is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

if TYPE_CHECKING:
    from checkpointing.node_disk import NodeDisk
    from checkpointing.repair import Repair
    from checkpointing.s3 import Bucket
    from cluster.rundir import RunDir
    from configs.schema import JobConfig, S3Config

_FILE_WIDTH = 160


def find_bucket(run_dir: RunDir, url: str, endpoint: str, must: bool) -> Bucket | None:
    """The run's bucket, or the one that the command names; None, or ValueError if there must be one, if neither is."""
    from configs.load import load_job

    settings = _settings(load_job(run_dir.config), url, endpoint)
    if not settings.bucket:
        if must:
            raise ValueError(
                f"run {run_dir.path.name} has no bucket: name one with --s3 s3://BUCKET/PREFIX, or set s3.bucket"
            )
        return None
    from checkpointing.s3 import Bucket

    return Bucket(settings, run_dir.path.name)


def bucket_of(config: JobConfig, run_dir: RunDir) -> Bucket | None:
    """The bucket of a run that need not be there yet; None if it has none."""
    if not config.s3.bucket:
        return None
    from checkpointing.s3 import Bucket

    return Bucket(config.s3, run_dir.path.name)


def _settings(config: JobConfig, url: str, endpoint: str) -> S3Config:
    if not url:
        if endpoint:
            raise ValueError("--endpoint goes with --s3 s3://BUCKET/PREFIX")
        return config.s3
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise ValueError(f"--s3 {url}: write it as s3://BUCKET/PREFIX")
    prefix = prefix.strip("/") or config.s3.prefix
    return msgspec.structs.replace(config.s3, bucket=bucket, prefix=prefix, endpoint=endpoint)


def node_disks_of(run_dir: RunDir) -> list[NodeDisk]:
    """The disks of nodes that have run on this machine."""
    from checkpointing.holdings import node_disks
    from configs.load import load_job

    root = load_job(run_dir.config).checkpoint.node_dir
    return node_disks(run_dir.node_root(root)) if root else []


def named_snapshot(name: str, runs: str) -> tuple[Path, int]:
    """The run directory and step that RUN or RUN:STEP names; of RUN alone its newest."""
    from checkpointing import disk
    from cluster.rundir import find_run

    run, colon, step = name.rpartition(":")
    if colon and step.isdigit():
        run_dir = find_run(run, runs)
        return run_dir.path, chosen_steps(run_dir, int(step))[0]
    run_dir = find_run(name, runs)
    return run_dir.path, newest_step(disk.committed_ages(run_dir.path), f"run {run_dir.path.name}")


def known_steps(run_dir: RunDir) -> list[int]:
    """Steps of the snapshots in the run directory, newest first."""
    from checkpointing import disk

    return [step for _, step in disk.committed_ages(run_dir.path)]


def chosen_steps(run_dir: RunDir, step: int) -> list[int]:
    """That step, or all for -1, newest first. ValueError if the run does not have it, or none at all."""
    known = known_steps(run_dir)
    check_step(step)
    if not known:
        raise ValueError(f"run {run_dir.path.name} has no snapshot in {run_dir.path / 'checkpoints'}")
    if step >= 0 and step not in known:
        raise ValueError(f"run {run_dir.path.name} has no snapshot of step {step}; it has {name_steps(known)}")
    return known if step < 0 else [step]


def check_step(step: int) -> None:
    """ValueError for a step that cannot be; -1 stands for none named."""
    if step < -1:
        raise ValueError(f"--step {step}: steps count from 0")


def newest_step(ages: Sequence[tuple[int, int]], place: str) -> int:
    """The first one's step. ValueError, naming the place, if there is none."""
    if not ages:
        raise ValueError(f"{place} has no snapshot")
    return ages[0][1]


def name_steps(steps: Sequence[int]) -> str:
    """Steps for a sentence."""
    return ", ".join(f"step {step}" for step in steps) or "none"


def say_repair(console: Console) -> Callable[[Repair], None]:
    """What prints a line for each shard that is fetched."""

    def say(repair: Repair) -> None:
        line = f"{repair.file} of step {repair.step}: fetched from {repair.source} ({repair.reason})"
        console.print(line, highlight=False, markup=False)

    return say


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Problems, each in a line, indented."""
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False)


def make_console() -> Console:
    """Where results go: lines are never cut."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else _FILE_WIDTH)


@contextlib.contextmanager
def stages_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, for what goes through named stages."""
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), console=console, transient=True,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("")

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            bar.update(task, description=stage, completed=done_bytes, total=total_bytes)

        yield show


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, for bytes done and in all."""
    with stages_bar() as show:
        yield lambda done_bytes, total_bytes: show(what, done_bytes, total_bytes)
