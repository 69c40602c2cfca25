"""What a benchmark leaves: figures with their spread, ratios between sides, the machine, the versions, the settings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchtitan", "everstep")

Unit = Literal["s", "ms", "1/s", "steps/s", "MB", "GB/s", "ratio", "steps", "percent", "cpu_s/step", "nats"]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A sample's spread, and the sample itself in the order it was measured."""

    n: int
    median: float
    minimum: float
    maximum: float
    values: tuple[float, ...]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one side (`everstep`, a peer, or `limit` for what physics allows)."""

    side: str
    name: str
    unit: Unit
    summary: Summary


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """The median of one series over the median of another. Each of the two is `side: name`."""

    name: str
    value: float
    numerator: str
    denominator: str


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was chosen; told so that the run can be repeated."""

    name: str
    value: str


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran. load_average: over one minute, when the benchmark began."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    load_average: float


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """What ran. revision: git's, with `+changes` if the working tree differed from it."""

    python: str
    packages: dict[str, str]
    revision: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A whole benchmark, as in `results/NAME.json`."""

    benchmark: str
    taken_at: str
    seconds: float
    machine: Machine
    versions: Versions
    settings: tuple[Setting, ...]
    series: tuple[Series, ...]
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...]


def summarise(values: Sequence[float]) -> Summary:
    """Summary of a sample. ValueError if it is empty: a figure that was not measured is left out, never made up."""
    if not values:
        raise ValueError("nothing was measured")
    ordered = tuple(float(value) for value in values)
    return Summary(
        n=len(ordered),
        median=statistics.median(ordered),
        minimum=min(ordered),
        maximum=max(ordered),
        values=ordered,
    )


def series(side: str, name: str, unit: Unit, values: Sequence[float]) -> Series:
    """A series from its values."""
    return Series(side=side, name=name, unit=unit, summary=summarise(values))


def ratio(name: str, numerator: Series, denominator: Series) -> Ratio:
    """Median over median. ValueError if they have different units or the denominator is zero."""
    if numerator.unit != denominator.unit:
        raise ValueError(f"{name}: {numerator.unit} over {denominator.unit}")
    if denominator.summary.median == 0.0:
        raise ValueError(f"{name}: {denominator.side}: {denominator.name} is zero")
    return Ratio(
        name=name,
        value=numerator.summary.median / denominator.summary.median,
        numerator=f"{numerator.side}: {numerator.name}",
        denominator=f"{denominator.side}: {denominator.name}",
    )


def settings(values: Mapping[str, object]) -> tuple[Setting, ...]:
    """Settings from names and values."""
    return tuple(Setting(name=name, value=str(value)) for name, value in values.items())


def machine() -> Machine:
    """This machine, as it is now."""
    return Machine(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        kernel=f"{platform.system()} {platform.release()}",
        load_average=round(os.getloadavg()[0], 2),
    )


def versions() -> Versions:
    """Versions of what is measured."""
    return Versions(
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        revision=_revision(),
    )


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_result(result: Result, folder: Path = RESULTS) -> Path:
    """Write `NAME.json`; an older one is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.benchmark}.json"
    tmp = path.with_suffix(".tmp")
    tmp.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    tmp.replace(path)
    return path


def read_result(path: Path) -> Result:
    """Read a result back. msgspec.ValidationError if it is of another form."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _revision() -> str:
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
