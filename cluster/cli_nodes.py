"""`everstep nodes`: where each node is, and why; and the two words that a person may put into their history."""

from __future__ import annotations

import dataclasses
import getpass
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from cluster.backend import ClusterKind
from trainer.exits import ExitCode

if TYPE_CHECKING:
    from cluster.events import AnyEvent
    from cluster.history import Drained, HistoryFile, NodeId, Readmitted
    from cluster.jobstate import JobState
    from cluster.lemons import Standing
    from cluster.rundir import RunDir

_LINE_CHARS = 240
_COLUMNS = ("node", "place", "failures", "evicted", "node-days", "per 1,000 node-days", "why")


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Show each node, where it is and why: of a run, without one of all runs, with --cluster as its owner sees it."""

    run: Positional[str] = ""
    """Name of a run, or its folder."""
    cluster: ClusterKind | None = None
    """Ask the owner of the machines instead."""
    profile: str = ""
    """The site's profile, for --cluster."""
    history: str = ""
    """The file of nodes; without it `nodes.jsonl` in --dir, or the one that the run's configuration names."""
    dir: str = "runs"
    """Where runs are kept."""


def nodes(command: Nodes, _overrides: Sequence[str]) -> int:
    """Show nodes."""
    from cluster.history import HISTORY_FILE, HistoryFile

    file = HistoryFile(Path(command.history or Path(command.dir) / HISTORY_FILE))
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _LINE_CHARS)
    if command.cluster is not None:
        return _show_owners(command.cluster, command.profile, console)
    if command.run:
        return _show_run(command, console)
    known, skipped = _standings(file)
    if not known:
        console.print(f"{file.path} remembers no nodes", highlight=False)
        return ExitCode.DONE
    table = Table(*_COLUMNS, box=None)
    for each in known:
        table.add_row(each.node.label, each.place.value, *_numbers(each), each.reason)
    _print(console, table, file, skipped)
    return ExitCode.DONE


def _show_run(command: Nodes, console: Console) -> int:
    from cluster.history import HistoryFile, history_path
    from cluster.journal import read_events
    from cluster.remembering import remembered
    from cluster.report import size_now
    from cluster.rundir import find_run
    from cluster.state import replay
    from configs.load import load_job

    run_dir = find_run(command.run, command.dir)
    config = load_job(run_dir.config)
    file = HistoryFile(Path(command.history) if command.history else history_path(config, run_dir.path.parent))
    known, skipped = _standings(file, config.cluster.burn_in_hours)
    events = read_events(run_dir.events)
    state = replay(events)
    names = sorted({*state.nodes, *state.remembered})
    past = remembered(names, known)
    table = Table(*_COLUMNS, box=None)
    for name in names:
        standing = past.get(name)
        numbers = _numbers(standing) if standing else ("0.0", "0", "0.0", "")
        place, why = _in_run(name, state, events, run_dir)
        table.add_row(name, place, *numbers, why)
    if size := size_now(config, state):
        console.print(f"on {size}", highlight=False, markup=False)
    _print(console, table, file, skipped)
    return ExitCode.DONE


def _in_run(name: str, state: JobState, events: Sequence[AnyEvent], run_dir: RunDir) -> tuple[str, str]:
    """A node's place in a run, and why it is there."""
    from cluster.events import NodeEvicted, Place
    from cluster.jobstate import NodeStatus

    status, before = state.status(name), state.remembered.get(name)
    told = f"; from before: {before.reason}" if before and before.place is not Place.MEMBER else ""
    if status is None:
        return "left out", before.reason if before else ""
    if status is NodeStatus.EVICTED:
        reasons = [each.reason for each in events if isinstance(each, NodeEvicted) and each.node == name]
        return "evicted", f"{reasons[-1] if reasons else 'by an earlier attempt'}"
    if name in state.order:
        first = state.order.index(name) * state.ranks_per_node
        last = first + state.ranks_per_node - 1
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        return f"{status.value}, {ranks}", f"holds {ranks} of run {run_dir.path.name}{told}"
    if status is NodeStatus.LOST:
        return "lost", "stopped answering"
    turn = [*state.spares].index(name) + 1 if name in state.spares else 0
    return f"spare {turn}", f"stands by{told}"


