"""A run in one struct: how far it is, what failed, what that cost; as `report.json` and `report.md`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.events import AnyEvent
from cluster.incidents import write_whole
from cluster.jobstate import HARMLESS_ACTIONS, Incident, JobState
from cluster.ledger import Goodput, IncidentCost, account
from cluster.policy_size import size_words
from cluster.state import replay
from cluster.stepline import UNKNOWN, format_duration
from cluster.timeline import TimeCause
from configs.schema import JobConfig
from health.verdict import Cause
from trainer.events import StepRecord
from trainer.exits import ExitCode

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
_QUOTED = (Cause.USER_ERROR, Cause.OUT_OF_MEMORY, Cause.BAD_INPUT, Cause.PEER_LOST)


class IncidentSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One incident for a person: what failed (in the error's own words if there are any), what was done, the cost."""

    number: int
    cause: Cause
    node: str
    rank: int
    step: int
    evidence: str
    action: str
    reason: str
    recovered: bool
    cost: IncidentCost


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. None means not known. tokens_per_sec is of all ranks, its median over the productive steps.

    outcome: running, done, requeue, or failed; exit_code is None while no supervisor has written an end.
    size: on how many of its nodes the run is, and why; resizes: a line for each change of that.
    """

    run: str
    outcome: str
    exit_code: int | None
    reason: str
    attempt: int
    step: int
    target_steps: int
    loss_first: float | None
    loss_last: float | None
    tokens_per_sec: float | None
    tokens_per_sec_per_gpu: float | None
    newest_snapshot: int | None
    nodes: dict[str, str]
    incidents: tuple[IncidentSummary, ...]
    goodput: Goodput
    report: str
    size: str = ""
    resizes: tuple[str, ...] = ()


def summary(
    config: JobConfig,
    events: Sequence[AnyEvent],
    steps: Sequence[StepRecord],
    now_wall_s: float | None = None,
) -> RunSummary:
    """Sum a run up. now_wall_s: as in `cluster.ledger.account`."""
    state = replay(events)
    goodput = account(events, steps, now_wall_s)
    kept = surviving(steps)
    losses = [record.loss_avg for record in kept if record.loss_avg is not None]
    rate = statistics.median(record.tokens_per_sec_per_gpu for record in kept) if kept else None
    total = [record.tokens_per_sec_per_gpu * (record.ranks or config.world_size) for record in kept]
    return RunSummary(
        run=config.run.name,
        outcome=_outcome(state, now_wall_s is not None),
        exit_code=state.exit_code,
        reason=state.stop_reason,
        attempt=state.attempt,
        step=max([kept[-1].step if kept else 0, state.newest_step if state.exit_code == ExitCode.DONE else 0]),
        target_steps=state.target_steps or config.training.steps,
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        tokens_per_sec=statistics.median(total) if total else None,
        tokens_per_sec_per_gpu=rate,
        newest_snapshot=state.snapshots[-1] if state.snapshots else None,
        nodes={name: node.status.value for name, node in sorted(state.nodes.items())},
        incidents=_incidents(state, goodput),
        goodput=goodput,
        report=str(Path(config.run.dir) / config.run.name / REPORT_MD),
        size=size_now(config, state),
        resizes=tuple(f"{_clock(each.t_wall_s)}: {_nodes(each.nodes)}: {each.reason}" for each in state.resizes),
    )


def surviving(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """The records of the steps that count, by step: of a step computed more than once, the last generation's, and
    nothing behind the place from which a later generation went on."""
    kept: list[StepRecord] = []
    for record in sorted(steps, key=lambda record: (record.generation, record.step)):
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


def write_report(run_dir: Path, report: RunSummary) -> Path:
    """Write `report.json` and `report.md` into the run directory; returns the latter's path. Raises OSError."""
    write_whole(run_dir / REPORT_JSON, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    write_whole(run_dir / REPORT_MD, markdown(report).encode())
    return run_dir / REPORT_MD


def markdown(report: RunSummary) -> str:
    """The report as Markdown."""
    lines = [f"# {report.run}: {report.outcome}", ""]
    lines += [f"- {name}: {text}" for name, text in headlines(report)]
    lines += ["", "## What failed", ""]
    if not report.incidents:
        lines.append("Nothing.")
    for each in report.incidents:
        lines += [f"### {incident_title(each)}", "", *(f"- {line}" for line in incident_lines(each)), ""]
    lines += ["", "## Where the time went", "", "| cause | seconds | share |", "|---|---:|---:|"]
    lines += [f"| {cause} | {seconds:.1f} | {share} |" for cause, seconds, share in time_table(report.goodput)]
    return "\n".join(lines).rstrip() + "\n"


def headlines(report: RunSummary) -> list[tuple[str, str]]:
    """The facts of a run as (name, text), for every way of showing them."""
    goodput = report.goodput
    end = f" (exit {report.exit_code}: {report.reason})" if report.exit_code is not None else ""
    rate = UNKNOWN
    if report.tokens_per_sec is not None and report.tokens_per_sec_per_gpu is not None:
        rate = f"{report.tokens_per_sec:,.0f} ({report.tokens_per_sec_per_gpu:,.0f} a rank)"
    loss = UNKNOWN
    if report.loss_first is not None and report.loss_last is not None:
        loss = f"{report.loss_first:.4f} -> {report.loss_last:.4f}"
    ettr = UNKNOWN if goodput.ettr is None else f"{goodput.ettr:.3f}"
    if goodput.ettr is not None and goodput.productive_share < 1.0:
        share = goodput.ettr * goodput.productive_share
        ettr += f" ({share:.3f} of the machines asked for: {goodput.productive_share:.0%} of them held ranks)"
    return [
        ("outcome", f"{report.outcome}{end}"),
        ("steps", f"{report.step}/{report.target_steps}"),
        ("loss", loss),
        ("tokens/s", rate),
        ("wall time", format_duration(goodput.wall_s)),
        ("ettr", ettr),
        ("restarts", f"{goodput.restarts}, {_again(goodput.lost_steps)}"),
        ("newest snapshot", UNKNOWN if report.newest_snapshot is None else f"step {report.newest_snapshot}"),
        ("nodes", ", ".join(f"{name} {status}" for name, status in report.nodes.items()) or UNKNOWN),
        *([("size", report.size)] if report.size else []),
        *(("resized", line) for line in report.resizes),
    ]


def incident_title(incident: IncidentSummary) -> str:
    """`1: node_lost, node-1, in step 12`; what is not known is left out."""
    rank = f" rank {incident.rank}" if incident.rank >= 0 else ""
    step = f", in step {incident.step}" if incident.step >= 0 else ""
    return f"{incident.number}: {incident.cause.value}, {incident.node or 'no single node'}{rank}{step}"


def incident_lines(incident: IncidentSummary) -> list[str]:
    """Evidence, action and cost of an incident, one sentence each."""
    cost = incident.cost
    recovery = f"back after {format_duration(cost.recovery_s)}" if incident.recovered else "not recovered"
    lines = [incident.evidence] if incident.evidence else []
    if incident.action:
        lines.append(f"{incident.action}: {incident.reason}")
    if incident.action in HARMLESS_ACTIONS:
        return lines
    lines.append(
        f"noticed after {format_duration(cost.noticing_s)}, {recovery}; {_again(cost.lost_steps)}"
        f" ({format_duration(cost.lost_s)} of work lost)"
    )
    return lines


def time_table(goodput: Goodput) -> list[tuple[str, float, str]]:
    """Rows (cause, seconds, share of the wall time): productive first, then what cost most; no rows of 0.0."""
    rows = [(TimeCause.PRODUCTIVE, goodput.productive_s)]
    rows += sorted(goodput.badput_s.items(), key=lambda item: -item[1])
    wall_s = goodput.wall_s or 1.0
    return [
        (cause.value, seconds, f"{100 * seconds / wall_s:.1f}%")
        for cause, seconds in rows
        if seconds >= 0.05 or cause is TimeCause.PRODUCTIVE
    ]


def size_now(config: JobConfig, state: JobState) -> str:
    """`1 of 2 nodes (tp 2) since 12:03:04: why`; "" while it is as large as it should be."""
    if not state.order or len(state.order) >= (state.wanted_nodes or config.cluster.nodes):
        return ""
    since = f" since {_clock(state.resizes[-1].t_wall_s)}: {state.resizes[-1].reason}" if state.resizes else ""
    return f"{size_words(len(state.order), config)}{since}"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _clock(t_wall_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(t_wall_s))


def _again(steps: int) -> str:
    return f"{steps or 'no'} finished {'step' if steps == 1 else 'steps'} computed again"


def _outcome(state: JobState, supervised: bool) -> str:
    if state.exit_code is None:
        return "running" if supervised else "without a supervisor"
    return {ExitCode.DONE.value: "done", ExitCode.REQUEUE.value: "requeue"}.get(state.exit_code, "failed")


def _incidents(state: JobState, goodput: Goodput) -> tuple[IncidentSummary, ...]:
    costs = {cost.incident: cost for cost in goodput.incidents}
    return tuple(_incident(each, costs[each.number]) for each in state.incidents)


def _incident(incident: Incident, cost: IncidentCost) -> IncidentSummary:
    verdict = incident.verdict
    return IncidentSummary(
        number=incident.number,
        cause=verdict.cause,
        node=verdict.node,
        rank=verdict.rank,
        step=verdict.step,
        evidence="; ".join(verdict.evidence[: 2 if verdict.cause in _QUOTED else 1]),
        action=incident.action,
        reason=incident.reason,
        recovered=not incident.open,
        cost=cost,
    )
