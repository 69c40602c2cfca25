"""Where a worker and its agent find each other's files. No torch here."""

from __future__ import annotations

from pathlib import Path


def heartbeat_path(ram_dir: Path) -> Path:
    """Heartbeat slots of the node."""
    return ram_dir / "heartbeats"


def times_path(ram_dir: Path) -> Path:
    """Where the time of the last steps of each rank went."""
    return ram_dir / "times"


def facts_path(ram_dir: Path, local_rank: int) -> Path:
    """Facts that a worker noticed, one JSON line each."""
    return ram_dir / f"facts-{local_rank}.jsonl"


def error_path(ram_dir: Path, local_rank: int) -> Path:
    """Why the worker ended, if it ended badly and could say so."""
    return ram_dir / f"error-{local_rank}.json"


def segments_dir(ram_dir: Path) -> Path:
    """Snapshot segments of the node."""
    return ram_dir / "snapshots"


def copies_dir(ram_dir: Path) -> Path:
    """Copies of other nodes' snapshots that this node keeps for them."""
    return ram_dir / "copies"


def transfer_key_path(run_dir: Path) -> Path:
    """The secret with which agents prove themselves to each other when they move snapshots; 0600."""
    return run_dir / "secrets" / "transfer.key"


def rank_log(run_dir: Path, node: str, rank: int) -> Path:
    """Output of one rank, appended over restarts."""
    return run_dir / "logs" / node / f"{rank}.log"


def metrics_path(run_dir: Path) -> Path:
    """One StepRecord a logged step."""
    return run_dir / "metrics.jsonl"


def config_path(run_dir: Path) -> Path:
    """The resolved configuration."""
    return run_dir / "config.toml"
