"""What Kubernetes says of a node and of the pod on it, as verdicts: who says it, how sure that is, what follows. Pure.

Others look at nodes too, each through its own conditions, taints and annotations: the kubelet, node-problem-detector,
NVSentinel, what a cloud runs. They are witnesses like our own probes, and weighed with them. Where NVSentinel has taken
a node out of work, that is settled; where it only says what it saw, or a person overruled it, it is not. A condition
that nobody here knows is left alone: whether `True` is good or bad stands in no field.

What only announces that a node or a pod will be taken away is no fault: its ranks save, and move.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from health.node import Trouble, as_verdict
from health.verdict import Cause, Certainty, Severity, Verdict

_LONGEST_WORDS = 300
_QUARANTINE = "quarantineHealthEvent"
_QUARANTINED_CORDON = "quarantineHealthEventIsCordoned"
_OVERRULED = "quarantinedNodeUncordonedManually"
_NVSENTINEL = re.compile(r"Gpu\w+Watch|GpuXidError|SysLogs\w+|NVSwitch\w+|InfiniBand\w+Check|Ethernet\w+Check")
_NO_ACTION = re.compile(r"recommended ?action[:=]\s*none\b", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class Condition(msgspec.Struct, frozen=True):
    """A condition of a node or a pod. status: `True`, `False` or `Unknown`."""

    type: str
    status: str
    reason: str = ""
    message: str = ""


class Taint(msgspec.Struct, frozen=True):
    """A taint of a node."""

    key: str
    value: str = ""
    effect: str = ""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A node that works for us, as the API server has it. node: its name in the run.

    ours: why a run of Everstep took it out of work, "" if none did. annotations: of the node, those of `ANNOTATIONS`.
    pod: the conditions of the pod that our agent is in.
    """

    node: str
    conditions: tuple[Condition, ...] = ()
    taints: tuple[Taint, ...] = ()
    annotations: Mapping[str, str] = {}
    cordoned: bool = False
    ours: str = ""
    pod: tuple[Condition, ...] = ()


ANNOTATIONS = (_QUARANTINE, _QUARANTINED_CORDON, _OVERRULED)
"""Annotations of nodes that are read here."""


class _Rule(msgspec.Struct, frozen=True):
    who: str
    cause: Cause
    severity: Severity
    certainty: Certainty = Certainty.LIKELY
    bad: str = "True"


