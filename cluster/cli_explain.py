"""`everstep explain` and `everstep policy replay`: why something was done, and whether it would be done again."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional

from trainer.exits import ExitCode

if TYPE_CHECKING:
    from cluster.events import AnyEvent, VerdictGiven
    from cluster.rehearsal import Rehearsed
    from cluster.rundir import RunDir


@dataclasses.dataclass(frozen=True)
class Explain:
    """Say which facts led to which action in an incident."""

    incident: Positional[int]
    """The incident's number; `everstep status` lists them."""
    run: str = ""
    """Name of the run, or its folder; without it, the run that was active last."""
    dir: str = "runs"
    """Where runs are kept."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """`policy replay JOURNAL`: run today's policy over an old journal, and say where it would decide otherwise."""

    what: Positional[Literal["replay"]]
    """What to do with it."""
    journal: Positional[Path]
    """An events.jsonl, or the folder of its run."""
    config: str = ""
    """TOML file, or the name of a preset, to decide by; without it, the run's own config.toml."""


def explain(command: Explain, _overrides: Sequence[str]) -> int:
    """Print an incident's story."""
    from cluster.events import VerdictGiven
    from cluster.journal import read_events
    from cluster.rehearsal import rehearse
    from cluster.rundir import find_run
    from configs.load import load_job

    run_dir = find_run(command.run or _newest_run(command.dir), command.dir)
    events = read_events(run_dir.events)
    given = [each for each in events if isinstance(each, VerdictGiven) and each.incident]
    if not any(each.incident == command.incident for each in given):
        have = ", ".join(str(each.incident) for each in given) or "none"
        raise ValueError(f"run {run_dir.path.name} has no incident {command.incident}; there are: {have}")
    decided = [each for each in rehearse(events, load_job(run_dir.config)) if each.given.incident == command.incident]
    console = Console(soft_wrap=True)
    for line in _story(run_dir, events, decided[0]):
        console.print(escape(line), highlight=False)
    return ExitCode.DONE


def replay_policy(command: Policy, _overrides: Sequence[str]) -> int:
    """Print the decisions that would be others."""
    from cluster.journal import tail
    from cluster.rehearsal import rehearse
    from configs.load import load_job

    journal = command.journal / "events.jsonl" if command.journal.is_dir() else command.journal
    if not journal.is_file():
        raise ValueError(f"{command.journal} is no journal; name an events.jsonl, or the folder of a run")
    config = load_job(command.config or journal.with_name("config.toml"))
    lines = tail(journal, 0)
    decided = rehearse(lines.records, config)
    different = [each for each in decided if each.differs]
    console = Console(soft_wrap=True)
    for each in different:
        for line in _difference(each):
            console.print(escape(line), highlight=False)
    unknown = f", {lines.skipped} lines could not be read" if lines.skipped else ""
    noun = "decision" if len(decided) == 1 else "decisions"
    console.print(f"{len(decided)} {noun}, {len(different)} would be different{unknown}", highlight=False)
    return ExitCode.DONE


def _newest_run(runs: str) -> str:
    """The run whose journal was written last."""
    journals = sorted(Path(runs).glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    if not journals:
        raise ValueError(f"there is no run in {runs}/; name one with --run, or another place with --dir")
    return journals[-1].parent.name


def _story(run_dir: RunDir, events: Sequence[AnyEvent], decided: Rehearsed) -> Iterator[str]:
    given, taken = decided.given, decided.taken
    verdict = given.verdict
    where = " ".join(filter(None, (verdict.node, f"rank {verdict.rank}" if verdict.rank >= 0 else "", verdict.device)))
    step = f", in step {verdict.step}" if verdict.step >= 0 else ""
    what = f"{verdict.cause.value}, {where or 'no single node'}{step}"
    yield f"incident {given.incident} of run {run_dir.path.name}: {what}"
    yield "\nwhat happened"
    for t_wall_s, words in _timeline(events, given):
        yield f"  {_clock(t_wall_s)}  {t_wall_s - given.t_failed_wall_s:+9.2f} s  {words}"
    yield "\nevidence"
    for each in (verdict, *given.others):
        yield f"  {each.cause.value} {each.node or '(no node)'}, {each.severity.value}, {each.certainty.value}"
        yield from (f"    {line}" for line in each.evidence)
    yield f"\ndecision: {taken.action}: {taken.reason}" if taken else "\nno decision: the supervisor was gone before it"
    if taken is not None:
        if not taken.because:
            yield "  (the journal does not say more; by today's policy:)"
        yield from (f"  - {line}" for line in taken.because or decided.again.because)
    if decided.differs:
        yield f"\ntoday it would be {decided.would.action}: {decided.would.reason}"
        yield from (f"  - {line}" for line in decided.again.because)
    folder = run_dir.path / "incidents" / str(given.incident)
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    yield f"\nkept in {folder}: {', '.join(files) or 'nothing'}"


def _timeline(events: Sequence[AnyEvent], given: VerdictGiven) -> Iterator[tuple[float, str]]:
    """(wall time, words) from the last sign of life to the first step after it, or to the run's end."""
    from cluster.console import describe
    from cluster.events import ActionTaken, GenerationPlanned, NodeEvicted, RunStopped, WorkersReported
    from trainer.events import FactKind

    yield given.t_failed_wall_s, "last sign of life before it"
    for event in events[events.index(given) :]:
        match event:
            case _ if event is given:
                yield event.t_wall_s, _plain(describe(event))
            case ActionTaken() if event.incident == given.incident:
                yield event.t_wall_s, _plain(describe(event))
                if event.action in ("nothing", "evict"):
                    return
            case NodeEvicted() | GenerationPlanned():
                yield event.t_wall_s, _plain(describe(event))
            case WorkersReported() if event.fact.kind in (FactKind.LOADED, FactKind.GATHERED, FactKind.PRECISION):
                yield event.t_wall_s, _plain(describe(event))
            case WorkersReported() if event.fact.kind is FactKind.FIRST_STEP:
                if event.fact.generation > given.generation:
                    yield event.t_wall_s, f"step {event.fact.step} is done: back at work"
                    return
            case RunStopped():
                yield event.t_wall_s, _plain(describe(event))
                return


def _difference(each: Rehearsed) -> Iterator[str]:
    assert each.taken is not None
    yield f"incident {each.given.incident} ({each.given.verdict.cause.value}, step {each.given.verdict.step})"
    yield f"  was:   {each.taken.action}: {each.taken.reason}"
    yield f"  would: {each.would.action}: {each.would.reason}"
    yield from (f"    - {line}" for line in each.again.because)


def _plain(markup: str) -> str:
    """A line of the console without its colours."""
    return re.sub(r"(?<!\\)\[/?[a-z ]*\]", "", markup).replace("\\[", "[")


def _clock(t_wall_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(t_wall_s))
