"""The peer of `benchmarks.recovery`: the same engine and data under torchrun, saved by torch's distributed checkpoint.

`torchrun ... -m benchmarks.recovery_peer CONFIG FOLDER SAVER`: every step is saved below FOLDER (SAVER `save` or
`async`), the newest whole one is loaded at the start. Lines about what happened go to FOLDER/lines.jsonl.
"""

from __future__ import annotations

import time

IMPORTING_SINCE_S = time.time()

import os  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from concurrent.futures import Future  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402

from benchmarks.plainloop import build, join_group, read_from  # noqa: E402
from benchmarks.recovery_lines import Begun, Finished, append  # noqa: E402
from configs.load import load_job  # noqa: E402

KEEP = 3


class Saver:
    """Saves every step; rank 0 removes old ones."""

    def __init__(self, folder: Path, asynchronous: bool) -> None:
        self.folder = folder
        self.group = dist.new_group(backend="gloo") if asynchronous else None
        self.pending: Future[Any] | None = None

    def newest(self) -> int:
        """Newest step whose metadata, written last, is there; -1 if none is. Equal on all ranks."""
        whole = [int(path.parent.name) for path in self.folder.glob("*/.metadata")]
        box = [max(whole, default=-1)]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def load(self, state: dict[str, Any], step: int) -> None:
        """Load a step into the live tensors."""
        dcp.load(state, checkpoint_id=self.folder / str(step))

    def save(self, state: dict[str, Any], step: int) -> None:
        """Save the state as it is now."""
        target = self.folder / str(step)
        # What a killed worker left half-written; the same step is written anew.
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            for old in sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())[:-KEEP]:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)
        if self.group is None:
            dcp.save(state, checkpoint_id=target)
            return
        if self.pending is not None:
            self.pending.result()
        self.pending = dcp.async_save(state, checkpoint_id=target, process_group=self.group)  # type: ignore[assignment]


def main() -> None:
    """Train until killed."""
    imported_s = time.time()
    config, folder = load_job(sys.argv[1]), Path(sys.argv[2])
    lines = folder / "lines.jsonl"
    world = join_group()
    saver = Saver(folder, asynchronous=sys.argv[3] == "async")
    newest = saver.newest()
    joined_s = time.time()
    engine = build(config, world, init_weights=newest < 0)
    built_s = time.time()
    state: dict[str, Any] = dict(engine.state())
    if newest >= 0:
        saver.load(state, newest)
    loop = read_from(config, engine, max(newest, 0) + 1)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    append(
        lines,
        Begun(
            attempt=attempt, rank=world.rank, pid=os.getpid(), process_s=IMPORTING_SINCE_S, imported_s=imported_s,
            joined_s=joined_s, built_s=built_s, loaded_s=time.time(), loaded_step=newest,
        ),
    )  # fmt: skip
    for step in range(max(newest, 0) + 1, config.training.steps + 1):
        loop.compute(step)
        loop.update(step)
        if world.rank == 0:
            append(lines, Finished(attempt=attempt, step=step, t_wall_s=time.time()))
        saver.save(state, step)


if __name__ == "__main__":
    main()
