"""Promise: what others say of a node on Kubernetes counts as much as it proves, and nobody's word is overruled."""

from __future__ import annotations

import msgspec
import pytest

from health.kube_conditions import Condition, KubeJudge, Standing, Taint
from health.verdict import Cause, Certainty, Severity, Verdict

NODE, NOTICE = Severity.NODE, Severity.NOTICE
HINT, LIKELY, PROOF = Certainty.HINT, Certainty.LIKELY, Certainty.PROOF
MEMORY = Condition("GpuMemWatch", "True", "x", "[DCGM_FR_FAULTY_MEMORY] GPU 0 - RecommendedAction: RESTART_VM")
HARMLESS = Condition("GpuThermalWatch", "True", "x", "[DCGM_FR_CLOCK_THROTTLE_THERMAL] GPU 0 - RecommendedAction: NONE")
QUARANTINED = {"quarantineHealthEvent": "[{}]", "quarantineHealthEventIsCordoned": "True"}


def judged(**standing: object) -> list[Verdict]:
    return KubeJudge().judge(msgspec.convert({"node": "n", **standing}, Standing, from_attributes=True), 7)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (Condition("Ready", "True"), None),
        (Condition("Ready", "Unknown", "NodeStatusUnknown"), (Cause.NODE_DEGRADED, NOTICE, HINT)),
        (Condition("Ready", "False", "KubeletNotReady"), (Cause.NODE_DEGRADED, NODE, HINT)),
        (Condition("KernelDeadlock", "True", "DockerHung"), (Cause.NODE_FAULT, NODE, LIKELY)),
        (Condition("KernelDeadlock", "False"), None),
        (Condition("KernelDeadlock", "Unknown"), None),
        (Condition("ReadonlyFilesystem", "True"), (Cause.NODE_FAULT, NODE, HINT)),
        (Condition("MemoryPressure", "True"), (Cause.NODE_DEGRADED, NOTICE, LIKELY)),
        (Condition("GPUMissing", "True"), (Cause.GPU_FAULT, NODE, LIKELY)),
        (Condition("AcceleratedHardwareReady", "False", "NvidiaXID79Error"), (Cause.GPU_FAULT, NODE, LIKELY)),
        (Condition("AcceleratedHardwareReady", "True"), None),
        (MEMORY, (Cause.GPU_DEGRADED, NODE, LIKELY)),
        (HARMLESS, (Cause.GPU_DEGRADED, NOTICE, LIKELY)),
        (Condition("SysLogsXIDError", "True"), (Cause.GPU_DEGRADED, NODE, LIKELY)),
        (Condition("CSPMaintenance", "True"), (Cause.PREEMPTED, NODE, LIKELY)),
        (Condition("VMEventScheduled", "True", "x", "Preempt Scheduled: 21:00"), (Cause.PREEMPTED, NODE, LIKELY)),
        (Condition("VMEventScheduled", "True", "x", "Freeze Scheduled: 21:00"), (Cause.NODE_DEGRADED, NOTICE, LIKELY)),
        (Condition("SomethingOfTheSites", "True"), None),
    ],
)
def test_conditions(condition: Condition, expected: tuple[Cause, Severity, Certainty] | None) -> None:
    found = judged(conditions=(condition,))
    assert [(each.cause, each.severity, each.certainty) for each in found] == ([expected] if expected else [])
    for each in found:
        assert (each.node, each.rank, each.step) == ("n", -1, 7)
        assert each.evidence[0].startswith("n: ")
        assert condition.type in each.evidence[0]


@pytest.mark.parametrize(
    ("taint", "expected"),
    [
        ("aws-node-termination-handler/spot-itn", (Cause.PREEMPTED, NODE)),
        ("cloud.google.com/impending-node-termination", (Cause.PREEMPTED, NODE)),
        ("ToBeDeletedByClusterAutoscaler", (Cause.PREEMPTED, NODE)),
        ("DeletionCandidateOfClusterAutoscaler", (Cause.NODE_DEGRADED, NOTICE)),
        ("node.kubernetes.io/out-of-service", (Cause.NODE_LOST, NODE)),
        ("kubernetes.azure.com/scalesetpriority", None),
        ("nvidia.com/gpu", None),
        ("node.kubernetes.io/unreachable", None),
    ],
)
def test_taints(taint: str, expected: tuple[Cause, Severity] | None) -> None:
    found = [(each.cause, each.severity) for each in judged(taints=(Taint(taint, "", "NoExecute"),))]
    assert found == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("PreemptionByScheduler", Cause.PREEMPTED),
        ("EvictionByEvictionAPI", Cause.PREEMPTED),
        ("DeletionByTaintManager", Cause.PREEMPTED),
        ("TerminationByKubelet", Cause.PREEMPTED),
        ("SomethingNew", Cause.PREEMPTED),
        ("DeletionByPodGC", Cause.NODE_LOST),
    ],
)
def test_pods_that_are_taken_away(reason: str, cause: Cause) -> None:
    (found,) = judged(pod=(Condition("DisruptionTarget", "True", reason, "why"),))
    assert (found.cause, found.severity) == (cause, NODE)
    assert judged(pod=(Condition("DisruptionTarget", "False", reason, "why"),)) == []


def test_a_quarantine_is_proof_and_takes_its_conditions_along() -> None:
    (found,) = judged(conditions=(MEMORY, HARMLESS), annotations=QUARANTINED, cordoned=True)
    assert (found.cause, found.severity, found.certainty) == (Cause.GPU_FAULT, NODE, PROOF)
    assert "DCGM_FR_FAULTY_MEMORY" in found.evidence[0]


def test_a_person_who_overruled_nvsentinel_is_believed() -> None:
    overruled = {**QUARANTINED, "quarantinedNodeUncordonedManually": "True"}
    (found,) = judged(conditions=(MEMORY,), annotations=overruled)
    assert found.severity is NOTICE
    assert "a person has put it back to work" in found.evidence[0]


@pytest.mark.parametrize("ours", ["", "everstep: gpu_fault: XID 79"])
def test_a_cordon_takes_nothing_away(ours: str) -> None:
    (found,) = judged(cordoned=True, ours=ours)
    assert found.severity is NOTICE
    assert ours in found.evidence[0]


def test_each_trouble_is_said_once_while_it_lasts() -> None:
    judge = KubeJudge()
    bad, well = Standing(node="n", conditions=(MEMORY,)), Standing(node="n")
    other = Standing(node="n", conditions=(MEMORY,), cordoned=True)
    assert [len(judge.judge(each, 1)) for each in (bad, bad, other, bad, well, bad)] == [1, 0, 1, 0, 0, 1]
    judge.forget("n")
    assert len(judge.judge(bad, 1)) == 1


def test_what_others_write_stays_one_short_line() -> None:
    (found,) = judged(conditions=(Condition("KernelDeadlock", "True", "x", "a\nb\x1b[31m" + "c" * 5000),))
    assert "\n" not in found.evidence[0]
    assert "\x1b" not in found.evidence[0]
    assert len(found.evidence[0]) < 400


def test_what_grows_worse_is_said_again() -> None:
    """Promise: a machine that is to be frozen, and then to be taken away, is two things to know."""
    judge = KubeJudge()

    def said(message: str) -> list[Cause]:
        condition = Condition("VMEventScheduled", "True", "x", message)
        return [each.cause for each in judge.judge(Standing(node="n", conditions=(condition,)), 7)]

    assert said("Freeze Scheduled: 21:00") == [Cause.NODE_DEGRADED]
    assert said("Freeze Scheduled: 22:00") == []
    assert said("Preempt Scheduled: 21:00") == [Cause.PREEMPTED]
