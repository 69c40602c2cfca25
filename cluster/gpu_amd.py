"""AMD GPUs: the basic signals (ECC, temperature, throttling, PCIe replays) by the JSON of AMD's own tools."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable

import msgspec

from cluster.gpu_tools import run_tool
from health.gpu_facts import GpuSample

_HOT = 0x40
_POWER_BRAKE = 0x80
_ACTIVE = "ACTIVE"

Number = int | float | str | None


class _Value(msgspec.Struct):
    value: Number = None


class _Temperature(msgspec.Struct):
    hotspot: _Value | str | None = None


class _Ecc(msgspec.Struct):
    total_correctable_count: Number = None
    total_uncorrectable_count: Number = None


class _Pcie(msgspec.Struct):
    replay_count: Number = None


class _Throttle(msgspec.Struct):
    prochot_violation_status: Number = None
    socket_thermal_violation_status: Number = None
    vr_thermal_violation_status: Number = None
    hbm_thermal_violation_status: Number = None


class _Gpu(msgspec.Struct):
    gpu: int
    temperature: _Temperature | str = ""
    ecc: _Ecc | str = ""
    pcie: _Pcie | str = ""
    throttle: _Throttle | str = ""


class _Wrapped(msgspec.Struct):
    gpu_data: list[_Gpu]


def amd_reader() -> Callable[[float], list[GpuSample]] | None:
    """What reads all AMD GPUs within a time-out in seconds; None where AMD's tools are not installed.

    The reader raises `cluster.gpu_tools.ToolError`, or ValueError for an answer that it does not understand.
    """
    if shutil.which("amd-smi"):
        command = ("amd-smi", "metric", "--temperature", "--ecc", "--pcie", "--throttle", "--json")
        return lambda timeout_s: parse_amd_smi(run_tool(command, timeout_s), time.monotonic())
    if shutil.which("rocm-smi"):
        return lambda timeout_s: parse_rocm_smi(
            run_tool(("rocm-smi", "--showtemp", "--json"), timeout_s), time.monotonic()
        )
    return None


def parse_amd_smi(text: str, now_s: float) -> list[GpuSample]:
    """What `amd-smi metric --json` printed.

    Raises:
        ValueError: if it is something else.
    """
    gpus = msgspec.json.decode(text, type=list[_Gpu] | _Wrapped)
    return [_sample(each, now_s) for each in (gpus if isinstance(gpus, list) else gpus.gpu_data)]


def _sample(gpu: _Gpu, now_s: float) -> GpuSample:
    temperature = gpu.temperature.hotspot if isinstance(gpu.temperature, _Temperature) else None
    ecc = gpu.ecc if isinstance(gpu.ecc, _Ecc) else _Ecc()
    return GpuSample(
        t_s=now_s,
        index=gpu.gpu,
        temperature_c=_count(temperature.value) if isinstance(temperature, _Value) else None,
        reasons=_reasons(gpu.throttle) if isinstance(gpu.throttle, _Throttle) else None,
        corrected=_count(ecc.total_correctable_count),
        uncorrected=_count(ecc.total_uncorrectable_count),
        pcie_replays=_count(gpu.pcie.replay_count) if isinstance(gpu.pcie, _Pcie) else None,
    )


def _reasons(throttle: _Throttle) -> int:
    """In NVML's bits, which the judge knows."""
    hot = (
        throttle.socket_thermal_violation_status,
        throttle.vr_thermal_violation_status,
        throttle.hbm_thermal_violation_status,
    )
    return (_HOT if _ACTIVE in hot else 0) | (_POWER_BRAKE if throttle.prochot_violation_status == _ACTIVE else 0)


def _count(value: Number) -> int | None:
    """A number as AMD's tools write it: 3, "3", "45.0"; None for "N/A"."""
    if isinstance(value, str):
        return int(float(value)) if re.fullmatch(r"\d+(\.\d+)?", value) else None
    return None if value is None else int(value)


def parse_rocm_smi(text: str, now_s: float) -> list[GpuSample]:
    """What `rocm-smi --showtemp --json` printed: the junction's temperature is all that it has for us.

    Raises:
        ValueError: if it is something else.
    """
    cards = msgspec.json.decode(text, type=dict[str, dict[str, str]])
    samples = []
    for name, values in cards.items():
        number = re.fullmatch(r"card(\d+)", name)
        if number:
            hottest = next((value for key, value in values.items() if "junction" in key), None)
            samples.append(GpuSample(t_s=now_s, index=int(number[1]), temperature_c=_count(hottest)))
    return samples
