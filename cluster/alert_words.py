"""Which events are worth telling somebody who is not looking, and in what words. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster import events
from configs.schema import AlertsConfig
from health.blame import blame_words
from health.verdict import Severity, Verdict
from trainer.events import Fact, FactKind
from trainer.exits import ExitCode

EVIDENCE_LINES = 4
HELD_LINES = 10
_LONGEST_LINE = 300
_REACH = {severity.value: at for at, severity in enumerate(Severity)}
_SNAPSHOT_TROUBLE = {
    FactKind.SNAPSHOT_FAILED: "a snapshot was not saved",
    FactKind.SNAPSHOT_REJECTED: "a snapshot was rejected",
    FactKind.SNAPSHOT_DISTRUSTED: "a snapshot is distrusted",
    FactKind.SNAPSHOT_REPAIRED: "a snapshot was repaired",
    FactKind.TIER_BEHIND: "copies of snapshots are behind",
    FactKind.TIER_CAUGHT_UP: "copies of snapshots have caught up",
}


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """What is told. kind: as in `alerts.events`, or `summary`; events: the journal's own, for a machine.

    title: one line, alike for all of a kind. text: all of it, lines. urgent: the last that is heard of the run.
    """

    run: str
    kind: str
    severity: Severity
    title: str
    text: str
    t_wall_s: float
    urgent: bool = False
    events: tuple[events.AnyEvent, ...] = ()


class AlertWriter:
    """Turns events, in the journal's order, into alerts. A verdict waits for the action that follows it."""

    def __init__(self, run: str, config: AlertsConfig) -> None:
        self.run = run
        self.config = config
        self._waiting: events.VerdictGiven | None = None
        self._told_of = ""
        self._wanted = 0
        self._nodes = 0

    def take(self, event: events.AnyEvent) -> list[Alert]:
        """The alerts that are due now that this has happened."""
        given = self._waiting
        if given is not None and isinstance(event, events.ActionTaken) and event.incident == given.incident:
            self._waiting = None
            told = self._filtered(self._incident(given, event))
            # Its eviction follows, and is no news.
            self._told_of = event.node if told else ""
            return told
        due = self.flush()
        match event:
            case events.VerdictGiven():
                self._waiting = event
            case events.NodeEvicted() if event.node != self._told_of:
                due += self._filtered(self._short("eviction", f"{event.node} is evicted: {event.reason}", event))
            case events.WorkersReported(fact=fact) if fact.kind in _SNAPSHOT_TROUBLE:
                due += self._filtered(self._short("snapshot", _snapshot_words(fact), event))
            case events.WorkersReported(fact=fact) if fact.kind is FactKind.EVALUATION_FAILED:
                words = f"the evaluation of step {fact.step} failed: {fact.detail}"
                due += self._filtered(self._short("evaluation", words, event))
            case events.GenerationPlanned():
                due += self._resized(event)
            case events.RunStarted():
                self._wanted = event.nodes
                again = f", attempt {event.attempt}" if event.attempt > 1 else ""
                due += self._filtered(self._short("begin", f"begins{again}: {event.target_steps} steps", event))
            case events.SupervisorTookOver():
                due += self._filtered(self._short("begin", "a new supervisor took over; training never stopped", event))
            case events.RunStopped():
                due += self._filtered(self._end(event))
        return due

    def flush(self) -> list[Alert]:
        """The verdict that still waits for its action, if one does, without it."""
        given, self._waiting = self._waiting, None
        return self._filtered(self._incident(given, None)) if given is not None else []

    def summary(self, held: Mapping[str, int], t_wall_s: float) -> Alert:
        """What was held back, in one alert."""
        title = f"{sum(held.values())} more alerts were held back"
        lines = [f"[{self.run}] {title}", *_held_lines(held)]
        return Alert(
            run=self.run, kind="summary", severity=Severity.NOTICE, title=title, text=_text(lines), t_wall_s=t_wall_s
        )  # fmt: skip

    def _filtered(self, alert: Alert) -> list[Alert]:
        wanted = alert.kind in self.config.events
        quiet = alert.kind == "verdict" and _REACH[alert.severity] < _REACH[self.config.min_severity]
        return [alert] if wanted and not quiet else []

    def _incident(self, given: events.VerdictGiven, taken: events.ActionTaken | None) -> Alert:
        verdict = given.verdict
        title = f"{verdict.cause.value.replace('_', ' ')}{_where(verdict)}"
        number = f"incident {given.incident}: " if given.incident else ""
        step = f" in step {verdict.step}" if verdict.step >= 0 else ""
        lines = [f"[{self.run}] {number}{title}{step}", *verdict.evidence[:EVIDENCE_LINES]]
        lines.append(f"whose fault: {blame_words(verdict)}")
        happened: tuple[events.AnyEvent, ...] = (given,)
        if taken is not None:
            title = f"{title}: {taken.action}"
            lines.append(f"done: {taken.action}: {taken.reason}")
            happened = (given, taken)
        stopped = taken is not None and taken.action == "stop"
        return Alert(
            run=self.run,
            kind="verdict",
            severity=Severity.JOB if stopped else verdict.severity,
            title=title,
            text=_text(lines),
            t_wall_s=given.t_wall_s,
            events=happened,
        )

    def _resized(self, event: events.GenerationPlanned) -> list[Alert]:
        """The run goes on with fewer nodes, or with more again."""
        before, nodes, self._nodes = self._nodes or self._wanted, len(event.nodes), len(event.nodes)
        if nodes == before or (not before and event.layout is None):
            return []
        grows = 0 < before < nodes
        said = f"{'grows' if grows else 'shrinks'} from {before} to" if before else "goes on with only"
        title = f"{said} {nodes} nodes"
        alert = Alert(
            run=self.run, kind="size", severity=Severity.NOTICE if grows else Severity.NODE, title=title,
            text=_text([f"[{self.run}] {title}", event.reason, f"now on: {', '.join(event.nodes)}"]),
            t_wall_s=event.t_wall_s, events=(event,),
        )  # fmt: skip
        return self._filtered(alert)

    def _short(self, kind: str, words: str, event: events.AnyEvent) -> Alert:
        return Alert(
            run=self.run, kind=kind, severity=Severity.NOTICE, title=words, text=_text([f"[{self.run}] {words}"]),
            t_wall_s=event.t_wall_s, events=(event,),
        )  # fmt: skip

    def _end(self, event: events.RunStopped) -> Alert:
        done = event.exit_code == ExitCode.DONE
        title = "is done" if done else f"stopped with exit code {event.exit_code}"
        text = _text([f"[{self.run}] {title}, after step {event.last_step}", event.reason])
        return Alert(
            run=self.run, kind="end", severity=Severity.NOTICE if done else Severity.JOB, title=title, text=text,
            t_wall_s=event.t_wall_s, urgent=True, events=(event,),
        )  # fmt: skip


