"""What DCGM, NVIDIA's manager of data-centre GPUs, says of them: its JSON read, and its word as verdicts. Pure.

The shapes are those of `dcgmi health --check --json` and `dcgmi diag --json` of DCGM 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from health.gpu import gpu_verdict
from health.gpu_facts import Carrier
from health.gpu_signals import Finding
from health.verdict import Cause, Certainty, Severity, Verdict

HEALTHY = "Healthy"
_FAILURE = "Failure"


class DcgmIncident(msgspec.Struct, frozen=True):
    """One system of one GPU that is not healthy. health: DCGM's word, `Warning` or `Failure`."""

    gpu: int
    system: str
    health: str
    message: str = ""


class _Box(msgspec.Struct):
    """DCGM's JSON is a tree of these."""

    value: str = ""
    overflow: list[str] = []
    children: dict[str, _Box] = {}


class _Health(msgspec.Struct):
    body: dict[str, _Box] = {}


class _DiagWarning(msgspec.Struct):
    warning: str = ""


class _DiagResult(msgspec.Struct):
    status: str = ""
    entity_id: int = -1
    gpu_id: str = ""
    warnings: list[_DiagWarning | str] = []


class _DiagTest(msgspec.Struct):
    name: str = ""
    results: list[_DiagResult] = []


class _DiagCategory(msgspec.Struct):
    category: str = ""
    tests: list[_DiagTest] = []


class _DiagReport(msgspec.Struct):
    test_categories: list[_DiagCategory] = []


def read_health(text: str) -> tuple[DcgmIncident, ...]:
    """What `dcgmi health --check --json` printed; empty if all GPUs are healthy.

    Raises:
        ValueError: with DCGM's own words, if it could not check.
    """
    body = msgspec.json.decode(_json_of(text), type=_Health).body
    if not body:
        raise ValueError(f"DCGM's answer has no body: {text.strip()[:200]}")
    found = []
    for number, gpu in body.get("GPU", _Box()).children.items():
        errors = gpu.children.get("Errors", _Box()).children
        for system, error in errors.items():
            found.append(DcgmIncident(int(number), system, error.value, " ".join(error.overflow)))
        if not errors and gpu.value not in ("", HEALTHY):
            found.append(DcgmIncident(int(number), "unknown system", gpu.value))
    return tuple(found)


def read_diagnosis(text: str) -> tuple[str, ...]:
    """The failures that `dcgmi diag --json` printed, a line each; empty if it found none.

    Raises:
        ValueError: with DCGM's own words, if it could not run.
    """
    reports = msgspec.json.decode(_json_of(text), type=dict[str, msgspec.Raw])
    lines = []
    for raw in reports.values():
        try:
            report = msgspec.json.decode(raw, type=_DiagReport)
        except msgspec.ValidationError:
            continue  # a version or a list of GPUs stands beside the report
        for category in report.test_categories:
            for test in category.tests:
                lines += [_diag_line(test.name, each) for each in test.results if each.status.lower() == "fail"]
    return tuple(lines)


def _diag_line(test: str, result: _DiagResult) -> str:
    where = result.gpu_id or (str(result.entity_id) if result.entity_id >= 0 else "")
    words = [each if isinstance(each, str) else each.warning for each in result.warnings]
    return f"DCGM's test {test} fails{f' on gpu{where}' if where else ''}" + (f": {'; '.join(words)}" if words else "")


def _json_of(text: str) -> str:
    """What stands in braces; DCGM says its errors, and at times a greeting, as plain text."""
    begin, end = text.find("{"), text.rfind("}")
    if begin < 0 or end < begin:
        raise ValueError(f"DCGM: {' '.join(text.split())[:200] or 'no answer'}")
    return text[begin : end + 1]


class DcgmJudge:
    """Turns DCGM's word into verdicts, each said once as long as it stands."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._said: frozenset[DcgmIncident] = frozenset()

    def judge(self, incidents: Sequence[DcgmIncident], carrier: Callable[[int], Carrier]) -> list[Verdict]:
        """Judge all of one check; carrier says whom a GPU serves."""
        news = [each for each in incidents if _key(each) not in self._said]
        self._said = frozenset(_key(each) for each in incidents)
        return [gpu_verdict(self.node, each.gpu, _finding(each), carrier(each.gpu)) for each in news]


def _key(incident: DcgmIncident) -> DcgmIncident:
    """Messages have counters in them."""
    return DcgmIncident(incident.gpu, incident.system, incident.health)


def _finding(incident: DcgmIncident) -> Finding:
    fails = incident.health == _FAILURE
    message = f": {incident.message}" if incident.message else ""
    return Finding(
        name=f"dcgm {incident.system.lower()}",
        cause=Cause.GPU_FAULT if fails else Cause.GPU_DEGRADED,
        severity=Severity.NODE,
        certainty=Certainty.LIKELY if fails else Certainty.HINT,
        line=f"DCGM calls its {incident.system} {incident.health.lower()}{message}",
    )
