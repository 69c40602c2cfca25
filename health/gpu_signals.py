"""What readings of one GPU over time say about it: one `GpuHistory` a GPU, one small function a signal. Pure.

What was so before the first reading is no news: counters count from it, links and lanes are compared with it. States
(lost, a failed remapping, the driver's wish) are judged whenever they are seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from health.gpu_facts import GpuSample
from health.verdict import Cause, Certainty, Severity
from health.xid import RECOVERY_WORDS, Recovery, recovery_of

REASON_WORDS = {
    0x08: "the hardware slows it down",
    0x20: "the driver slows it down because it is hot",
    0x40: "the hardware slows it down because it is hot",
    0x80: "the power supply asked it to slow down (power brake)",
}
"""NVML's bits that mean trouble. A power cap, idleness and clocks that somebody set are everyday life."""

_NOT_AT_ONCE = (Recovery.DRAIN_AND_RESET, Recovery.RECOVER_IMEX_DOMAIN)
_STAYS_SAMPLES = 2
_LIKELY_AFTER = 4
_BUSY_PCT = 50


class GpuLimits(msgspec.Struct, frozen=True, kw_only=True):
    """From where on a GPU is called impaired.

    throttle_samples: readings in a row in which its clocks are held down. The rates are counts in a window of
    window_s, but for corrected ECC errors, whose window is an hour. settle_s: how long an XID that explains a rise of
    the ECC counters may come before it. repeat_s: how long it is held against a GPU that it asked for a restart.
    """

    throttle_samples: int = 12
    window_s: float = 60.0
    pcie_replays: int = 20
    link_errors: int = 1000
    corrected_per_hour: int = 1000
    settle_s: float = 10.0
    repeat_s: float = 86400.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One signal that speaks against a GPU. name: stable, for people and for comparing."""

    name: str
    cause: Cause
    severity: Severity
    certainty: Certainty
    line: str


class Rise:
    """How much a counter grew in the last window_s seconds. A counter that falls was reset: it counts from there."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()
        self._total = 0
        self._last: int | None = None

    def feed(self, t_s: float, value: int | None) -> int:
        """Take in a reading; returns the growth within the window."""
        if value is None:
            return 0
        if self._last is not None and value > self._last:
            self._total += value - self._last
            self._seen.append((t_s, value - self._last))
        self._last = value
        while self._seen and self._seen[0][0] < t_s - self._window_s:
            self._total -= self._seen.popleft()[1]
        return self._total


class GpuHistory:
    """What is remembered of one GPU.

    first, last: its readings, each value from the first and from the last one in which it could be read: one that the
    driver now and then fails to give is compared all the same.
    """

    def __init__(self, limits: GpuLimits) -> None:
        self.limits = limits
        self.first: GpuSample | None = None
        self.last: GpuSample | None = None
        self.now: GpuSample | None = None
        self.contained_at_s = float("-inf")
        self.throttled = self.narrow = self.slow_lanes = self.links_down = self.unreadable = 0
        self.corrected = self.replays = self.link_errors = 0
        self.gen_best = 0
        self._corrected = Rise(3600.0)
        self._replays = Rise(limits.window_s)
        self._link_errors = Rise(limits.window_s)

    def findings(self, sample: GpuSample) -> list[Finding]:
        """All that speaks against the GPU after this reading. A lost GPU has no other news."""
        self._take(sample)
        if sample.lost:
            line = f"the driver says: {sample.lost}"
            return [fault("gpu lost", Severity.NODE, Certainty.PROOF, line)]
        found = [finding for signal in _SIGNALS for finding in signal(self, sample)]
        self.last = _filled(sample, self.last or sample)
        return found

    def _take(self, sample: GpuSample) -> None:
        self.now = sample
        if sample.lost:
            return
        self.first = sample if self.first is None else _filled(self.first, sample)
        self.last = self.last or sample
        self.corrected = self._corrected.feed(sample.t_s, _larger(sample.corrected, sample.corrected_ever))
        self.replays = self._replays.feed(sample.t_s, sample.pcie_replays)
        self.link_errors = self._link_errors.feed(sample.t_s, sample.link_errors)
        self.throttled = self.throttled + 1 if _held_down(sample) else 0
        self.narrow = self.narrow + 1 if _fell(sample.pcie_width, self.first.pcie_width) else 0
        self.links_down = self.links_down + 1 if self.down_links(sample) else 0
        self.unreadable = self.unreadable + 1 if sample.unreadable else 0
        busy = (sample.utilization_pct or 0) >= _BUSY_PCT
        self.gen_best = max(self.gen_best, sample.pcie_gen or 0)
        self.slow_lanes = self.slow_lanes + 1 if busy and _fell(sample.pcie_gen, self.gen_best) else 0

    def down_links(self, sample: GpuSample) -> list[int]:
        """NVLinks that were up at the first reading and are not now."""
        before = (self.first.links if self.first else None) or ()
        now = sample.links
        return [] if now is None else [i for i, up in enumerate(before) if up and not (i < len(now) and now[i])]


