"""The step line: one logged step in one line of text. What is not known says n/a."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from trainer.events import StepRecord

UNKNOWN = "n/a"


def format_step_line(record: StepRecord, ettr: float | None, eta_s: float | None) -> str:
    """`step: 120/2000  loss: 3.4121  grad_norm: 0.81  memory: 40.1GiB(50.1%)  tps: 7,012  ...  eta: 2h03m`."""
    fields = (
        ("step", f"{record.step}/{record.steps}"),
        ("loss", UNKNOWN if record.loss_avg is None else f"{record.loss_avg:.4f}"),
        *(() if record.validation_loss is None else (("val_loss", f"{record.validation_loss:.4f}"),)),
        ("grad_norm", UNKNOWN if record.grad_norm is None else f"{record.grad_norm:.2f}"),
        ("memory", _memory(record.memory_gib, record.memory_pct)),
        ("tps", f"{record.tokens_per_sec_per_gpu:,.0f}"),
        ("tflops", UNKNOWN if record.tflops_per_gpu is None else f"{record.tflops_per_gpu:.1f}"),
        ("mfu", UNKNOWN if record.mfu_pct is None else f"{record.mfu_pct:.1f}%"),
        ("ettr", UNKNOWN if ettr is None else f"{ettr:.3f}"),
        ("eta", UNKNOWN if eta_s is None else format_duration(eta_s)),
    )
    line = "  ".join(f"{name}: {text}" for name, text in fields)
    return f"{line}  (update skipped)" if record.skipped else line


def format_duration(seconds: float) -> str:
    """`0.42s`, `8.3s`, `45s`, `12m05s`, `2h03m`, `3d04h`."""
    if seconds < 1:
        return f"{seconds:.2f}s"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def eta_s(recent: Sequence[StepRecord], ettr: float | None) -> float | None:
    """Seconds to the last step at the median length of the recent steps, stretched by the ETTR so far; None if there
    is no step yet."""
    if not recent:
        return None
    left = recent[-1].steps - recent[-1].step
    return left * statistics.median(record.step_s for record in recent) / (ettr or 1.0)


def _memory(memory_gib: float | None, memory_pct: float | None) -> str:
    if memory_gib is None:
        return UNKNOWN
    return f"{memory_gib:.1f}GiB({UNKNOWN if memory_pct is None else f'{memory_pct:.1f}%'})"
