"""Bad nodes that SLURM was not told of, since the site forbids it to users: the job itself asks to be kept off them."""

from __future__ import annotations

from pathlib import Path

from cluster.rundir import write_atomically
from cluster.slurm_commands import SlurmCommands, checked_node

EXCLUDE_FILE = "slurm-exclude"
"""In the run's folder: names with commas between, as sbatch's `--exclude` takes them."""


def excluded(run_dir: Path) -> tuple[str, ...]:
    """The nodes that jobs of this run shall not get.

    Raises:
        ValueError: if there is something in the file that is no node's name.
    """
    try:
        words = (run_dir / EXCLUDE_FILE).read_text().strip()
    except FileNotFoundError:
        return ()
    return tuple(checked_node(name.strip()) for name in words.split(",") if name.strip())


def exclude(run_dir: Path, node: str) -> None:
    """Add a node."""
    names = dict.fromkeys([*excluded(run_dir), checked_node(node)])
    write_atomically(run_dir / EXCLUDE_FILE, ",".join(names).encode())


def exclude_in_queue(commands: SlurmCommands, run_dir: Path, job_id: str) -> None:
    """Keep a job that waits to run again off these nodes, and those it was kept off before. SlurmError if refused."""
    before = commands.job_field(job_id, "ExcNodeList")
    names = [*([] if before in ("", "(null)") else [before]), *excluded(run_dir)]
    if names:
        commands.update_job(job_id, "ExcNodeList", ",".join(names))
