"""What a probe reads of a GPU: the words between it and whoever judges. No judging, and nothing heavy to import."""

from __future__ import annotations

import msgspec


class GpuSample(msgspec.Struct, frozen=True, kw_only=True, tag="sample", omit_defaults=True):
    """One reading of one GPU. None: this device or this driver does not offer the value.

    t_s: monotonic seconds of the probe's machine. lost: why the GPU can no longer be used at all, in the driver's
    words; "" if it can. unreadable: which value could not be read, and why, although the device offers it.
    reasons: NVML's bits for what holds the clocks down. uncorrected, corrected: ECC errors since the driver was
    loaded; *_ever: in the card's whole life. rows_*: remapped rows of memory. links: one flag a NVLink, whether it
    is up. link_errors: CRC, replay and recovery errors of all NVLinks. recovery: see `health.xid.Recovery`.
    """

    t_s: float
    index: int
    uuid: str = ""
    lost: str = ""
    unreadable: str = ""
    temperature_c: int | None = None
    power_w: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    reasons: int | None = None
    corrected: int | None = None
    corrected_ever: int | None = None
    uncorrected: int | None = None
    uncorrected_ever: int | None = None
    rows_correctable: int | None = None
    rows_uncorrectable: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    links: tuple[bool, ...] | None = None
    link_errors: int | None = None
    pcie_replays: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_gen: int | None = None
    pcie_gen_max: int | None = None
    utilization_pct: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    recovery: int | None = None


class XidEvent(msgspec.Struct, frozen=True, kw_only=True, tag="xid", omit_defaults=True):
    """The driver reported an XID. recovery: the driver's recovery action right after it, None if it does not say."""

    t_s: float
    index: int
    xid: int
    uuid: str = ""
    recovery: int | None = None


class Carrier(msgspec.Struct, frozen=True):
    """Whom a GPU serves when something is found about it. rank -1: nobody now (a spare)."""

    rank: int = -1
    step: int = -1
    generation: int = 0
