"""Numbers that need the machine: utilisation of the card, memory. Unknown is None, never a guess."""

from __future__ import annotations

import resource
from collections.abc import Mapping

# Dense peak in TFLOP/s without sparsity by the bits of an element, by a part of the device's name. Sources: NVIDIA's
# data sheets.
_PEAK_TFLOPS: Mapping[str, Mapping[int, float]] = {
    "H100 PCIe": {16: 756.0, 8: 1513.0},
    "H100 NVL": {16: 835.0, 8: 1671.0},
    "H100": {16: 989.0, 8: 1979.0},
    "H200": {16: 989.0, 8: 1979.0},
    "GB200": {16: 2500.0, 8: 5000.0, 4: 10000.0},
    "B200": {16: 2250.0, 8: 4500.0, 4: 9000.0},
    "B300": {16: 2250.0, 8: 4500.0, 4: 13500.0},
    "A100": {16: 312.0},
}


def peak_tflops(device_name: str, bits: int = 16) -> float | None:
    """Peak of a card by its name; None for a card (or a CPU) that is not in the table, or does not have the format."""
    return next((peaks.get(bits) for part, peaks in _PEAK_TFLOPS.items() if part in device_name), None)


def utilisation_pct(tflops: float, peak_tflops: float | None) -> float | None:
    """Achieved over peak, in percent."""
    return None if peak_tflops is None else 100.0 * tflops / peak_tflops


def host_memory_gib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
