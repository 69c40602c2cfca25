"""The command line. A composition root: each command imports what it needs, so that `status` answers in a blink."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro
from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, subcommand

from cluster.cli_checkpoint import Checkpoint, Import, run_checkpoint
from cluster.cli_doctor import Doctor, doctor
from cluster.cli_explain import Explain, Policy, explain, replay_policy
from cluster.cli_nodes import Nodes, nodes
from cluster.cli_submit import Cancel, Drain, Readmit, Submit, cancel, drain, readmit, submit
from configs.load import ConfigError
from trainer.exits import ExitCode

if TYPE_CHECKING:
    from cluster.console import ConsoleWatcher
    from cluster.rundir import RunDir
    from cluster.watchers import Watcher
    from configs.schema import JobConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a job, or go on with it: the same command again resumes. Override with --section.key value."""

    config: Positional[str]
    """TOML file, or the name of a packaged preset."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Print the resolved configuration, checked, with overrides applied."""

    config: Positional[str]
    """TOML file, or the name of a packaged preset."""


@dataclasses.dataclass(frozen=True)
class Status:
    """Show how a run stands: step, throughput, ETTR, what failed and what it cost."""

    run: Positional[str]
    """Name of the run, or its folder."""
    dir: str = "runs"
    """Where runs are kept."""


@dataclasses.dataclass(frozen=True)
class Logs:
    """Print the logs of a run's ranks, or of its agents with --agent."""

    run: Positional[str]
    """Name of the run, or its folder."""
    node: str = ""
    """Only this node."""
    rank: int = -1
    """Only this rank."""
    agent: bool = False
    """The agents' logs, not the ranks'."""
    follow: bool = False
    """Go on printing as lines come, until Ctrl-C."""
    dir: str = "runs"
    """Where runs are kept."""


@dataclasses.dataclass(frozen=True)
class DataPrepare:
    """Turn text into training data: tokenizer.json and corpus.bin/.idx."""

    sources: Positional[tuple[Path, ...]] = ()
    """Files and folders: text, jsonl, parquet, also compressed. Without any: the installed Python's own library."""
    output: Path = Path("data/default")
    """Folder to write."""
    vocab_size: int = 2048
    """Entries of the tokenizer that is trained."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of training one."""


@dataclasses.dataclass(frozen=True)
class DataShow:
    """Say what a prepared corpus holds."""

    corpus: Positional[Path] = Path("data/default/corpus")
    """Prefix of the .bin and .idx files."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepare training data."""

    command: Annotated[DataPrepare, subcommand("prepare")] | Annotated[DataShow, subcommand("show")]


Command = (
    Annotated[Run, subcommand("run")]
    | Annotated[Submit, subcommand("submit")]
    | Annotated[Cancel, subcommand("cancel")]
    | Annotated[Config, subcommand("config")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Logs, subcommand("logs")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Nodes, subcommand("nodes")]
    | Annotated[Drain, subcommand("drain")]
    | Annotated[Readmit, subcommand("readmit")]
    | Annotated[Policy, subcommand("policy")]
    | Annotated[Checkpoint, subcommand("checkpoint")]
    | Annotated[Data, subcommand("data")]
)


def main() -> None:
    """Entry point of `everstep`."""
    sys.exit(dispatch(sys.argv[1:]))


