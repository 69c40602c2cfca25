"""What Kubernetes does about nodes: pods get one, silent ones are found out, taints drive pods away, dead pods go.

Each function looks at everything, and moves it one step on. Times are monotonic seconds of the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tests.kubernetes.controller import PODS, condition, job_over
from tests.kubernetes.store import Object, Refused, Store

NODES = "nodes"
UNREACHABLE, NOT_READY = "node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
CORDONED = "node.kubernetes.io/unschedulable"
_HOST = "kubernetes.io/hostname"


class NodeControllers:
    """The scheduler, the node life cycle, the taint manager and the collector of dead pods.

    grace_s: after how much silence of its kubelet a node is unknown.
    """

    def __init__(self, store: Store, grace_s: float) -> None:
        self.store = store
        self.grace_s = grace_s
        self.heard_s: dict[str, float] = {}
        self._doomed_s: dict[str, float] = {}

    def reconcile(self, now_s: float) -> None:
        """One look at everything."""
        for step in (self._life_cycle, self._evict, self._bury, self._bind):
            try:
                step(now_s)
            except Refused as error:
                if error.status not in (404, 409):
                    raise

    def _life_cycle(self, now_s: float) -> None:
        for node in self.store.list(NODES):
            name = node["metadata"]["name"]
            self._mark_cordoned(node)
            silent = now_s - self.heard_s.get(name, now_s) > self.grace_s
            if silent and ready(node) != "Unknown":
                self._declare(node, "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.", UNREACHABLE)
            elif not silent and ready(node) == "Unknown":
                self._declare(node, "True", "KubeletReady", "kubelet is posting ready status", "")

    def _mark_cordoned(self, node: Object) -> None:
        """A node that is cordoned has a taint that says so, which goes with the cordon."""
        others = [each for each in taints(node) if each["key"] != CORDONED]
        wanted = [*others, {"key": CORDONED, "effect": "NoSchedule"}] if node["spec"].get("unschedulable") else others
        if len(wanted) != len(taints(node)):
            self.store.merge(NODES, "", node["metadata"]["name"], {"spec": {"taints": wanted}})

    def _declare(self, node: Object, status: str, reason: str, message: str, taint: str) -> None:
        name = node["metadata"]["name"]
        node = self.store.get(NODES, "", name)
        left = [each for each in taints(node) if each["key"] not in (UNREACHABLE, NOT_READY)]
        added = [{"key": taint, "effect": effect} for effect in ("NoSchedule", "NoExecute")] if taint else []
        others = [each for each in node["status"].get("conditions", ()) if each["type"] != "Ready"]
        conditions = [condition("Ready", reason, message, status), *others]
        self.store.merge(NODES, "", name, {"spec": {"taints": [*left, *added]}, "status": {"conditions": conditions}})

    def _evict(self, now_s: float) -> None:
        """Pods that do not tolerate a NoExecute taint, or not for any longer."""
        nodes = {each["metadata"]["name"]: each for each in self.store.list(NODES)}
        for pod in self.store.list(PODS):
            node, uid = nodes.get(pod["spec"].get("nodeName", "")), pod["metadata"]["uid"]
            bad = [each for each in taints(node or {}) if each["effect"] == "NoExecute"]
            allowed_s = min((_tolerated_s(pod, each) for each in bad), default=float("inf"))
            if allowed_s == float("inf") or pod["metadata"].get("deletionTimestamp") or job_over(pod):
                self._doomed_s.pop(uid, None)
            elif now_s >= self._doomed_s.setdefault(uid, now_s + allowed_s):
                disrupt(self.store, pod, "DeletionByTaintManager", f"Taint manager: deleting due to {bad[0]['key']}")
                self.store.delete(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _bury(self, now_s: float) -> None:
        """Pods that nobody can end: of nodes that are gone, or out of service and not ready."""
        nodes = {each["metadata"]["name"]: each for each in self.store.list(NODES)}
        for pod in self.store.list(PODS):
            where = pod["spec"].get("nodeName")
            if not where:
                continue
            node = nodes.get(where)
            dead = node is None or (ready(node) != "True" and any(t["key"] == OUT_OF_SERVICE for t in taints(node)))
            if dead and (node is None or pod["metadata"].get("deletionTimestamp")):
                if not job_over(pod):
                    disrupt(self.store, pod, "DeletionByPodGC", "PodGC: node is gone or out of service", phase="Failed")
                self.store.delete(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], grace_s=0)

    def _bind(self, now_s: float) -> None:
        """Give pods a node that they may be on."""
        pods, nodes = self.store.list(PODS), self.store.list(NODES)
        for pod in pods:
            if pod["spec"].get("nodeName") or pod["metadata"].get("deletionTimestamp") or job_over(pod):
                continue
            place = (PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])
            fits = [node for node in nodes if _fits(pod, node, pods)]
            if not fits:
                why = condition("PodScheduled", "Unschedulable", f"0/{len(nodes)} nodes are available", "False")
                known = pod["status"].get("conditions", ())
                if not any(each["message"] == why["message"] for each in known):
                    self.store.merge(*place, {"status": {"conditions": [why]}})
                continue
            best = min(fits, key=lambda node: (_dislikes(pod, node, pods), _load(node, pods), node["metadata"]["name"]))
            bound = self.store.merge(*place, {
                "spec": {"nodeName": best["metadata"]["name"]},
                "status": {"conditions": [condition("PodScheduled", "", "")]},
            })  # fmt: skip
            pods[pods.index(pod)] = bound


def disrupt(store: Store, pod: Object, reason: str, message: str, phase: str = "") -> None:
    """Say that a pod is ended for no fault of its own."""
    others = [each for each in pod["status"].get("conditions", ()) if each["type"] != "DisruptionTarget"]
    status = {"conditions": [*others, condition("DisruptionTarget", reason, message)]}
    if phase:
        status["phase"] = phase
    store.merge(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], {"status": status})


def ready(node: Object) -> str:
    """The status of a node's condition Ready."""
    conditions = node.get("status", {}).get("conditions", ())
    return next((str(each["status"]) for each in conditions if each["type"] == "Ready"), "Unknown")


