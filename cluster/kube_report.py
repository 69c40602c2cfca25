"""Bad nodes are told to the cluster: cordoned and tainted, with the reason; and dead ones declared out of service."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import msgspec

from cluster.kube_calls import CONFLICT, FORBIDDEN, MERGE_PATCH, NOT_FOUND, KubeApi, KubeError
from cluster.kube_marks import OURS, as_written, in_service, mark, reason_of
from cluster.kube_nodes import NodeView, read_node
from cluster.kube_paths import path_to
from cluster.kube_pods import Manifest
from health.kube_conditions import is_quarantined
from health.verdict import Cause

_TRIES = 5
_LOST = f"{OURS} {Cause.NODE_LOST.value}"
_AGAIN_S = (1.0, 60.0)
_DEAD_WITHIN_S = 900.0
"""A node that is not ready for the first time later than this after it was reported is being repaired, not lost."""

logger = logging.getLogger("everstep.kubernetes")


class _Report(msgspec.Struct):
    node: str
    reason: str
    reported_s: float
    due_s: float
    marked: bool = False
    failures: int = 0

    @property
    def lost(self) -> bool:
        """Whether the node was not heard: only then may it be declared dead."""
        return self.reason.startswith(_LOST)


class Reports:
    """What was reported. `add` may be called from any thread, `tick` from one.

    taint: not only cordon a node, but taint it too, and a dead one so that whatever ran there is given up. node_of: how
    a node stands now, None if that is not known.
    """

    def __init__(self, api: KubeApi, taint: bool, node_of: Callable[[str], NodeView | None]) -> None:
        self.api = api
        self.taint = taint
        self.node_of = node_of
        self._lock = threading.Lock()
        self._reports: dict[str, _Report] = {}

    def add(self, node: str, reason: str, now_s: float) -> None:
        """This node is bad. now_s: monotonic."""
        with self._lock:
            self._reports[node] = _Report(node, reason, now_s, now_s)

    def withdraw(self, node: str) -> None:
        """The node works for us again. What is written on it stays, for whoever takes it back."""
        with self._lock:
            self._reports.pop(node, None)

    def tick(self, now_s: float) -> None:
        """Do what there is to do. Never raises what the server may do: it is tried again."""
        with self._lock:
            due = [each for each in self._reports.values() if each.due_s <= now_s]
        for each in due:
            try:
                over = self._see_to(each, now_s)
            except KubeError as error:
                over = self._failed(each, error, now_s)
            if over:
                with self._lock:
                    if self._reports.get(each.node) is each:
                        del self._reports[each.node]

    def _failed(self, each: _Report, error: KubeError, now_s: float) -> bool:
        """Whether it is of no use to try again."""
        if error.status == NOT_FOUND:
            return True
        if error.status == FORBIDDEN:
            logger.warning(
                "Kubernetes was not told that %s is bad (%s): %s; give the ServiceAccount `patch` on nodes, or set "
                'kubernetes.bad_node = "none"', each.node, each.reason, error,
            )  # fmt: skip
            return True
        each.failures += 1
        each.due_s = now_s + min(_AGAIN_S[0] * 2**each.failures, _AGAIN_S[1])
        if each.failures in (1, 8):
            logger.warning("Kubernetes is not told yet that %s is bad: %s", each.node, error)
        return False

    def _see_to(self, each: _Report, now_s: float) -> bool:
        """Whether there is nothing left to be done about it."""
        if not each.marked:
            if not self._patch(each.node, lambda node: self._mark(node, each)):
                logger.warning("%s is bad (%s); NVSentinel has it in hand already", each.node, each.reason)
                return True
            logger.warning("told Kubernetes to keep new work off %s: %s", each.node, each.reason)
            each.marked, each.failures = True, 0
        if not self.taint:
            return True
        node = self.node_of(each.node)
        if node is not None and node.ready == "True" and node.declared_dead_by_us:
            logger.warning("%s answers again: it is out of service no more, but stays cordoned", each.node)
            self._patch(each.node, in_service)
        elif node is not None and node.ready == "Unknown" and not node.dead_by_declaration:
            # Whoever took our mark away meanwhile has the node now.
            if not each.lost or not self._patch(each.node, lambda found: self._mark_again(found, each)):
                return True
            logger.warning("%s is dead: what ran there is given up (%s)", each.node, each.reason)
        return now_s - each.reported_s > _DEAD_WITHIN_S and not (node is not None and node.declared_dead_by_us)

    def _mark(self, node: Manifest, each: _Report) -> Manifest | None:
        seen = read_node(node, "")
        if is_quarantined(seen.annotations):
            return None
        dead = self.taint and each.lost and seen.ready == "Unknown"
        return mark(node, each.reason, self.taint, out_of_service=dead)

    def _mark_again(self, node: Manifest, each: _Report) -> Manifest | None:
        with self._lock:
            stands = self._reports.get(each.node) is each
        return self._mark(node, each) if stands and reason_of(node) == as_written(each.reason) else None

    def _patch(self, name: str, change: Callable[[Manifest], Manifest | None]) -> bool:
        """Patch a node as it stands, again if it changed meanwhile; False if there is nothing to change."""
        path = path_to("v1", "Node", "", name)
        for attempt in range(_TRIES):
            patch = change(self.api.call("GET", path))
            if patch is None:
                return False
            try:
                self.api.call("PATCH", path, patch, MERGE_PATCH)
                return True
            except KubeError as error:
                if error.status != CONFLICT or attempt == _TRIES - 1:
                    raise
        raise AssertionError("the last try returns or raises")
