"""Runs a rank program of a benchmark under plain torchrun and reads the figures that rank 0 wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks.common import Workspace, wait_until

TIMEOUT_S = 240.0


def run_ranks(place: Workspace, module: str, ranks: int, *arguments: str) -> dict[str, list[float]]:
    """Run `python -m MODULE OUT ARGUMENTS...` on so many ranks; returns what rank 0 wrote to OUT.

    Raises:
        RuntimeError: if the program failed, with the end of its output.
        TimeoutError: if it took too long.
    """
    out = place.disk / "figures.json"
    out.unlink(missing_ok=True)
    log = place.disk / "ranks.log"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", module, str(out)]
    pid = place.start([*words, *arguments], log)
    wait_until(lambda: place.ended(pid) is not None, module, TIMEOUT_S, poll_s=0.05)
    if place.ended(pid) != 0 or not out.exists():
        raise RuntimeError(f"{module} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return msgspec.json.decode(out.read_bytes(), type=dict[str, list[float]])


def write_figures(path: Path, figures: Mapping[str, list[float]]) -> None:
    """What a rank program hands back."""
    path.write_bytes(msgspec.json.encode(figures))