def dispatch(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code. What the user can mend is said in a line, without a traceback."""
    parsed: Any
    parsed, overrides = tyro.cli(
        cast(Any, Command),
        args=list(arguments),
        prog="everstep",
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    command = parsed.command if isinstance(parsed, (Checkpoint, Data)) else parsed
    errors = Console(stderr=True, soft_wrap=True)
    if overrides and not isinstance(command, (Run, Submit, Config, Import)):
        errors.print(f"[bold red]error:[/] unknown option {escape(overrides[0])}; `everstep --help` lists them")
        return ExitCode.BAD_INPUT
    try:
        if isinstance(parsed, Checkpoint):
            return run_checkpoint(command, overrides)
        return _COMMANDS[type(command)](command, overrides)
    except ConfigError as error:
        for line in str(error).splitlines():
            errors.print(f"[bold red]error:[/] {escape(line)}", highlight=False)
        return ExitCode.BAD_INPUT
    except BrokenPipeError:
        return ExitCode.DONE
    except KeyboardInterrupt:
        errors.print("interrupted; the same command begins again")
        return ExitCode.REQUEUE
    except (ValueError, OSError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        return ExitCode.BAD_INPUT if isinstance(error, ValueError) else ExitCode.FAILED


def _run(command: Run, overrides: Sequence[str]) -> int:
    from checkpointing.fence import raise_fence
    from cluster.console import SteadyConsole
    from cluster.run import run_job
    from cluster.rundir import RunDir
    from configs.load import check_files, load_job

    config = load_job(command.config, overrides)
    if problems := check_files(config):
        raise ConfigError(problems)
    run_dir = RunDir.of(config)
    console = SteadyConsole(soft_wrap=True)
    with _watching(config, run_dir, console) as (shown, watcher):
        try:
            code = run_job(config, watcher, _newest_verified_snapshot, raise_fence)
        except (ValueError, OSError):
            raise
        except Exception as error:
            log = run_dir.path / "supervisor-error.log"
            log.write_text(traceback.format_exc())
            raise OSError(
                f"the supervisor failed ({type(error).__name__}: {error}; {log} has it all); training goes on without "
                "it, and the same command takes over"
            ) from error
    if code == ExitCode.DONE and not shown.saw_events:
        console.print(
            f"run {config.run.name} is already at step {config.training.steps}; raise training.steps to go on, or "
            "choose another run.name"
        )
    _print_report(run_dir, console, write=True, ended=True)
    return code


@contextlib.contextmanager
def _watching(config: JobConfig, run_dir: RunDir, console: Console) -> Iterator[tuple[ConsoleWatcher, Watcher]]:
    """What a person sees here, and all who are told of events."""
    from cluster.alerts import open_alerts
    from cluster.console import ConsoleWatcher
    from cluster.telemetry import WandbSink
    from cluster.watchers import Watchers

    alerts = open_alerts(config, os.environ)
    sink = WandbSink(config, run_dir) if config.telemetry.wandb != "off" else None
    shown = ConsoleWatcher(console, run_dir, sink)
    try:
        yield shown, Watchers(shown, alerts) if alerts else shown
    finally:
        shown.close()
        if alerts:
            alerts.close()


def _newest_verified_snapshot(run_dir: Path) -> int:
    from checkpointing.verify import list_snapshots, verify_snapshot

    for info in list_snapshots(run_dir):
        if not verify_snapshot(run_dir, info.step):
            return info.step
    return -1


def _print_report(run_dir: RunDir, console: Console, write: bool, ended: bool) -> None:
    from cluster.incidents import write_cost
    from cluster.journal import read_events, read_steps
    from cluster.render import render
    from cluster.report import summary, write_report
    from configs.load import load_job

    found = read_events(run_dir.events)
    if not found:
        return
    report = summary(load_job(run_dir.config), found, read_steps(run_dir.metrics), None if ended else time.time())
    if write:
        try:
            write_report(run_dir.path, report)
            for incident in report.incidents:
                write_cost(run_dir.path, incident.cost)
        except OSError as error:
            console.print(f"[bold red]the report could not be written:[/] {escape(str(error))}")
    # Wrapped, not cut: a log file has no width.
    console.print(render(report), soft_wrap=False, width=None if console.is_terminal else 160)


def _config(command: Config, overrides: Sequence[str]) -> int:
    from configs.load import load_job, resolve_toml

    sys.stdout.write(resolve_toml(load_job(command.config, overrides)))
    return ExitCode.DONE


def _status(command: Status, _overrides: Sequence[str]) -> int:
    from cluster.backend import read_submission
    from cluster.cli_submit import scheduler_view
    from cluster.rundir import RunDir, find_run_folder, supervisor_alive

    run_dir = RunDir(find_run_folder(command.run, command.dir))
    console = Console(soft_wrap=True)
    submission = read_submission(run_dir.path)
    if submission is not None:
        try:
            seen = scheduler_view(submission)
            said = f"{seen.state} ({seen.detail})"
        except (OSError, ValueError) as error:
            said = f"cannot be asked: {error}"
        console.print(f"{submission.cluster} {submission.job_id}: {said}", highlight=False, markup=False)
    if run_dir.config.exists():
        _print_report(run_dir, console, write=False, ended=not supervisor_alive(run_dir))
    return ExitCode.DONE


def _logs(command: Logs, _overrides: Sequence[str]) -> int:
    from cluster.backend import read_submission
    from cluster.cli_submit import logs_elsewhere
    from cluster.logs import find_logs, print_logs
    from cluster.rundir import RunDir, find_run_folder

    run_dir = RunDir(find_run_folder(command.run, command.dir))
    submission = read_submission(run_dir.path)
    if submission is not None and not run_dir.config.exists() and (where := logs_elsewhere(submission)):
        raise ValueError(where)
    paths = find_logs(run_dir, command.node, command.rank, command.agent)
    with contextlib.suppress(KeyboardInterrupt):
        print_logs(paths, command.follow)
    return ExitCode.DONE


def _data_prepare(command: DataPrepare, _overrides: Sequence[str]) -> int:
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from trainer.prepare import PrepareProgress, PrepareSettings, prepare

    console = Console(soft_wrap=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("reading")

        def show(progress: PrepareProgress) -> None:
            bar.update(
                task,
                description=f"{progress.stage.value}: {progress.documents:,} documents, "
                f"{progress.text_bytes / 1e6:,.1f} MB, {progress.tokens:,} tokens",
            )

        settings = PrepareSettings(vocab_size=command.vocab_size)
        made = prepare(command.sources, command.output, settings, command.tokenizer, show)
    word = "already there" if made.reused else "written"
    console.print(f"{made.prefix}.bin/.idx {word}: {made.info.documents:,} documents, {made.info.tokens:,} tokens")
    return ExitCode.DONE


def _data_show(command: DataShow, _overrides: Sequence[str]) -> int:
    from trainer.prepared import read_info

    info = read_info(command.corpus)
    if info is None:
        raise ValueError(f"{command.corpus} is not a prepared corpus; `everstep data prepare` makes one")
    for field in info.__struct_fields__:
        sys.stdout.write(f"{field}: {getattr(info, field)}\n")
    return ExitCode.DONE


_COMMANDS: Mapping[type, Callable[[Any, Sequence[str]], int]] = {
    Run: _run,
    Submit: submit,
    Cancel: cancel,
    Config: _config,
    Status: _status,
    Logs: _logs,
    Doctor: doctor,
    Explain: explain,
    Nodes: nodes,
    Drain: drain,
    Readmit: readmit,
    Policy: replay_policy,
    DataPrepare: _data_prepare,
    DataShow: _data_show,
}


if __name__ == "__main__":
    main()