def _show_owners(kind: ClusterKind, profile: str, console: Console) -> int:
    from cluster.backend import open_backend
    from configs.profile import ClusterProfile, load_profile

    table = Table("node", "state", "reason", box=None)
    for each in open_backend(kind, load_profile(profile) if profile else ClusterProfile()).nodes():
        table.add_row(each.name, each.state, each.reason)
    console.print(table, soft_wrap=False)
    return ExitCode.DONE


def note_drained(name: str, reason: str, history: str, runs: str, machine: bool = False) -> NodeId:
    """Write into the history that a node gets no more work. Raises ValueError for a name that could be several.

    machine: it is one of somebody's cluster, known by this name whether or not the history has heard of it.
    """
    from cluster.history import HISTORY_FILE, Drained

    return _note(Drained, "drain", name, reason, Path(history or Path(runs) / HISTORY_FILE), machine)


def note_readmitted(name: str, reason: str, history: str, runs: str, machine: bool = False) -> NodeId:
    """Write into the history that a node was repaired. See `note_drained`."""
    from cluster.history import HISTORY_FILE, Readmitted

    return _note(Readmitted, "readmit", name, reason, Path(history or Path(runs) / HISTORY_FILE), machine)


def _note(
    kind: type[Drained] | type[Readmitted], word: str, name: str, reason: str, path: Path, machine: bool
) -> NodeId:
    from cluster.history import HistoryFile

    if not reason.strip():
        raise ValueError(f"say why: everstep {word} {name} --reason TEXT")
    file = HistoryFile(path)
    node = _find(name, file, machine)
    if not file.append([kind(t_wall_s=time.time(), node=node, reason=reason, who=getpass.getuser())]):
        raise OSError(f"{file.path} is held by another process; try again")
    sys.stdout.write(f"{node.label}: {word} noted in {file.path}\n")
    return node


def _find(name: str, file: HistoryFile, machine: bool) -> NodeId:
    """The node of that name: `host/name`, or what of it is enough to tell it from others."""
    from cluster.history import NodeId
    from cluster.rundir import safe_name

    host, slash, rest = name.partition("/")
    safe_name(host, "node")
    if slash:
        safe_name(rest, "node")
    known = [each.node for each in _standings(file)[0]]
    exact = [each for each in known if name == each.label]
    matching = exact or [each for each in known if name in (each.name, each.host)]
    if len(matching) > 1:
        raise ValueError(f"{name!r} could be {', '.join(each.label for each in matching)}; say which")
    if matching:
        return matching[0]
    if slash or machine:
        return NodeId(host, rest if slash else host)
    have = ", ".join(each.label for each in known) or "none"
    raise ValueError(f"{file.path} knows no node {name!r}; it has: {have} (a new one is named host/name)")


def _standings(file: HistoryFile, burn_in_hours: float | None = None) -> tuple[list[Standing], int]:
    from cluster.lemons import standings
    from configs.schema import ClusterConfig

    hours = ClusterConfig().burn_in_hours if burn_in_hours is None else burn_in_hours
    history = file.read()
    return standings(history.entries, time.time(), hours), history.skipped


def _numbers(standing: Standing) -> tuple[str, str, str, str]:
    rate = f"{1000 * standing.failures_per_day:.1f}"
    return f"{standing.failures:.1f}", str(standing.evictions), f"{standing.node_days:.1f}", rate


def _print(console: Console, table: Table, file: HistoryFile, skipped: int) -> None:
    console.print(table, soft_wrap=False)
    if skipped:
        console.print(f"{file.path}: {skipped} lines could not be read and are skipped", highlight=False)
