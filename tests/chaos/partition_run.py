"""`python -m tests.chaos.partition_run run CONFIG ...`: `everstep run`, each node in a network namespace of its own.

EVERSTEP_TEST_SPACES: how the names of their namespaces begin. EVERSTEP_TEST_CUT: a folder in which a file named after a
node means that nobody reaches it, the owner of the machines neither: its agent can then not be killed from here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpointing.fence import raise_fence
from checkpointing.verify import list_snapshots
from cluster.local import LocalScheduler
from cluster.run import run_job
from cluster.rundir import RunDir
from cluster.watchers import Watchers
from configs.load import load_job
from configs.schema import JobConfig


class FarScheduler(LocalScheduler):
    """What it cannot reach it neither kills nor knows to be gone."""

    def __init__(self, run_dir: RunDir, ram_dir: str, spaces: str, cut: Path) -> None:
        super().__init__(run_dir, ram_dir, lambda node: ("nsenter", f"--net=/run/netns/{spaces}{node}"))
        self.cut = cut

    def alive(self, handle: str) -> bool:
        """See `Scheduler`."""
        return any(self.cut.iterdir()) or super().alive(handle)

    def kill(self, node: str, handle: str, for_good: bool = False) -> None:
        """See `Scheduler`."""
        if not (self.cut / node).exists():
            super().kill(node, handle, for_good)


def main(arguments: Sequence[str]) -> int:
    """Like `everstep run`, without a console."""
    config = load_job(arguments[1], list(arguments[2:]))

    def open_scheduler(config: JobConfig, run_dir: RunDir, environ: Mapping[str, str]) -> FarScheduler:
        ram, cut = config.checkpoint.ram_dir, Path(environ["EVERSTEP_TEST_CUT"])
        return FarScheduler(run_dir, ram, environ["EVERSTEP_TEST_SPACES"], cut)

    def newest(run_dir: Path) -> int:
        return max((info.step for info in list_snapshots(run_dir)), default=-1)

    return run_job(config, Watchers(), newest, raise_fence, open_scheduler)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