def fault(name: str, severity: Severity, certainty: Certainty, line: str) -> Finding:
    """A finding of a faulty GPU."""
    return Finding(name=name, cause=Cause.GPU_FAULT, severity=severity, certainty=certainty, line=line)


def _impaired(name: str, certainty: Certainty, line: str, severity: Severity = Severity.NODE) -> Finding:
    return Finding(name=name, cause=Cause.GPU_DEGRADED, severity=severity, certainty=certainty, line=line)


def recovery_finding(value: int | None) -> Finding | None:
    """The driver's own word on what the GPU needs, if that is anything."""
    action = recovery_of(value)
    if action is None or action is Recovery.NONE:
        return None
    certainty = Certainty.LIKELY if action in _NOT_AT_ONCE else Certainty.PROOF
    name = f"gpu recovery {action.name.lower()}"
    return fault(name, Severity.NODE, certainty, f"the driver says that it needs {RECOVERY_WORDS[action]}")


def _driver_word(_: GpuHistory, sample: GpuSample) -> Iterator[Finding]:
    finding = recovery_finding(sample.recovery)
    if finding is not None:
        yield finding


def _uncorrected(history: GpuHistory, sample: GpuSample) -> Iterator[Finding]:
    assert history.first is not None
    assert history.last is not None
    grown = max(
        _growth(history.last.uncorrected, sample.uncorrected),
        _growth(history.last.uncorrected_ever, sample.uncorrected_ever),
    )
    if grown == 0:
        return
    line = f"{grown} ECC error{'s' if grown > 1 else ''} that could not be corrected since the reading before"
    # An error that the driver held to one program (XID 94) costs that program, not the GPU.
    contained = sample.t_s - history.contained_at_s <= history.limits.settle_s
    if contained and recovery_of(sample.recovery) is Recovery.NONE:
        yield fault("ecc contained", Severity.NOTICE, Certainty.LIKELY, f"{line}; the driver contained them")
    else:
        yield fault("ecc uncorrected", Severity.NODE, Certainty.LIKELY, line)


def _remapping(history: GpuHistory, sample: GpuSample) -> Iterator[Finding]:
    if sample.remap_failed:
        line = "rows of its memory could not be remapped: the card must be replaced"
        yield fault("remap failed", Severity.NODE, Certainty.PROOF, line)
    if sample.remap_pending:
        assert history.first is not None
        lost_data = _growth(history.first.rows_uncorrectable, sample.rows_uncorrectable)
        why = f", {lost_data} of them after errors that could not be corrected" if lost_data else ""
        line = f"rows of its memory wait for a reset to be remapped{why}"
        yield _impaired("remap pending", Certainty.LIKELY if lost_data else Certainty.HINT, line)


