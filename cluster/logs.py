"""Finds and prints log files, following them if asked, each line with where it came from."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.rundir import RunDir

_POLL_S = 0.2


def find_logs(run_dir: RunDir, node: str, rank: int, agent: bool) -> list[Path]:
    """Log files that fit.

    Raises:
        ValueError: if there is none, saying which there are.
    """
    every = sorted((run_dir.path / "logs").glob("*/*.log"))
    found = [
        path
        for path in every
        if (not node or path.parent.name == node)
        and (path.stem == "agent") == agent
        and (rank < 0 or path.stem == str(rank))
    ]
    if not found:
        have = ", ".join(f"{path.parent.name}/{path.stem}" for path in every) or "none yet"
        raise ValueError(f"no such log in run {run_dir.path.name}; it has: {have}")
    return found


def print_logs(paths: Sequence[Path], follow: bool) -> None:
    """Write the files to standard output, prefixed with `node/rank` where there are several."""
    offsets = dict.fromkeys(paths, 0)
    while True:
        for path in paths:
            offsets[path] = _print_from(path, offsets[path], prefix=len(paths) > 1)
        sys.stdout.flush()
        if not follow:
            return
        time.sleep(_POLL_S)


def _print_from(path: Path, offset: int, prefix: bool) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    label = f"{path.parent.name}/{path.stem}: " if prefix else ""
    for line in whole.decode(errors="replace").splitlines():
        sys.stdout.write(f"{label}{line}\n")
    return offset + len(whole)
