"""`everstep doctor`: examines this machine, or with --fleet the network between the nodes of a run under way."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.exits import ExitCode

if TYPE_CHECKING:
    from cluster.fleet_doctor import Answered
    from cluster.rundir import RunDir
    from health.examination import Check, Examination

_STYLES = {"pass": "green", "note": "yellow", "fail": "bold red"}
_LINE_CHARS = 200
_POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Examine this machine as every node is examined before it joins: versions, disks, memory, network, devices.

    Ends with 94 if it is not fit to be a node.
    """

    json: bool = False
    """Print the result as JSON."""
    run_dir: str = "runs"
    """Folder of the runs, whose disk is tried."""
    node_dir: str = ""
    """Folder on this machine's own disk (checkpoint.node_dir), whose disk is tried."""
    ram_dir: str = "/dev/shm"
    """Folder in memory (checkpoint.ram_dir)."""
    gpus: int = 0
    """How many GPUs there must be at least."""
    memory_mib: int = 1024
    """How much memory of each GPU, and at most of the host, is tested."""
    timeout_s: float = 120.0
    """How long the tests may take."""
    fleet: str = ""
    """Name or folder of a run that is under way: have its nodes measure the ways between them instead."""
    dir: str = "runs"
    """Where runs are kept, for --fleet."""


def doctor(command: Doctor, _overrides: Sequence[str]) -> int:
    """Examine, print, and say by the exit code how it went."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _LINE_CHARS)
    return _fleet(command, console) if command.fleet else _machine(command, console)


def _machine(command: Doctor, console: Console) -> int:
    from health.examination import Grade

    examination = _examine(command)
    if command.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(examination)).decode() + "\n")
    else:
        _print(examination.checks, console)
        words = {Grade.PASS: "fit", Grade.NOTE: "fit, with notes", Grade.FAIL: "not fit to be a node"}
        grade = examination.grade
        console.print(f"[{_STYLES[grade]}]{words[grade]}[/] ({examination.seconds:.1f} s)", highlight=False)
    return ExitCode.BAD_NODE if examination.grade is Grade.FAIL else ExitCode.DONE


def _examine(command: Doctor) -> Examination:
    from cluster.doctor import examine, gpu_count_check, own_loopback, spawned_selftest
    from cluster.doctor_gpus import gpu_checks
    from cluster.gpu_devices import split_visible
    from cluster.node_probe import Folder, NodeProbe
    from health.node import Place
    from parallelism.selftest import Settings

    places = {Place.RUN: command.run_dir, Place.NODE: command.node_dir, Place.RAM: command.ram_dir}
    folders = [Folder(place, str(Path(path).absolute())) for place, path in places.items() if path]
    probe = NodeProbe(folders, str(Path(command.run_dir).absolute()))
    settings = Settings(
        timeout_s=command.timeout_s, cpu_mib=max(1, min(command.memory_mib, 256)), gpu_mib=max(1, command.memory_mib)
    )
    visible = split_visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        return examine(
            os.uname().nodename,
            probe.read,
            lambda: spawned_selftest(settings),
            lambda tests: [
                own_loopback(),
                *gpu_count_check(tests, ranks=0, least=command.gpus),
                *gpu_checks(visible, timeout_s=min(10.0, command.timeout_s)),
            ],
        )
    finally:
        probe.close()


def _print(checks: Sequence[Check], console: Console) -> None:
    table = Table("check", "device", "", "", box=None)
    for check in checks:
        words = "; ".join(part for part in (check.value, check.detail) if part)
        table.add_row(
            escape(check.name), escape(check.device), f"[{_STYLES[check.grade]}]{check.grade}[/]", escape(words)
        )
    console.print(table)


def _fleet(command: Doctor, console: Console) -> int:
    from cluster.rundir import find_run, supervisor_alive

    run_dir = find_run(command.fleet, command.dir)
    if not supervisor_alive(run_dir):
        raise ValueError(f"run {run_dir.path.name!r} is not under way: nobody is there to ask its nodes")
    answer = _ask(run_dir, command.timeout_s)
    if answer is None:
        raise OSError(f"no answer within --timeout-s = {command.timeout_s:g} s; `everstep status` shows how it stands")
    if command.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer.report)).decode() + "\n")
    else:
        _print_network(answer, console)
    return ExitCode.DONE if answer.report.findings.well else ExitCode.BAD_NODE


def _ask(run_dir: RunDir, timeout_s: float) -> Answered | None:
    from cluster.fleet_doctor import Answered, Wanted
    from cluster.rundir import write_atomically

    wish = Wanted(id=uuid.uuid4().hex)
    write_atomically(run_dir.network_wish, msgspec.json.encode(wish))
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if run_dir.network.exists():
            answer = msgspec.json.decode(run_dir.network.read_bytes(), type=Answered)
            if answer.id == wish.id:
                return answer
        time.sleep(_POLL_S)  # a file that appears can only be looked for
    return None


def _print_network(answer: Answered, console: Console) -> None:
    report = answer.report
    table = Table("to", "from", "MB/s", "ms", "", box=None)
    for way in sorted(report.ways, key=lambda way: (way.target, way.source)):
        speed = f"{way.mb_per_s:,.1f}" if way.mb_per_s >= 0 else ""
        latency = f"{way.latency_s * 1e3:,.2f}" if way.latency_s >= 0 else ""
        table.add_row(escape(way.target), escape(way.source), speed, latency, f"[bold red]{escape(way.problem)}[/]")
    console.print(table)
    for verdict in report.verdicts:
        for line in verdict.evidence:
            console.print(escape(line), highlight=False)
    for node in report.silent:
        console.print(f"{escape(node)} did not answer", highlight=False)
    state = "[green]all ways are well[/]" if report.findings.well else "[bold red]not all ways are well[/]"
    console.print(f"{state} ({report.rounds} rounds, {report.seconds:.1f} s)", highlight=False)