def _nvlink(history: GpuHistory, sample: GpuSample) -> Iterator[Finding]:
    down = history.down_links(sample)
    if history.links_down >= _STAYS_SAMPLES:
        names = ", ".join(str(link) for link in down)
        yield fault("nvlink down", Severity.NODE, Certainty.LIKELY, f"NVLink {names} went down and stays down")
    errors, limit = history.link_errors, history.limits.link_errors
    if errors >= limit:
        line = f"{errors} NVLink errors in {history.limits.window_s:g} s (limit {limit})"
        yield _impaired("nvlink errors", _grown(errors, limit), line)


def _pcie(history: GpuHistory, sample: GpuSample) -> Iterator[Finding]:
    limits, replays = history.limits, history.replays
    assert history.first is not None
    if replays >= limits.pcie_replays:
        line = f"{replays} PCIe replays in {limits.window_s:g} s (limit {limits.pcie_replays})"
        yield _impaired("pcie replays", _grown(replays, limits.pcie_replays), line)
    if history.narrow >= _STAYS_SAMPLES:
        line = f"its PCIe link fell from {history.first.pcie_width} lanes to {sample.pcie_width}"
        yield _impaired("pcie width", Certainty.LIKELY, line)
    if history.slow_lanes >= limits.throttle_samples:
        line = f"its PCIe link runs at generation {sample.pcie_gen} under load, and did at {history.gen_best} before"
        yield _impaired("pcie generation", Certainty.HINT, line)


def _throttling(history: GpuHistory, sample: GpuSample) -> Iterator[Finding]:
    limit = history.limits.throttle_samples
    if history.throttled >= limit:
        words = " and ".join(reason_words(sample.reasons or 0))
        line = (
            f"in {history.throttled} readings in a row, {words} ({sample.temperature_c} C, {sample.sm_clock_mhz} MHz)"
        )
        yield _impaired("throttled", _grown(history.throttled, limit), line)


def _corrected(history: GpuHistory, _: GpuSample) -> Iterator[Finding]:
    limit = history.limits.corrected_per_hour
    if history.corrected >= limit:
        line = f"{history.corrected} corrected ECC errors in an hour (limit {limit})"
        yield _impaired("ecc corrected", Certainty.HINT, line)


def _unreadable(history: GpuHistory, sample: GpuSample) -> Iterator[Finding]:
    if history.unreadable >= history.limits.throttle_samples:
        line = f"the driver fails to read it, {history.unreadable} times in a row: {sample.unreadable}"
        yield _impaired("unreadable", Certainty.HINT, line)


_SIGNALS: tuple[Callable[[GpuHistory, GpuSample], Iterator[Finding]], ...] = (
    _driver_word, _uncorrected, _remapping, _nvlink, _pcie, _throttling, _corrected, _unreadable,
)  # fmt: skip


def reason_words(reasons: int) -> list[str]:
    """What holds the clocks down, in words; only what means trouble."""
    return [words for bit, words in REASON_WORDS.items() if reasons & bit]


def _filled(sample: GpuSample, other: GpuSample) -> GpuSample:
    """The reading, with the other's values for those that could not be read."""
    missing = {name: getattr(other, name) for name in sample.__struct_fields__ if getattr(sample, name) is None}
    return msgspec.structs.replace(sample, **missing) if missing else sample


def _held_down(sample: GpuSample) -> bool:
    return bool(reason_words(sample.reasons or 0))


def _fell(now: int | None, before: int | None) -> bool:
    return now is not None and before is not None and 0 < now < before


def _growth(before: int | None, now: int | None) -> int:
    return max(0, now - before) if now is not None and before is not None else 0


def _grown(value: int, limit: int) -> Certainty:
    return Certainty.LIKELY if value >= _LIKELY_AFTER * limit else Certainty.HINT


def _larger(first: int | None, second: int | None) -> int | None:
    return max((value for value in (first, second) if value is not None), default=None)