_N, _S = Severity.NODE, Severity.NOTICE
_HINT, _LIKELY, _PROOF = Certainty.HINT, Certainty.LIKELY, Certainty.PROOF
_DETECTOR = "node-problem-detector"
_RULES: Mapping[str, _Rule] = {
    # The kubelet's own. Under pressure it may evict pods; training goes on meanwhile.
    "MemoryPressure": _Rule("the kubelet", Cause.NODE_DEGRADED, _S),
    "DiskPressure": _Rule("the kubelet", Cause.NODE_DEGRADED, _S),
    "PIDPressure": _Rule("the kubelet", Cause.NODE_DEGRADED, _S),
    "NetworkUnavailable": _Rule("the node's network", Cause.LINK_FAULT, _N, _HINT),
    # node-problem-detector's, as it is delivered.
    "KernelDeadlock": _Rule(_DETECTOR, Cause.NODE_FAULT, _N),
    "ReadonlyFilesystem": _Rule(_DETECTOR, Cause.NODE_FAULT, _N, _HINT),
    "XfsShutdown": _Rule(_DETECTOR, Cause.NODE_FAULT, _N, _HINT),
    "CperHardwareErrorFatal": _Rule(_DETECTOR, Cause.NODE_FAULT, _N),
    "CorruptDockerOverlay2": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _S),
    "KubeletUnhealthy": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _N, _HINT),
    "ContainerRuntimeUnhealthy": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _N, _HINT),
    "FrequentKubeletRestart": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _S),
    "FrequentContainerdRestart": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _S),
    "FrequentDockerRestart": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _S),
    "FrequentUnregisterNetDevice": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _S),
    # The same with what Azure adds to it.
    "KubeletProblem": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _N, _HINT),
    "ContainerRuntimeProblem": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _N, _HINT),
    "FilesystemCorruptionProblem": _Rule(_DETECTOR, Cause.NODE_FAULT, _N, _HINT),
    "GPUMissing": _Rule(_DETECTOR, Cause.GPU_FAULT, _N),
    "XIDErrors": _Rule(_DETECTOR, Cause.GPU_DEGRADED, _N, _HINT),
    "NVLinkStatusInactive": _Rule(_DETECTOR, Cause.GPU_DEGRADED, _N),
    "IBLinkFlapping": _Rule(_DETECTOR, Cause.LINK_FAULT, _N, _HINT),
    "GPUClockThrottling": _Rule(_DETECTOR, Cause.GPU_DEGRADED, _S),
    "UnhealthyNvidiaDevicePlugin": _Rule(_DETECTOR, Cause.NODE_DEGRADED, _S),
    # The monitoring agent of EKS says that something is ready.
    "AcceleratedHardwareReady": _Rule("EKS", Cause.GPU_FAULT, _N, bad="False"),
    "KernelReady": _Rule("EKS", Cause.NODE_DEGRADED, _N, _HINT, bad="False"),
    "NetworkingReady": _Rule("EKS", Cause.LINK_FAULT, _N, _HINT, bad="False"),
    "StorageReady": _Rule("EKS", Cause.NODE_DEGRADED, _N, _HINT, bad="False"),
    "ContainerRuntimeReady": _Rule("EKS", Cause.NODE_DEGRADED, _N, _HINT, bad="False"),
}
_ANNOUNCED: Mapping[str, str] = {
    "aws-node-termination-handler/spot-itn": "its spot instance is being taken back",
    "aws-node-termination-handler/scheduled-maintenance": "maintenance of its machine is due",
    "aws-node-termination-handler/asg-lifecycle-termination": "its group takes it back",
    "cloud.google.com/impending-node-termination": "its machine is about to be ended",
    "karpenter.sh/disrupted": "Karpenter takes it away",
    "karpenter.sh/disruption": "Karpenter takes it away",
    "ToBeDeletedByClusterAutoscaler": "the autoscaler takes it away",
}
_ADVISED = ("aws-node-termination-handler/rebalance-recommendation", "DeletionCandidateOfClusterAutoscaler")
_DEAD = ("node.kubernetes.io/out-of-service", "node.cloudprovider.kubernetes.io/shutdown")
_TAKEN: Mapping[str, str] = {
    "PreemptionByScheduler": "its pod makes room for one of a higher priority",
    "EvictionByEvictionAPI": "its pod is being evicted: the node is drained",
    "DeletionByTaintManager": "its pod does not tolerate a taint of the node",
    "TerminationByKubelet": "its pod is ended by the kubelet",
}


_Weight = tuple[str, Cause, Severity, Certainty]


class KubeJudge:
    """Says each trouble once while it lasts; what went away and comes back, or weighs something else since, is said
    again."""

    def __init__(self) -> None:
        self._said: dict[str, frozenset[_Weight]] = {}

    def judge(self, standing: Standing, step: int) -> list[Verdict]:
        """What is new. step: the one that the node is in, -1 for not known."""
        found = {_weight(trouble): trouble for trouble in troubles(standing)}
        said = self._said.get(standing.node, frozenset())
        self._said[standing.node] = frozenset(found)
        return [as_verdict(trouble, standing.node, step) for mark, trouble in found.items() if mark not in said]

    def forget(self, node: str) -> None:
        """The node works for us no more."""
        self._said.pop(node, None)


def _weight(trouble: Trouble) -> _Weight:
    return (trouble.fingerprint, trouble.cause, trouble.severity, trouble.certainty)


def troubles(standing: Standing) -> Iterator[Trouble]:
    """All that is said of the node now."""
    overruled = standing.annotations.get(_OVERRULED, "").lower() == "true"
    quarantined = is_quarantined(standing.annotations) and not overruled
    for condition in standing.conditions:
        yield from _of_condition(condition, quarantined, overruled)
    for taint in standing.taints:
        yield from _of_taint(taint)
    for condition in standing.pod:
        yield from _of_pod(condition)
    if quarantined:
        why = "; ".join(_words(each) for each in standing.conditions if _is_sentinels(each)) or "see its health event"
        yield _trouble(Cause.GPU_FAULT, _N, _PROOF, "NVSentinel quarantine", f"NVSentinel has quarantined it: {why}")
    elif standing.cordoned:
        who = f"another run has taken it out of work ({standing.ours})" if standing.ours else "somebody has cordoned it"
        yield _trouble(Cause.NODE_DEGRADED, _S, _HINT, "cordoned", f"{who}; what runs there goes on")


