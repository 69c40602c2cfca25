"""Judges a node's GPUs: readings, XIDs and silence in, verdicts out. It remembers what it said, and says it once.

Latency, from the fault to the verdict, with p = `health.gpu_interval_s`: an XID and what the driver says with it: at
once; lost, ECC, remapping, the driver's recovery action: p; NVLink and PCIe width: 2 p; throttling:
`health.gpu_throttle_samples` p; a call that does not return: `health.gpu_timeout_s`.
"""

from __future__ import annotations

from health.gpu_facts import Carrier, GpuSample, XidEvent
from health.gpu_signals import Finding, GpuHistory, GpuLimits, fault, recovery_finding
from health.verdict import Cause, Certainty, Severity, Verdict
from health.xid import COMPANION, CONTAINED, NAMES_ACTION, XidAction, action_of, meaning_of

_RANKING = (Certainty.HINT, Certainty.LIKELY, Certainty.PROOF)
_STUCK_REPEATS_S = 600.0


class GpuJudge:
    """Judges all GPUs of one node. No clock of its own: every fact brings its time."""

    def __init__(self, node: str, limits: GpuLimits) -> None:
        self.node = node
        self._limits = limits
        self._histories: dict[int, GpuHistory] = {}
        self._said: dict[tuple[int, str], Certainty] = {}
        self._xids: dict[tuple[int, int], int] = {}
        self._restarted: dict[int, tuple[int, float]] = {}
        self._xid_at_s: dict[int, float] = {}
        self._stuck_at_s = float("-inf")

    def sample(self, sample: GpuSample, carrier: Carrier) -> list[Verdict]:
        """Judge one reading. What was said of the GPU is said again only once it is surer, or was gone and is back."""
        found = self._history(sample.index).findings(sample)
        current = {finding.name for finding in found}
        if not sample.lost:  # what cannot be read of a lost GPU is not gone
            self._said = {
                key: certainty
                for key, certainty in self._said.items()
                if key[0] not in (sample.index, -1) or key[1] in current
            }
        return [verdict for each in found for verdict in self._news(sample.index, each, carrier)]

    def xid(self, event: XidEvent, carrier: Carrier) -> list[Verdict]:
        """Judge one XID; the same number of the same GPU counts once a generation.

        An error that asks for a restart of the program is the GPU's only if it comes back after one.
        """
        if event.xid == CONTAINED:
            self._history(event.index).contained_at_s = event.t_s
        lone = event.t_s - self._xid_at_s.get(event.index, float("-inf")) > self._limits.settle_s
        if event.xid != COMPANION:
            self._xid_at_s[event.index] = event.t_s
        elif not lone:
            return []
        driver_word = recovery_finding(event.recovery)
        verdicts = self._news(event.index, driver_word, carrier) if driver_word else []
        if self._xids.get((event.index, event.xid)) != carrier.generation:
            self._xids[event.index, event.xid] = carrier.generation
            verdicts.append(self._verdict(event.index, self._xid_finding(event, carrier.generation), carrier))
        return verdicts

    def stuck(
        self, t_s: float, index: int, call: str, for_s: float, survives_kill: bool, carrier: Carrier
    ) -> list[Verdict]:
        """NVML does not answer: a hint, unless it happened before or the caller cannot even be killed.

        t_s: any monotonic clock. index -1: the call is about no GPU in particular.
        """
        again = t_s - self._stuck_at_s <= _STUCK_REPEATS_S
        self._stuck_at_s = t_s
        line = f"the driver has not answered {call} for {for_s:.1f} s"
        line += ", not the first time" if again else ""
        line += "; the caller hangs in the kernel and survives SIGKILL" if survives_kill else ""
        certainty = Certainty.LIKELY if again or survives_kill else Certainty.HINT
        return self._news(index, fault("nvml hangs", Severity.NODE, certainty, line), carrier)

    def silent(self, for_s: float, state: str, carrier: Carrier) -> list[Verdict]:
        """The probe says nothing at all. It may be starved itself: never more than a hint."""
        line = f"the GPU probe has said nothing for {for_s:.1f} s (its process state is {state or 'unknown'})"
        return self._news(-1, fault("gpu probe silent", Severity.NODE, Certainty.HINT, line), carrier)

    def unwatched(self, why: str, times: int, carrier: Carrier) -> list[Verdict]:
        """No probe can be started: the node's trouble, which its own probe has too, and so no second witness."""
        line = f"no process that reads them could be started, {times} times in a row: {why}"
        finding = Finding(
            name="gpus not watched", cause=Cause.NODE_DEGRADED, severity=Severity.NODE, certainty=Certainty.HINT,
            line=line,
        )  # fmt: skip
        return self._news(-1, finding, carrier)

    def driver_gone(self, reason: str, carrier: Carrier) -> list[Verdict]:
        """A driver that answered before cannot be opened any more."""
        line = f"the driver answered before and no longer does: {reason}"
        return self._news(-1, fault("gpu driver gone", Severity.NODE, Certainty.LIKELY, line), carrier)

    def missing(self, index: int, carrier: Carrier) -> list[Verdict]:
        """A GPU that was there before is not listed any more."""
        finding = fault("gpu lost", Severity.NODE, Certainty.PROOF, "the driver no longer lists it")
        return self._news(index, finding, carrier)

    def _history(self, index: int) -> GpuHistory:
        return self._histories.setdefault(index, GpuHistory(self._limits))

    def _xid_finding(self, event: XidEvent, generation: int) -> Finding:
        action = action_of(event.xid)
        name = f"xid {event.xid}"
        line = f"XID {event.xid}" + (f": {words}" if (words := meaning_of(event.xid)) else "")
        if action is XidAction.EVICT:
            return fault(name, Severity.NODE, Certainty.PROOF, line)
        if action is XidAction.RESET:
            return fault(name, Severity.NODE, Certainty.LIKELY, f"{line}; the GPU needs a reset")
        if action is XidAction.WORKFLOW:
            return fault(name, Severity.NODE, Certainty.LIKELY, f"{line}; the GPU needs an examination")
        if action is XidAction.RESTART:
            return self._restart_finding(event, generation, name, line)
        if action is XidAction.OPERATOR:
            return fault(name, Severity.NOTICE, Certainty.LIKELY, f"{line}; a person must look at it")
        if event.xid == NAMES_ACTION and event.recovery is not None:
            line = f"{line}; that is in its recovery action"
        elif action is None:
            line = f"{line}; the number is not in the table"
        cause, severity = Cause.GPU_DEGRADED, Severity.NOTICE
        return Finding(name=name, cause=cause, severity=severity, certainty=Certainty.HINT, line=line)

    def _restart_finding(self, event: XidEvent, generation: int, name: str, line: str) -> Finding:
        before, at_s = self._restarted.get(event.index, (generation, event.t_s))
        self._restarted[event.index] = (generation, event.t_s)
        if before < generation and event.t_s - at_s <= self._limits.repeat_s:
            again = f"{line}; this GPU asked for a restart in generation {before} too"
            return fault(name, Severity.NODE, Certainty.LIKELY, again)
        line = f"{line}; the program must be restarted"
        return Finding(
            name=name, cause=Cause.CUDA_ERROR, severity=Severity.WORKERS, certainty=Certainty.LIKELY, line=line
        )

    def _news(self, index: int, finding: Finding, carrier: Carrier) -> list[Verdict]:
        """The verdict, if this was not said yet with as much certainty."""
        before = self._said.get((index, finding.name))
        if before is not None and _RANKING.index(before) >= _RANKING.index(finding.certainty):
            return []
        self._said[index, finding.name] = finding.certainty
        return [self._verdict(index, finding, carrier)]

    def _verdict(self, index: int, finding: Finding, carrier: Carrier) -> Verdict:
        history = self._histories.get(index)
        now = history.now if history else None
        readings = (readings_line(now),) if now is not None and not now.lost else ()
        return gpu_verdict(self.node, index, finding, carrier, readings)


def gpu_verdict(node: str, index: int, finding: Finding, carrier: Carrier, readings: tuple[str, ...] = ()) -> Verdict:
    """A finding as a verdict. index -1: it is about no GPU in particular."""
    device = f"gpu{index}" if index >= 0 else ""
    return Verdict(
        node=node,
        rank=carrier.rank,
        cause=finding.cause,
        severity=finding.severity,
        step=carrier.step,
        fingerprint=finding.name,
        evidence=(f"{device or 'GPUs'} of {node}: {finding.line}", *readings),
        certainty=finding.certainty,
        device=device,
    )


def readings_line(sample: GpuSample) -> str:
    """A reading for a person."""
    parts = [
        (sample.uuid, ""),
        (sample.temperature_c, " C"),
        (sample.power_w, " W"),
        (sample.sm_clock_mhz, " MHz"),
        (sample.utilization_pct, "% busy"),
        (sample.corrected, " corrected"),
        (sample.uncorrected, " uncorrected ECC errors"),
        (sample.pcie_replays, " PCIe replays"),
        (None if sample.links is None else sum(sample.links), " NVLinks up"),
    ]
    return "read last: " + ", ".join(f"{value}{unit}" for value, unit in parts if value not in (None, ""))
