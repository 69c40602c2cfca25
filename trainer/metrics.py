"""Numbers that need the machine: utilisation of the card, memory. Unknown is None, never a guess."""

from __future__ import annotations

import resource
from collections.abc import Mapping

# Dense bf16 peak in TFLOP/s without sparsity, by a part of the device's name. Sources: NVIDIA's data sheets.
_BF16_PEAK_TFLOPS: Mapping[str, float] = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "A100": 312.0,
}


def bf16_peak_tflops(device_name: str) -> float | None:
    """Peak of a card by its name; None for a card (or a CPU) that is not in the table."""
    return next((peak for part, peak in _BF16_PEAK_TFLOPS.items() if part in device_name), None)


def utilisation_pct(tflops: float, peak_tflops: float | None) -> float | None:
    """Achieved over peak, in percent."""
    return None if peak_tflops is None else 100.0 * tflops / peak_tflops


def host_memory_gib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
