"""Taking a node out of work, and giving it back: what to patch, from how the node stands. Pure.

Only what is ours is undone. A node that somebody else cordoned stays cordoned.
"""

from __future__ import annotations

import re
from typing import Any

from cluster.kube_names import (
    ANNOTATION_CORDONED,
    ANNOTATION_REASON,
    OUT_OF_SERVICE_VALUE,
    TAINT_BAD,
    TAINT_OUT_OF_SERVICE,
)
from cluster.kube_pods import Manifest

OURS = "everstep:"
"""How every reason of ours begins."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")
_LONGEST_REASON = 1000
_OURS_OUT = (TAINT_OUT_OF_SERVICE, OUT_OF_SERVICE_VALUE)


def mark(node: Manifest, reason: str, taint: bool, out_of_service: bool = False) -> Manifest:
    """A merge patch that cordons a node, with the reason; against a stale node the server refuses it (409).

    taint: also keep off what tolerates a cordon. out_of_service: the node is dead, and its pods may be taken for gone.
    """
    annotations: dict[str, str | None] = {ANNOTATION_REASON: as_written(reason)}
    if not node.get("spec", {}).get("unschedulable", False):
        annotations[ANNOTATION_CORDONED] = "true"
    taints = _taints(node)
    keys = {each.get("key") for each in taints}
    if taint and TAINT_BAD not in keys:
        taints.append({"key": TAINT_BAD, "value": "true", "effect": "NoSchedule"})
    if out_of_service and TAINT_OUT_OF_SERVICE not in keys:
        taints.append({"key": TAINT_OUT_OF_SERVICE, "value": OUT_OF_SERVICE_VALUE, "effect": "NoExecute"})
    return _patch(node, annotations, {"unschedulable": True, "taints": taints})


def as_written(reason: str) -> str:
    """A reason as it stands in the annotation."""
    said = _CONTROL.sub(" ", reason).strip()[:_LONGEST_REASON]
    return said if said.startswith(OURS) else f"{OURS} {said}"


def unmark(node: Manifest) -> Manifest | None:
    """A merge patch that takes back all of ours; None if there is nothing."""
    annotations, taints = node.get("metadata", {}).get("annotations") or {}, _taints(node)
    left = [each for each in _without(taints, TAINT_BAD) if (each.get("key"), each.get("value")) != _OURS_OUT]
    if not is_ours(node) and left == taints:
        return None
    spec: dict[str, Any] = {"taints": left}
    if annotations.get(ANNOTATION_CORDONED) == "true":
        spec["unschedulable"] = False
    return _patch(node, {ANNOTATION_REASON: None, ANNOTATION_CORDONED: None}, spec)


def in_service(node: Manifest) -> Manifest | None:
    """A merge patch that takes back only that a node is out of service, since it answers; None if we did not say so."""
    taints = _taints(node)
    left = [each for each in taints if (each.get("key"), each.get("value")) != _OURS_OUT]
    return None if left == taints else _patch(node, {}, {"taints": left})


def is_ours(node: Manifest) -> bool:
    """Whether the node is out of work because of us."""
    return bool(reason_of(node))


def reason_of(node: Manifest) -> str:
    """Why we took it out of work; "" if we did not."""
    said = (node.get("metadata", {}).get("annotations") or {}).get(ANNOTATION_REASON, "")
    return said if said.startswith(OURS) else ""


def is_cordoned(node: Manifest) -> bool:
    """Whether nothing new is scheduled there, whoever said so."""
    return bool(node.get("spec", {}).get("unschedulable", False))


def _taints(node: Manifest) -> list[dict[str, Any]]:
    return list(node.get("spec", {}).get("taints") or ())


def _without(taints: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [each for each in taints if each.get("key") != key]


def _patch(node: Manifest, annotations: dict[str, str | None], spec: dict[str, Any]) -> Manifest:
    # With its version: the list of taints is replaced as a whole, and somebody else may be adding one now.
    version = node.get("metadata", {}).get("resourceVersion")
    seen = {"resourceVersion": version} if version else {}
    return {"metadata": {**seen, "annotations": annotations}, "spec": spec}
