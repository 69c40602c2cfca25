"""How a workload and nodes stand, read from their objects. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.backend import JobStatus, NodeStatus
from cluster.kube_marks import is_cordoned, reason_of
from cluster.kube_names import LABEL_ROLE
from cluster.kube_pods import Manifest

_DONE = ("Complete", "Completed")


def job_status(workload: Manifest, pods: Sequence[Manifest]) -> JobStatus:
    """Of a JobSet, a TrainJob, or the agents' Job; pods are all of the run's."""
    true = {each["type"]: each for each in _conditions(workload) if each.get("status") == "True"}
    if workload["metadata"].get("deletionTimestamp"):
        return JobStatus("cancelled", "it is being deleted; its pods save and leave")
    if any(kind in true for kind in _DONE):
        return JobStatus("done", "completed")
    if "Failed" in true:
        return JobStatus("failed", _words(true["Failed"]))
    if workload.get("spec", {}).get("suspend"):
        return JobStatus("pending", "suspended; its queue has not admitted it, or has taken its nodes back")
    return _under_way(pods)


def is_over(workload: Manifest) -> bool:
    """Whether it has come to an end, and may be replaced."""
    return job_status(workload, ()).state in ("done", "failed")


def node_status(node: Manifest) -> NodeStatus:
    """As `kubectl get nodes` says it, with why."""
    ready = next((each for each in _conditions(node) if each.get("type") == "Ready"), None)
    words = {"True": "ready", "False": "not ready"}
    state = words.get(ready["status"], "unknown") if ready else "unknown"
    taints = [each.get("key", "") for each in node.get("spec", {}).get("taints") or ()]
    if is_cordoned(node):
        state += ",cordoned"
    reason = reason_of(node) or (_words(ready) if ready and state.startswith(("not", "unknown")) else "")
    return NodeStatus(
        node["metadata"]["name"],
        state,
        reason or ", ".join(f"taint {key}" for key in taints if key != "node.kubernetes.io/unschedulable"),
        bool(reason_of(node)),
    )


def _under_way(pods: Sequence[Manifest]) -> JobStatus:
    agents = [pod for pod in pods if _role(pod) == "agents"]
    running = [pod for pod in agents if _phase(pod) == "Running"]
    nodes = tuple(sorted({pod["spec"]["nodeName"] for pod in running if pod.get("spec", {}).get("nodeName")}))
    supervised = any(_role(pod) == "supervisor" and _phase(pod) == "Running" for pod in pods)
    why = next((_words(each) for pod in pods for each in _conditions(pod) if _unschedulable(each)), "")
    detail = f"{len(running)} of {len(agents)} agents' pods run" + ("" if supervised else ", the supervisor's does not")
    return JobStatus("running" if supervised and running else "pending", detail + (f"; {why}" if why else ""), nodes)


def _unschedulable(condition: Manifest) -> bool:
    return condition.get("type") == "PodScheduled" and condition.get("status") == "False"


def _conditions(obj: Manifest) -> Sequence[Manifest]:
    return obj.get("status", {}).get("conditions") or ()


def _words(condition: Manifest) -> str:
    return str(condition.get("message") or condition.get("reason") or "without a word")


def _role(pod: Manifest) -> str:
    return str((pod["metadata"].get("labels") or {}).get(LABEL_ROLE, ""))


def _phase(pod: Manifest) -> str:
    return str(pod.get("status", {}).get("phase", "")) if not pod["metadata"].get("deletionTimestamp") else "Ending"
