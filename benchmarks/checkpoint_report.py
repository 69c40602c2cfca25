"""What `benchmarks.checkpoint` makes of its samples: series, ratios, and the aims with a word on each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rich.table import Table

from benchmarks.checkpoint_sides import LIMIT, SIDES, SideResult
from benchmarks.common import console
from benchmarks.results import Ratio, Series, Unit, ratio, series

OURS = "everstep"


class Figure(NamedTuple):
    """One figure of a side: the ranks' name for it, ours, its unit, and what to multiply it by for that."""

    key: str
    name: str
    unit: Unit
    scale: float


FIGURES = (
    Figure("memcpy_s", "one copy in memory", "ms", 1e3),
    Figure("write_s", "write and fsync", "s", 1.0),
    Figure("read_s", "read from a cold disk", "s", 1.0),
    Figure("plain_step_s", "step without a save", "ms", 1e3),
    Figure("stall_s", "stall, nothing overlaps", "ms", 1e3),
    Figure("first_stall_s", "stall of the first save", "ms", 1e3),
    Figure("overlapped_stall_s", "stall, a step overlaps", "ms", 1e3),
    Figure("overlapped_step_s", "step with a save", "ms", 1e3),
    Figure("durable_s", "durable on disk", "s", 1.0),
    Figure("peer_durable_s", "sent to a peer's memory", "s", 1.0),
    Figure("s3_durable_s", "sent to S3", "s", 1.0),
    Figure("restore_ram_s", "restore from own memory", "s", 1.0),
    Figure("restore_peer_s", "restore from a peer's memory", "s", 1.0),
    Figure("restore_disk_s", "restore from a cold disk", "s", 1.0),
    Figure("restore_s3_s", "restore from S3", "s", 1.0),
    Figure("peak_saving_mb", "peak memory, saving", "MB", 1.0),
    Figure("peak_restoring_mb", "peak memory, restoring", "MB", 1.0),
)


_COLUMNS = (
    ("alone\nms", "stall_s"),
    ("overlap\nms", "overlapped_stall_s"),
    ("step\nms", "overlapped_step_s"),
    ("durable\ns", "durable_s"),
    ("memory\ns", "restore_ram_s"),
    ("peer\ns", "restore_peer_s"),
    ("S3\ns", "restore_s3_s"),
    ("disk\ns", "restore_disk_s"),
    ("peak\nMB", "peak_saving_mb"),
)


class Aim(NamedTuple):
    """A bound on a figure of ours, as a part of another side's (or our own) figure."""

    name: str
    key: str
    of_side: str
    of_key: str
    bound: float


AIMS = (
    Aim("stall of one copy, nothing overlaps", "stall_s", LIMIT.name, "memcpy_s", 1.2),
    Aim("stall of the step, a step overlaps", "overlapped_stall_s", OURS, "overlapped_step_s", 0.01),
    Aim("durable of write and fsync", "durable_s", LIMIT.name, "write_s", 1.2),
    Aim("restore from own memory of one copy", "restore_ram_s", LIMIT.name, "memcpy_s", 2.0),
)
PEER_RATIOS = ("stall_s", "overlapped_stall_s", "overlapped_step_s", "durable_s", "restore_disk_s", "peak_saving_mb")


class Case(NamedTuple):
    """One size and number of ranks, with the results of the sides that ran."""

    name: str
    results: Mapping[str, SideResult]

    def values(self, side: str, key: str) -> list[float]:
        """A figure's samples; none if it was not measured."""
        found = self.results.get(side)
        if found is None:
            return []
        peaks = {"peak_saving_mb": found.peak_saving_bytes, "peak_restoring_mb": found.peak_restoring_bytes}
        if key in peaks:
            return [peaks[key] / 1e6] if peaks[key] else []
        return found.figures.get(key, [])

    def series(self, side: str, key: str) -> Series | None:
        """A figure as a series."""
        figure = next(each for each in FIGURES if each.key == key)
        values = self.values(side, key)
        if not values:
            return None
        return series(side, f"{self.name}: {figure.name}", figure.unit, [figure.scale * value for value in values])


