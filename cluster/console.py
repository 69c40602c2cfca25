"""What a person sees while a job runs: step lines, and every event worth a line, as they happen."""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.markup import escape

from cluster import events
from cluster.journal import read_events, tail_steps
from cluster.ledger import account
from cluster.rundir import RunDir
from cluster.stepline import eta_s, format_step_line
from cluster.telemetry import WandbSink
from trainer.events import FactKind, StepRecord

_ETTR_EVERY_S = 5.0
_ETTR_COST_SHARE = 0.02


class SteadyConsole(Console):
    """A console that falls silent when nobody reads it any more, instead of ending the supervisor."""

    def on_broken_pipe(self) -> None:
        """The reader went away (`everstep run ... | head`)."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class ConsoleWatcher:
    """Prints events and step lines, and hands the step records to wandb if there is a sink."""

    def __init__(self, console: Console, run_dir: RunDir, sink: WandbSink | None) -> None:
        self.console = console
        self.metrics = run_dir.metrics
        self.sink = sink
        self.saw_events = False
        self._events = read_events(run_dir.events)
        self._steps: list[StepRecord] = []
        self._offset = 0
        self._ettr: float | None = None
        self._ettr_due_s = 0.0
        self._recent: list[StepRecord] = []

    def open(self) -> None:
        """Read what earlier attempts logged, and begin telemetry."""
        lines = tail_steps(self.metrics, 0)
        self._steps, self._offset = lines.records, lines.offset
        if self.sink is not None:
            self.sink.open()

    def close(self) -> None:
        """End telemetry."""
        if self.sink is not None:
            self.sink.close()

    def on_event(self, event: events.AnyEvent) -> None:
        """Print what a person wants to know of an event."""
        self.saw_events = True
        self._events.append(event)
        line = describe(event)
        if line:
            self.on_tick()
            self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {line}", highlight=False)

    def on_tick(self) -> None:
        """Print the steps that were logged since the last call."""
        lines = tail_steps(self.metrics, self._offset)
        self._offset = lines.offset
        self._steps.extend(lines.records)
        for record in lines.records:
            self._recent = [*self._recent[-19:], record]
            line = format_step_line(record, self.ettr, eta_s(self._recent, self.ettr))
            self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(line)}", highlight=False)
        if self.sink is not None and lines.records:
            try:
                self.sink.log(lines.records, self.ettr)
            except ValueError as error:
                self.console.print(f"[bold red]telemetry is off from here on:[/] {escape(str(error))}")
                self.sink = None

    @property
    def ettr(self) -> float | None:
        """ETTR so far; worked out anew only as often as it stays cheap in a long run."""
        now = time.monotonic()
        if now >= self._ettr_due_s:
            self._ettr = account(self._events, self._steps, time.time()).ettr
            cost_s = time.monotonic() - now
            self._ettr_due_s = now + max(_ETTR_EVERY_S, cost_s / _ETTR_COST_SHARE)
        return self._ettr


def describe(event: events.AnyEvent) -> str:
    """One line of markup for an event, or nothing."""
    match event:
        case events.RunStarted(attempt=1):
            return f"run [bold]{escape(event.run)}[/] begins: {event.target_steps} steps{_sizes(event)}"
        case events.RunStarted():
            return f"run [bold]{escape(event.run)}[/] goes on (attempt {event.attempt}){_sizes(event)}"
        case events.SupervisorTookOver():
            return "took over from a supervisor that is gone; training never stopped"
        case events.NodeRemembered() if event.place is not events.Place.MEMBER:
            place = "left out" if event.place is events.Place.OUT else "only a spare for now"
            return f"[bold yellow]{event.node}[/] is {place}: {escape(event.reason)}"
        case events.NodeReadmitted():
            return f"{event.node} is back: {escape(event.reason)}"
        case events.NodeReady():
            return f"{event.node} is ready"
        case events.GenerationPlanned():
            source = f"memory, step {event.ram_step}" if event.ram_step >= 0 else "the run directory, if it has one"
            few = f" ({event.layout.words}): {escape(event.reason)}" if event.layout is not None else ""
            return f"generation {event.generation} on {', '.join(event.nodes)}{few}; state from {source}"
        case events.VerdictGiven():
            verdict = event.verdict
            where = " ".join(filter(None, (verdict.node, f"rank {verdict.rank}" if verdict.rank >= 0 else "")))
            evidence = f": {escape(verdict.evidence[0])}" if verdict.evidence else ""
            return f"[bold red]{verdict.cause.value}[/] {where}{evidence}"
        case events.ActionTaken():
            return f"[bold yellow]{event.action}[/] {escape(event.reason)}"
        case events.NodeEvicted():
            return f"{event.node} is evicted"
        case events.WorkersReported():
            return _describe_fact(event)
        case events.RunStopped():
            return f"stopped: {escape(event.reason)}"
        case _:
            return ""


def _sizes(event: events.RunStarted) -> str:
    return f"; {escape(event.sizes)}" if event.sizes else ""


def _describe_fact(event: events.WorkersReported) -> str:
    fact = event.fact
    match fact.kind:
        case FactKind.LOADED:
            return f"state of step {fact.step} loaded {escape(fact.detail)} in {fact.seconds:.2f} s"
        case FactKind.SNAPSHOT_REJECTED | FactKind.MEMORY_REJECTED:
            return f"[bold red]snapshot of step {fact.step} rejected[/]: {escape(fact.detail)}"
        case FactKind.SNAPSHOT_FAILED:
            return f"[bold red]snapshot not saved[/]: {escape(fact.detail)}; training goes on"
        case FactKind.SNAPSHOT_DISTRUSTED:
            return f"[bold red]snapshot of step {fact.step} distrusted[/]: {escape(fact.detail)}"
        case FactKind.SNAPSHOT_REPAIRED:
            return f"[bold yellow]snapshot of step {fact.step} repaired[/]: {escape(fact.detail)}"
        case FactKind.LOADING:
            return escape(fact.detail)
        case FactKind.GATHERED:
            return f"step {fact.step}: {escape(fact.detail)} in {fact.seconds:.2f} s"
        case FactKind.SNAPSHOT_IN_S3:
            return f"step {fact.step} is in S3 ({escape(fact.detail)})"
        case FactKind.TIER_BEHIND:
            return f"[bold yellow]behind[/]: {escape(fact.detail)}"
        case FactKind.TIER_CAUGHT_UP:
            return f"caught up: {escape(fact.detail)}"
        case FactKind.PRECISION:
            return f"computes {escape(fact.detail)}"
        case FactKind.STOPPING if fact.rank < 0:
            return f"[bold yellow]{fact.node}[/]: {escape(fact.detail)}"
        case FactKind.UPDATE_REPLAYED:
            return f"step {fact.step} computed again in {fact.seconds:.2f} s: {escape(fact.detail)}"
        case FactKind.EVALUATED:
            return f"step {fact.step} evaluated in {fact.seconds:.0f} s: {escape(fact.detail)}"
        case FactKind.EVALUATION_FAILED:
            return f"[bold yellow]evaluation of step {fact.step} failed[/]: {escape(fact.detail)}; training goes on"
        case FactKind.UPDATE_SKIPPED:
            return f"[bold yellow]update of step {fact.step} skipped[/]: {escape(fact.detail)}"
        case _:
            return ""
