"""One reading of this machine's GPUs for `everstep doctor`, from the process that also watches them in a run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.gpu_child import ProbeProcess
from cluster.gpu_messages import Absent, Hello, ProbeStart, Waiting
from health.examination import Check, Grade
from health.gpu import GpuJudge, readings_line
from health.gpu_facts import Carrier, GpuSample
from health.gpu_signals import GpuLimits
from health.verdict import Severity

_POLL_S = 0.25
_INTERVAL_S = 1.0
_ALL = 1024


def gpu_checks(visible: Sequence[str] | None, timeout_s: float) -> list[Check]:
    """A check for each GPU that is visible: what its driver says of it. One that says nothing in time fails.

    visible: the entries of CUDA_VISIBLE_DEVICES, None if it is not set.
    """
    start = ProbeStart(
        interval_s=_INTERVAL_S, timeout_s=timeout_s, ranks=_ALL, visible=None if visible is None else tuple(visible)
    )
    probe, judge = ProbeProcess("doctor", start), GpuJudge("doctor", GpuLimits())
    deadline_s = time.monotonic() + 2 * timeout_s
    names: dict[int, str] = {}
    checks: dict[int, Check] = {}
    try:
        while time.monotonic() < deadline_s and (not names or len(checks) < len(names)):
            lines = probe.lines(_POLL_S)
            if lines is None:
                return [_check(-1, Grade.NOTE, detail="the process that reads the GPUs ended by itself")]
            for line in lines:
                match line:
                    case Absent():
                        return [_check(-1, Grade.PASS, value=line.reason)]
                    case Waiting():
                        return [_check(line.index, Grade.FAIL, detail=f"{line.call} does not return")]
                    case Hello():
                        names = {each.index: each.name for each in line.devices}
                    case GpuSample():
                        checks[line.index] = _judged(judge, line, names.get(line.index, ""))
                    case _:
                        pass  # an XID is in the next reading, too
    finally:
        probe.close()
    silent = [_check(index, Grade.FAIL, detail="its driver says nothing") for index in names if index not in checks]
    return [*checks.values(), *silent]


def _judged(judge: GpuJudge, sample: GpuSample, name: str) -> Check:
    verdicts = judge.sample(sample, Carrier())
    grave = any(verdict.severity is not Severity.NOTICE for verdict in verdicts)
    grade = Grade.FAIL if grave else Grade.NOTE if verdicts else Grade.PASS
    detail = "; ".join(verdict.evidence[0] for verdict in verdicts)
    return _check(sample.index, grade, f"{name}, {readings_line(sample).removeprefix('read last: ')}", detail)


def _check(index: int, grade: Grade, value: str = "", detail: str = "") -> Check:
    return Check(name="gpu", device=f"gpu{index}" if index >= 0 else "", grade=grade, value=value, detail=detail)