def with_held(alert: Alert, held: Mapping[str, int]) -> Alert:
    """The alert, and what was held back before it."""
    lines = [alert.text, f"{sum(held.values())} more alerts were held back", *_held_lines(held)]
    return msgspec.structs.replace(alert, text="\n".join(lines))


def _held_lines(held: Mapping[str, int]) -> list[str]:
    by_count = sorted(held.items(), key=lambda each: (-each[1], each[0]))
    lines = [f"{count} x {title}" for title, count in by_count[:HELD_LINES]]
    return [*lines, f"and {len(by_count) - HELD_LINES} other kinds"] if len(by_count) > HELD_LINES else lines


def _where(verdict: Verdict) -> str:
    parts = [
        f"rank {verdict.rank}" if verdict.rank >= 0 else "",
        f"on {verdict.node}" if verdict.node else "",
        f"({verdict.device})" if verdict.device else "",
    ]
    return "".join(f" {part}" for part in parts if part)


def _snapshot_words(fact: Fact) -> str:
    where = f" ({fact.node})" if fact.node else ""
    return f"{_SNAPSHOT_TROUBLE[fact.kind]}, step {fact.step}{where}: {fact.detail}"


def _text(lines: list[str]) -> str:
    """Lines for a person, each cut to a length that a channel bears; what a log says may be anything."""
    return "\n".join(line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..." for line in lines)