def is_quarantined(annotations: Mapping[str, str]) -> bool:
    """Whether NVSentinel has taken the node out of work; its own remedies are under way then."""
    return bool(annotations.get(_QUARANTINE)) or annotations.get(_QUARANTINED_CORDON, "").lower() == "true"


def _of_condition(condition: Condition, quarantined: bool, overruled: bool) -> Iterator[Trouble]:
    if condition.type == "Ready":
        # Heartbeats say better and sooner whether the node is lost; a kubelet that is not heard may only be restarting.
        if condition.status == "False":
            line = f"the kubelet says that it is not ready: {_words(condition)}"
            yield _trouble(Cause.NODE_DEGRADED, _N, _HINT, "Ready False", line)
        elif condition.status != "True":
            line = f"its kubelet is not heard: {_words(condition)}"
            yield _trouble(Cause.NODE_DEGRADED, _S, _HINT, "Ready Unknown", line)
    elif condition.type == "CSPMaintenance":
        if condition.status == "True":
            yield _trouble(Cause.PREEMPTED, _N, _LIKELY, condition.type, f"maintenance is due: {_words(condition)}")
    elif condition.type == "VMEventScheduled":
        if condition.status == "True":
            frozen = "freeze" in condition.message.lower()
            cause, severity = (Cause.NODE_DEGRADED, _S) if frozen else (Cause.PREEMPTED, _N)
            yield _trouble(cause, severity, _LIKELY, condition.type, f"its machine's owner says: {_words(condition)}")
    elif _is_sentinels(condition):
        if not quarantined:
            yield _seen_by_sentinel(condition, overruled)
    elif (rule := _RULES.get(condition.type)) is not None and condition.status == rule.bad:
        line = f"{rule.who} says: {_words(condition)}"
        yield _trouble(rule.cause, rule.severity, rule.certainty, condition.type, line)


def _is_sentinels(condition: Condition) -> bool:
    return condition.status == "True" and bool(_NVSENTINEL.fullmatch(condition.type))


def _seen_by_sentinel(condition: Condition, overruled: bool) -> Trouble:
    """It puts only what it takes for fatal into a condition. Its quarantine follows, where it is set up to do that."""
    harmless = overruled or bool(_NO_ACTION.search(condition.message))
    more = ", and a person has put it back to work" if overruled else ""
    line = f"NVSentinel says: {_words(condition)}{more}"
    return _trouble(Cause.GPU_DEGRADED, _S if harmless else _N, _LIKELY, condition.type, line)


def _of_taint(taint: Taint) -> Iterator[Trouble]:
    if taint.key in _ANNOUNCED:
        line = f"{_ANNOUNCED[taint.key]} (taint {taint.key})"
        yield _trouble(Cause.PREEMPTED, _N, _LIKELY, taint.key, line)
    elif taint.key in _ADVISED:
        yield _trouble(Cause.NODE_DEGRADED, _S, _HINT, taint.key, f"it may be taken away (taint {taint.key})")
    elif taint.key in _DEAD:
        yield _trouble(Cause.NODE_LOST, _N, _PROOF, taint.key, f"it is declared dead (taint {taint.key})")


def _of_pod(condition: Condition) -> Iterator[Trouble]:
    if condition.type != "DisruptionTarget" or condition.status != "True":
        return
    mark = f"pod {condition.reason}"
    if condition.reason == "DeletionByPodGC":
        yield _trouble(Cause.NODE_LOST, _N, _PROOF, mark, f"its pod is cleared away: {_words(condition)}")
    else:
        why = _TAKEN.get(condition.reason, "its pod is being taken away")
        yield _trouble(Cause.PREEMPTED, _N, _LIKELY, mark, f"{why}: {_words(condition)}")


def _words(condition: Condition) -> str:
    said = condition.message or condition.reason
    text = f"{condition.type}={condition.status}" + (f" ({said})" if said else "")
    return _CONTROL.sub(" ", text)[:_LONGEST_WORDS]


def _trouble(cause: Cause, severity: Severity, certainty: Certainty, mark: str, line: str) -> Trouble:
    return Trouble(cause=cause, severity=severity, certainty=certainty, device="", fingerprint=mark, line=line)
