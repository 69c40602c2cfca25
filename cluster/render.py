"""The run's summary on a terminal, for `everstep status` and the end of a run."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.report import RunSummary, headlines, incident_lines, incident_title, time_table
from cluster.timeline import TimeCause

_STYLES = {"done": "bold green", "running": "bold cyan", "requeue": "bold yellow", "failed": "bold red"}


def render(report: RunSummary) -> RenderableType:
    """Outcome, figures, incidents and where the time went. Colours only where the console has them."""
    parts: list[RenderableType] = [Text(f"{report.run}: {report.outcome}", style=_STYLES.get(report.outcome, "bold"))]
    parts.append(Padding(_figures(report), (0, 0, 1, 2)))
    for incident in report.incidents:
        parts.append(Text(f"incident {incident_title(incident)}", style="bold"))
        parts.extend(Padding(Text(line), (0, 0, 0, 2)) for line in incident_lines(incident))
    if report.incidents:
        parts.append(Text(""))
    parts.append(Padding(_times(report), (0, 0, 0, 2)))
    if report.exit_code is not None:
        parts.append(Text(f"report: {report.report}", overflow="fold"))
    return Group(*parts)


def _figures(report: RunSummary) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, text in headlines(report):
        table.add_row(Text(name, style="dim"), Text(text))
    return table


def _times(report: RunSummary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("where the time went")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for cause, seconds, share in time_table(report.goodput):
        style = "green" if cause == TimeCause.PRODUCTIVE else ""
        table.add_row(cause, f"{seconds:,.1f}", share, style=style)
    return table