def taints(node: Object) -> list[Object]:
    """All taints of a node."""
    return list(node.get("spec", {}).get("taints") or ())


def _tolerated_s(pod: Object, taint: Object) -> float:
    """For how long a pod tolerates a taint: 0 if not at all."""
    for each in pod["spec"].get("tolerations", ()):
        if _tolerates(each, taint):
            return float(each.get("tolerationSeconds", float("inf")))
    return 0.0


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect", taint["effect"]) != taint["effect"]:
        return False
    if toleration.get("key", taint["key"]) != taint["key"]:
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")


def _fits(pod: Object, node: Object, pods: Iterable[Object]) -> bool:
    if ready(node) != "True" or node["metadata"].get("deletionTimestamp") or node["spec"].get("unschedulable"):
        return False
    labels = node["metadata"].get("labels", {})
    if not pod["spec"].get("nodeSelector", {}).items() <= labels.items():
        return False
    hard = [each for each in taints(node) if each["effect"] in ("NoSchedule", "NoExecute")]
    if not all(any(_tolerates(t, taint) for t in pod["spec"].get("tolerations", ())) for taint in hard):
        return False
    terms = pod["spec"].get("affinity", {}).get("podAntiAffinity", {})
    required = terms.get("requiredDuringSchedulingIgnoredDuringExecution", ())
    return not any(_near(term, node, pods) for term in required)


def _dislikes(pod: Object, node: Object, pods: Iterable[Object]) -> int:
    terms = pod["spec"].get("affinity", {}).get("podAntiAffinity", {})
    preferred = terms.get("preferredDuringSchedulingIgnoredDuringExecution", ())
    return sum(int(each["weight"]) for each in preferred if _near(each["podAffinityTerm"], node, pods))


def _near(term: Mapping[str, Any], node: Object, pods: Iterable[Object]) -> bool:
    """Whether a pod that the term means is on the node; only hosts are domains here."""
    assert term["topologyKey"] == _HOST, term
    wanted = term["labelSelector"].get("matchLabels", {}).items()
    return any(
        wanted <= other["metadata"].get("labels", {}).items()
        for other in pods
        if other["spec"].get("nodeName") == node["metadata"]["name"] and not job_over(other)
    )


def _load(node: Object, pods: Iterable[Object]) -> int:
    return sum(pod["spec"].get("nodeName") == node["metadata"]["name"] and not job_over(pod) for pod in pods)
