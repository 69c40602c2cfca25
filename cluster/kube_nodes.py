"""Pods and nodes as far as the scheduler needs them, read from their objects. Pure.

A node's name in the run is that of the Kubernetes node its pod is on: what `kubectl`, the history of nodes and
`everstep nodes` call it. A pod that replaces another one on the same node is the same node with a new agent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from cluster.kube_marks import reason_of
from cluster.kube_names import OUT_OF_SERVICE_VALUE, TAINT_OUT_OF_SERVICE
from cluster.kube_pods import Manifest
from health.kube_conditions import ANNOTATIONS, Condition, Standing, Taint, troubles
from health.verdict import Cause, Certainty, Severity

_INDEX = "batch.kubernetes.io/job-completion-index"
_LONGEST_NAME = 100
_OVER = ("Succeeded", "Failed")


class PodView(msgspec.Struct, frozen=True, kw_only=True):
    """An agent's pod. index: its completion index, -1 for none. why_pending: what the scheduler says of it."""

    name: str
    uid: str
    node: str
    phase: str
    index: int = -1
    deleting: bool = False
    conditions: tuple[Condition, ...] = ()
    why_pending: str = ""

    @property
    def runs(self) -> bool:
        """Whether an agent may be started in it."""
        return self.phase == "Running" and not self.deleting and bool(self.node)

    @property
    def over(self) -> bool:
        """Whether no process of it is left."""
        return self.phase in _OVER


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node. ready: the status of its condition Ready. ours: why Everstep took it out of work, "" if it did not."""

    name: str
    ready: str = "Unknown"
    conditions: tuple[Condition, ...] = ()
    taints: tuple[Taint, ...] = ()
    annotations: Mapping[str, str] = {}
    cordoned: bool = False
    ours: str = ""
    domain: str = ""

    @property
    def dead(self) -> bool:
        """Whether the cluster does not hear of it, or somebody has declared it dead. A kubelet that says that it is not
        ready is there, and ends its pods itself."""
        return self.ready == "Unknown" or self.dead_by_declaration

    @property
    def dead_by_declaration(self) -> bool:
        """Whether somebody has declared it out of service."""
        return any(taint.key == TAINT_OUT_OF_SERVICE for taint in self.taints)

    @property
    def declared_dead_by_us(self) -> bool:
        """Whether the taint that says so is ours to take away."""
        return any((each.key, each.value) == (TAINT_OUT_OF_SERVICE, OUT_OF_SERVICE_VALUE) for each in self.taints)


def agent_name(node: str) -> str:
    """What a Kubernetes node is called in the run: its own name, shortened where that would make paths too long."""
    if len(node) <= _LONGEST_NAME:
        return node
    digest = hashlib.sha256(node.encode()).hexdigest()[:12]
    return f"{node[: _LONGEST_NAME - len(digest) - 1].rstrip('.-')}-{digest}"


def read_pod(pod: Manifest) -> PodView:
    """A pod. KeyError for what is none."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    conditions = _conditions(status)
    index = (metadata.get("annotations") or {}).get(_INDEX) or (metadata.get("labels") or {}).get(_INDEX) or "-1"
    pending = [each.message or each.reason for each in conditions if each.type == "PodScheduled"]
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        node=(pod.get("spec") or {}).get("nodeName") or "",
        phase=status.get("phase") or "Pending",
        index=int(index) if index.isdigit() else -1,
        deleting=bool(metadata.get("deletionTimestamp")),
        conditions=tuple(each for each in conditions if each.type == "DisruptionTarget"),
        why_pending=pending[0] if pending else "",
    )


def read_node(node: Manifest, domain_label: str) -> NodeView:
    """A node. domain_label: of what its failure domain is made, "" for nothing. KeyError for what is none."""
    metadata, spec = node["metadata"], node.get("spec") or {}
    conditions = _conditions(node.get("status") or {})
    annotations = metadata.get("annotations") or {}
    taints = tuple(Taint(each["key"], each.get("value") or "", each.get("effect") or "")
                   for each in spec.get("taints") or ())  # fmt: skip
    return NodeView(
        name=metadata["name"],
        ready=next((each.status for each in conditions if each.type == "Ready"), "Unknown"),
        conditions=conditions,
        taints=taints,
        annotations={key: annotations[key] for key in ANNOTATIONS if key in annotations},
        cordoned=bool(spec.get("unschedulable", False)),
        ours=reason_of(node),
        domain=(metadata.get("labels") or {}).get(domain_label, "") if domain_label else "",
    )


def by_agent(pods: Iterable[PodView]) -> dict[str, PodView]:
    """The pod of each node of the run: the one that runs, if there are several."""
    found: dict[str, PodView] = {}
    for pod in sorted(pods, key=lambda each: (each.runs, not each.over, not each.deleting)):
        if pod.node:
            found[agent_name(pod.node)] = pod
    return found


def startable(pods: Iterable[PodView], nodes: Mapping[str, NodeView], up: Mapping[str, str]) -> list[str]:
    """Nodes that agents may be started on, in the order of their pods; those that nothing new should run on come last,
    and those that would be given up at once (`doomed`) are left out.

    up: by pod, the uid under which its entry has said that it is there.
    """
    there = [pod for pod in by_agent(pods).values() if pod.runs and up.get(pod.name) == pod.uid]
    there = [pod for pod in there if not doomed(pod, nodes.get(pod.node))]

    def order(pod: PodView) -> tuple[bool, int, str]:
        node = nodes.get(pod.node)
        return (node is not None and node.cordoned, pod.index, pod.node)

    return [agent_name(pod.node) for pod in sorted(there, key=order)]


def doomed(pod: PodView, node: NodeView | None) -> bool:
    """Whether an agent that is started there would have to go at once: the node is dead, will be taken away, or is
    proven bad."""
    return (node is not None and node.dead) or any(
        each.severity is Severity.NODE and (each.cause is Cause.PREEMPTED or each.certainty is Certainty.PROOF)
        for each in troubles(standing(pod, node))
    )


def standing(pod: PodView, node: NodeView | None) -> Standing:
    """Both, as they are judged."""
    name = agent_name(pod.node)
    if node is None:
        return Standing(node=name, pod=pod.conditions)
    return Standing(
        node=name,
        conditions=node.conditions,
        taints=node.taints,
        annotations=node.annotations,
        cordoned=node.cordoned,
        ours=node.ours,
        pod=pod.conditions,
    )


def why_missing(pods: Sequence[PodView]) -> str:
    """Why not all pods run, in the words of whoever keeps them from it."""
    waiting = [pod for pod in pods if not pod.runs and not pod.over]
    words = sorted({pod.why_pending for pod in waiting if pod.why_pending})
    return f"{len(waiting)} pods do not run" + (f": {'; '.join(words)[:300]}" if words else "")


def _conditions(status: Manifest) -> tuple[Condition, ...]:
    return tuple(
        Condition(each["type"], each.get("status") or "Unknown", each.get("reason") or "", each.get("message") or "")
        for each in status.get("conditions") or ()
    )
