"""Weights & Biases, fed from metrics.jsonl by the supervisor: the one import site of wandb.

Here and not in a rank, since the supervisor outlives every worker: a killed rank loses no row, a restart costs no
second run, and the step loop never waits for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from cluster.rundir import RunDir, write_atomically
from configs.load import resolve_toml
from configs.schema import JobConfig
from trainer.events import StepRecord


class WandbSink:
    """One wandb run for the whole life of a run directory."""

    def __init__(self, config: JobConfig, run_dir: RunDir) -> None:
        self.config = config
        self.run_dir = run_dir
        self._run: Any = None

    def open(self) -> None:
        """Begin, or go on with the run whose id is in the run directory.

        Raises:
            ValueError: if wandb is not installed.
        """
        wandb = _import_wandb()
        if not self.run_dir.wandb_id.exists():
            write_atomically(self.run_dir.wandb_id, secrets.token_hex(8).encode())
        try:
            self._run = self._begin(wandb)
        except wandb.Error as error:
            raise ValueError(f"wandb: {error}; mend that, or set telemetry.wandb to 'offline' or 'off'") from error

    def _begin(self, wandb: ModuleType) -> Any:
        return wandb.init(
            id=self.run_dir.wandb_id.read_text().strip(),
            project=self.config.telemetry.wandb_project,
            name=self.config.run.name,
            dir=str(self.run_dir.path),
            mode=self.config.telemetry.wandb,
            resume="allow",
            config={"config_toml": resolve_toml(self.config)},
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, records: Sequence[StepRecord], ettr: float | None) -> None:
        """Send the rows."""
        wandb = _import_wandb()
        try:
            for record in records:
                self._run.log(metric_row(record, ettr), step=record.step)
        except wandb.Error as error:
            raise ValueError(f"wandb: {error}") from error

    def close(self) -> None:
        """Flush and end."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def metric_row(record: StepRecord, ettr: float | None) -> dict[str, float | int]:
    """A step under the metric names that users see; what is not known is absent."""
    row = {
        "loss/avg": record.loss_avg,
        "loss/max": record.loss_max,
        "loss/z": record.z_loss,
        "validation/loss_avg": record.validation_loss,
        "experts/load_entropy": record.expert_entropy,
        "experts/load_max_over_mean": record.expert_max_over_mean,
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "tokens_seen": record.tokens_seen,
        "throughput/tokens_per_sec_per_gpu": record.tokens_per_sec_per_gpu,
        "throughput/tflops_per_gpu": record.tflops_per_gpu,
        "throughput/mfu_pct": record.mfu_pct,
        "throughput/mfu_recipe_pct": record.mfu_recipe_pct,
        "precision/converted_modules": record.converted if record.recipe else None,
        "time/step_s": record.step_s,
        "time/data_s": record.data_s,
        "time/validation_s": record.validation_s if record.validation_loss is not None else None,
        "memory/max_reserved_gib": record.memory_gib,
        "checkpoint/stall_s": record.stall_s,
        "goodput/ettr": ettr,
    }
    return {name: value for name, value in row.items() if value is not None}


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "telemetry.wandb is on, but wandb is not installed; pip install 'everstep[wandb]', or set "
            "telemetry.wandb = 'off'"
        ) from error
    return wandb