def show_case(case: Case) -> None:
    """Medians of one case: a line a side, a column a figure."""
    title = f"{case.name}: stall alone and overlapped, step, durable, restore from each tier, peak memory (medians)"
    table = Table(title=title, title_justify="left")
    table.add_column("side", no_wrap=True)
    for heading, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    limits = [case.series(LIMIT.name, key) for key in ("memcpy_s", "plain_step_s", "write_s", "read_s")]
    copy, step, write, read = ("" if each is None else f"{each.summary.median:.3g}" for each in limits)
    table.add_row("limits", copy, "", step, write, copy and f"{float(copy) / 1e3:.3g}", "", "", read, "")
    table.add_section()
    for side in SIDES:
        if side.name in case.results:
            found = [case.series(side.name, key) for _, key in _COLUMNS]
            table.add_row(side.name, *("" if each is None else f"{each.summary.median:.3g}" for each in found))
    console.print(table)


class Judged(NamedTuple):
    """An aim, where it was looked at, what was found, and whether that is good enough."""

    aim: Aim
    case: str
    value: float

    @property
    def met(self) -> bool:
        """Whether it was met."""
        return self.value <= self.aim.bound


def all_series(cases: Iterable[Case]) -> list[Series]:
    """Everything that was measured, side by side."""
    cases = list(cases)
    found = []
    for side in (LIMIT, *SIDES):
        for case in cases:
            found += [each for figure in FIGURES if (each := case.series(side.name, figure.key)) is not None]
    return found


def all_ratios(cases: Iterable[Case]) -> list[Ratio]:
    """Ours over the limits, and over every peer."""
    found = []
    for case in cases:
        for aim in AIMS:
            found += _ratio(case, aim.name, (OURS, aim.key), (aim.of_side, aim.of_key))
        for side in SIDES[1:]:
            for key in PEER_RATIOS:
                name = next(each.name for each in FIGURES if each.key == key)
                found += _ratio(case, f"{name}, {OURS} of {side.name}", (OURS, key), (side.name, key))
    return found


def _ratio(case: Case, name: str, ours: tuple[str, str], theirs: tuple[str, str]) -> list[Ratio]:
    numerator, denominator = case.series(*ours), case.series(*theirs)
    if numerator is None or denominator is None or denominator.summary.median == 0.0:
        return []
    if numerator.unit != denominator.unit:
        numerator, denominator = (_in_seconds(each) for each in (numerator, denominator))
    return [ratio(f"{name}, {case.name}", numerator, denominator)]


def _in_seconds(one: Series) -> Series:
    scale = {"ms": 1e-3, "s": 1.0}[one.unit]
    return series(one.side, one.name, "s", [scale * value for value in one.summary.values])


def judge(cases: Iterable[Case], ratios: Iterable[Ratio]) -> list[Judged]:
    """Every aim in every case in which it could be measured."""
    by_name = {each.name: each.value for each in ratios}
    cases = list(cases)
    return [
        Judged(aim, case.name, by_name[f"{aim.name}, {case.name}"])
        for aim in AIMS
        for case in cases
        if f"{aim.name}, {case.name}" in by_name
    ]


def show_aims(judged: Iterable[Judged]) -> None:
    """The aims as a table."""
    table = Table(title="aims", title_justify="left")
    for column in ("aim", "where", "found", "at most", ""):
        table.add_column(column)
    for each in judged:
        words = "[green]met[/]" if each.met else "[bold red]not met[/]"
        table.add_row(each.aim.name, each.case, f"{each.value:.3f}", f"{each.aim.bound:g}", words)
    console.print(table)


def aim_notes(judged: Iterable[Judged]) -> list[str]:
    """The aims in words, for the record."""
    found = []
    for aim in AIMS:
        mine = [each for each in judged if each.aim is aim]
        if mine:
            missed = ", ".join(f"{each.value:.2f} at {each.case}" for each in mine if not each.met)
            words = f"missed: {missed}" if missed else "met everywhere"
            found.append(f"aim: {aim.name} at most {aim.bound:g}: {words}")
    return found
