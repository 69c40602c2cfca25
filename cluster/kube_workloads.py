"""The workload itself: a JobSet, two plain Jobs, or a TrainJob with its runtime. Pure.

All three are two Jobs. `agents` is Indexed, a pod a node, spares included; pods that end are replaced for as long as
the run goes on. `supervisor` has one pod and no GPU; when its node is gone, another one takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.kube_names import Role
from cluster.kube_plan import KubePlan
from cluster.kube_pods import Manifest, container_name, pod_template
from trainer.exits import ExitCode

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ANCESTOR_LABEL = "trainer.kubeflow.org/trainjob-ancestor-step"

FOR_GOOD = (ExitCode.BAD_INPUT, ExitCode.DO_NOT_RESTART)
"""The run is over and must not be tried again: the workload fails at once."""
_TOLD_TO_GO = (ExitCode.REQUEUE, 128 + 15)
_OWN_FAULT = (ExitCode.FAILED, ExitCode.BAD_NODE, 128 + 9)

# Not without end: a pod that fails again and again by itself (an image that cannot run, say) must come to light.
_RETRIES_OF_AN_INDEX = 30
_RETRIES_OF_THE_SUPERVISOR = 20
"""Each try is `cluster.kube_run`'s five, and drains of its nodes count here too: no policy may say that they do not."""


def workloads(plan: KubePlan) -> Sequence[Manifest]:
    """What the profile's `kind` makes of a job, in the order in which to create it."""
    match plan.kind:
        case "jobset":
            return (_jobset(plan),)
        case "job":
            return (_plain_job(plan, "agents"), _plain_job(plan, "supervisor"))
        case "trainjob":
            return (_runtime(plan), _train_job(plan))


def failure_policy(plan: KubePlan) -> Manifest:
    """What our exit codes mean to the Job controller of agents; the first rule that fits counts."""

    def on_codes(action: str, codes: Sequence[int]) -> Manifest:
        values = sorted(int(code) for code in codes)
        return {
            "action": action,
            "onExitCodes": {"containerName": container_name(plan, "agents"), "operator": "In", "values": values},
        }

    return {
        "rules": [
            on_codes("FailJob", FOR_GOOD),
            # Evicted, preempted, or its node is gone: not its fault.
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            on_codes("Ignore", _TOLD_TO_GO),
            on_codes("Count", _OWN_FAULT),
        ]
    }


def _agents_job(plan: KubePlan) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": plan.agents,
        "parallelism": plan.agents,
        # Each index has a back-off of its own: one bad node does not slow down the replacement of others.
        "backoffLimitPerIndex": _RETRIES_OF_AN_INDEX,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": failure_policy(plan),
        "template": pod_template(plan, "agents"),
    }


def _supervisor_job(plan: KubePlan) -> Manifest:
    # A pod on a dead node stays Terminating until somebody takes the node out; training would have no supervisor for
    # that long. Its successor waits for the run's lock, so two can never act. Kubernetes allows this only without a
    # failure policy: that of the agents ends the workload, see `cluster.kube_run`.
    return {
        "completionMode": "Indexed",
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": _RETRIES_OF_THE_SUPERVISOR,
        "podReplacementPolicy": "TerminatingOrFailed",
        "template": pod_template(plan, "supervisor"),
    }


def _jobset_spec(plan: KubePlan) -> Manifest:
    agents: Manifest = {"metadata": {"labels": plan.labels("agents")}, "spec": _agents_job(plan)}
    if plan.kind == "trainjob":
        agents["metadata"]["labels"][ANCESTOR_LABEL] = "trainer"
    supervisor = {"metadata": {"labels": plan.labels("supervisor")}, "spec": _supervisor_job(plan)}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["supervisor"]},
        # Whatever can go on does so inside the Jobs; a Job that failed has failed for good.
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [
            {"name": "supervisor", "replicas": 1, "template": supervisor},
            {"name": "agents", "replicas": 1, "template": agents},
        ],
    }


def _jobset(plan: KubePlan) -> Manifest:
    spec = _jobset_spec(plan)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _queued(plan, plan.name),
        "spec": spec,
    }


def _plain_job(plan: KubePlan, role: Role) -> Manifest:
    name = f"{plan.name}-{role}"
    # Kueue sees two Jobs, and could admit one without the other: only the one with the GPUs waits in its queue.
    metadata, spec = (
        (_queued(plan, name), _agents_job(plan)) if role == "agents" else (plan.metadata(name), _supervisor_job(plan))
    )
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _runtime(plan: KubePlan) -> Manifest:
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": plan.metadata(plan.name),
        "spec": {"mlPolicy": {"numNodes": plan.agents}, "template": {"spec": _jobset_spec(plan)}},
    }


def _train_job(plan: KubePlan) -> Manifest:
    runtime = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": plan.name}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _queued(plan, plan.name),
        "spec": {"runtimeRef": runtime, "trainer": {"numNodes": plan.agents}},
    }


def _queued(plan: KubePlan, name: str) -> dict[str, Any]:
    metadata = plan.metadata(name)
    if plan.kubernetes.queue:
        metadata["labels"] = {**plan.labels(), QUEUE_LABEL: plan.kubernetes.queue}
    return metadata
