"""NVML, NVIDIA's management library, as facts. The one import site of pynvml; only the probe's own process imports it.

Any call may take forever when a driver is in trouble: `Nvml.call` always says which one is under way, so that another
thread can tell.
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from health.gpu_facts import GpuSample, XidEvent

_T = TypeVar("_T")
_LINK_ERRORS = (
    pynvml.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL,
    pynvml.NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL,
    pynvml.NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL,
    pynvml.NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL,
)
_RECOVERY = 230
_UNSIGNED = {
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
}
_NOT_OFFERED = frozenset({
    pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_FOUND,
})  # fmt: skip
_GONE = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED})


class NoDriverError(Exception):
    """NVML cannot be used on this machine; the message says why."""


class EventsFailedError(Exception):
    """XIDs cannot be waited for any more, most often because one of the GPUs is lost."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call under way. index -1: about no GPU in particular. may_take_s: how long it was asked to take."""

    name: str
    index: int
    since_s: float
    may_take_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Handle:
    """A GPU as NVML knows it. handle None: it was lost already when the library was opened."""

    index: int
    uuid: str
    name: str
    handle: Any
    lost: str = ""


class Nvml:
    """An open NVML."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.driver = ""
        self.handles: list[Handle] = []
        self._events: Any = None
        self._not_offered: set[tuple[int, str]] = set()

    def open(self) -> None:
        """Find the driver and the GPUs.

        Raises:
            NoDriverError: if there is no NVIDIA driver, or it does not work.
        """
        try:
            self._ask(-1, pynvml.nvmlInitWithFlags, 0)
            self.driver = _text(self._ask(-1, pynvml.nvmlSystemGetDriverVersion))
            count = self._ask(-1, pynvml.nvmlDeviceGetCount)
        except pynvml.NVMLError as error:
            raise NoDriverError(f"NVML: {error}") from error
        self.handles = [self._open_device(index) for index in range(count)]

    def _open_device(self, index: int) -> Handle:
        try:
            handle = self._ask(index, pynvml.nvmlDeviceGetHandleByIndex, index)
            uuid = _text(self._ask(index, pynvml.nvmlDeviceGetUUID, handle))
            return Handle(index, uuid, _text(self._ask(index, pynvml.nvmlDeviceGetName, handle)), handle)
        except pynvml.NVMLError as error:
            return Handle(index, "", "", None, lost=str(error))

    @property
    def watches_events(self) -> bool:
        """Whether XIDs can be waited for."""
        return self._events is not None

    def watch_events(self, handles: list[Handle]) -> list[XidEvent]:
        """Ask to be told of XIDs of these GPUs from now on; lost ones and virtual ones tell nothing (`watches_events`).

        Returns what the watch before this one still had to tell: it ends only when the new one has begun.
        """
        before, self._events = self._events, self._new_watch(handles)
        late = []
        if before is not None:
            try:
                while (event := self._next(before, 0.0)) is not None:
                    late.append(event)
            except EventsFailedError:
                pass  # that is why there is a new one
            self._ask(-1, pynvml.nvmlEventSetFree, before)
        return late

    def _new_watch(self, handles: list[Handle]) -> Any:
        """An event set; None if none of the GPUs can tell events."""
        events, watched = self._ask(-1, pynvml.nvmlEventSetCreate), 0
        for device in handles:
            try:
                if device.handle is not None:
                    kinds = pynvml.nvmlEventTypeXidCriticalError
                    self._ask(device.index, pynvml.nvmlDeviceRegisterEvents, device.handle, kinds, events)
                    watched += 1
            except pynvml.NVMLError:
                continue
        if watched:
            return events
        self._ask(-1, pynvml.nvmlEventSetFree, events)
        return None

    def next_event(self, wait_s: float) -> XidEvent | None:
        """The next XID within this time, None if there was none.

        Raises:
            EventsFailedError: if events cannot be waited for; a lost GPU does that.
        """
        assert self._events is not None
        return self._next(self._events, wait_s)

    def _next(self, events: Any, wait_s: float) -> XidEvent | None:
        try:
            wait_ms = max(0, round(wait_s * 1000))
            data = self._ask(-1, pynvml.nvmlEventSetWait_v2, events, wait_ms, may_take_s=wait_s)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_TIMEOUT:
                return None
            raise EventsFailedError(str(error)) from error
        device = self._by_address(data.device)
        if device is None or data.eventType != pynvml.nvmlEventTypeXidCriticalError:
            return None
        now_s = time.monotonic()
        try:
            recovery = self._fields(device).get(_RECOVERY)
        except pynvml.NVMLError:
            recovery = None  # the XID must be told, whatever the driver still knows of the GPU
        return XidEvent(t_s=now_s, index=device.index, uuid=device.uuid, xid=data.eventData, recovery=recovery)

    def _by_address(self, handle: Any) -> Handle | None:
        """The GPU of an event's handle. Asking the driver for its number fails just when the GPU is lost."""
        wanted = ctypes.cast(handle, ctypes.c_void_p).value
        for device in self.handles:
            if device.handle is not None and ctypes.cast(device.handle, ctypes.c_void_p).value == wanted:
                return device
        return None

    def read(self, device: Handle) -> GpuSample:
        """One reading."""
        now_s = time.monotonic()
        if device.handle is None:
            return GpuSample(t_s=now_s, index=device.index, lost=device.lost)
        try:
            return self._read(device, now_s)
        except pynvml.NVMLError as error:
            what = str(error)
            if error.value in _GONE:
                return GpuSample(t_s=now_s, index=device.index, uuid=device.uuid, lost=what)
            return GpuSample(t_s=now_s, index=device.index, uuid=device.uuid, unreadable=what)

    def _read(self, device: Handle, now_s: float) -> GpuSample:
        get = self._getter(device)
        corrected, uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        since_load, ever = pynvml.NVML_VOLATILE_ECC, pynvml.NVML_AGGREGATE_ECC
        rows = get(pynvml.nvmlDeviceGetRemappedRows) or (None, None, None, None)
        utilization, memory = get(pynvml.nvmlDeviceGetUtilizationRates), get(pynvml.nvmlDeviceGetMemoryInfo)
        power_mw = get(pynvml.nvmlDeviceGetPowerUsage)
        reasons = get(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
        if reasons is None:  # drivers before 535
            reasons = get(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        fields = self._fields(device)
        link_errors = [fields[each] for each in _LINK_ERRORS if each in fields]
        return GpuSample(
            t_s=now_s,
            index=device.index,
            uuid=device.uuid,
            temperature_c=get(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            sm_clock_mhz=get(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            memory_clock_mhz=get(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            reasons=reasons,
            corrected=get(pynvml.nvmlDeviceGetTotalEccErrors, corrected, since_load),
            corrected_ever=get(pynvml.nvmlDeviceGetTotalEccErrors, corrected, ever),
            uncorrected=get(pynvml.nvmlDeviceGetTotalEccErrors, uncorrected, since_load),
            uncorrected_ever=get(pynvml.nvmlDeviceGetTotalEccErrors, uncorrected, ever),
            rows_correctable=rows[0],
            rows_uncorrectable=rows[1],
            remap_pending=None if rows[2] is None else bool(rows[2]),
            remap_failed=None if rows[3] is None else bool(rows[3]),
            links=self._links(device, get),
            link_errors=sum(link_errors) if link_errors else None,
            pcie_replays=get(pynvml.nvmlDeviceGetPcieReplayCounter),
            pcie_width=get(pynvml.nvmlDeviceGetCurrPcieLinkWidth),
            pcie_width_max=get(pynvml.nvmlDeviceGetMaxPcieLinkWidth),
            pcie_gen=get(pynvml.nvmlDeviceGetCurrPcieLinkGeneration),
            pcie_gen_max=get(pynvml.nvmlDeviceGetMaxPcieLinkGeneration),
            utilization_pct=None if utilization is None else utilization.gpu,
            memory_used_bytes=None if memory is None else memory.used,
            memory_total_bytes=None if memory is None else memory.total,
            recovery=fields.get(_RECOVERY),
        )

    def _getter(self, device: Handle) -> Callable[..., Any]:
        def get(function: Callable[..., Any], *arguments: int) -> Any:
            key = (device.index, f"{function.__name__}{arguments}")
            if key in self._not_offered:
                return None
            try:
                return self._ask(device.index, function, device.handle, *arguments)
            except pynvml.NVMLError as error:
                if error.value not in _NOT_OFFERED:
                    raise
                self._not_offered.add(key)
                return None

        return get

    def _links(self, device: Handle, get: Callable[..., Any]) -> tuple[bool, ...] | None:
        links = []
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            state = get(pynvml.nvmlDeviceGetNvLinkState, link)
            if state is None:
                break
            links.append(bool(state))
        return tuple(links) or None

    def _fields(self, device: Handle) -> dict[int, int]:
        """Values by field number, those that the device offers."""
        try:
            wanted = [_RECOVERY, *_LINK_ERRORS]
            values = self._ask(device.index, pynvml.nvmlDeviceGetFieldValues, device.handle, wanted)
        except pynvml.NVMLError as error:
            if error.value in _NOT_OFFERED or error.value in _GONE:
                return {}
            raise
        offered = [each for each in values if each.nvmlReturn == pynvml.NVML_SUCCESS and each.valueType in _UNSIGNED]
        return {each.fieldId: int(getattr(each.value, _UNSIGNED[each.valueType])) for each in offered}

    def _ask(self, index: int, function: Callable[..., _T], *arguments: Any, may_take_s: float = 0.0) -> _T:
        self.call = Call(function.__name__, index, time.monotonic(), may_take_s)
        try:
            return function(*arguments)
        finally:
            self.call = None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
