"""Pods whose node the run has given up: they are deleted, so that the Job makes others in their place.

A pod on a dead node cannot end, and while it has not failed the Job makes no other. Once the cluster says that the node
is dead, the pod is declared failed, as the cluster's own garbage collector would, and deleted without a grace time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import msgspec

from cluster.kube_calls import CONFLICT, NOT_FOUND, STRATEGIC_PATCH, KubeApi, KubeError
from cluster.kube_nodes import NodeView, PodView
from cluster.kube_paths import path_to
from cluster.kube_pods import Manifest

_AGAIN_S = (1.0, 60.0)
_LOOK_AGAIN_S = 5.0
_REASON = "EverstepNodeLost"

logger = logging.getLogger("everstep.kubernetes")


class _Release(msgspec.Struct):
    pod: str
    uid: str
    due_s: float
    asked: bool = False
    failures: int = 0


class Releases:
    """What is to be deleted. `add` and `keep` may be called from any thread, `tick` from one.

    pod_of, node_of: how a pod and a node stand now; None: there is none.
    """

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        pod_of: Callable[[str], PodView | None],
        node_of: Callable[[str], NodeView | None],
    ) -> None:
        self.api = api
        self.namespace = namespace
        self.pod_of = pod_of
        self.node_of = node_of
        self._lock = threading.Lock()
        self._waiting: dict[str, _Release] = {}

    def add(self, pod: str, uid: str, due_s: float) -> None:
        """Delete this pod at due_s (monotonic), unless it is kept before."""
        with self._lock:
            self._waiting.setdefault(uid, _Release(pod, uid, due_s))

    def keep(self, uid: str) -> None:
        """This pod is of use again."""
        with self._lock:
            self._waiting.pop(uid, None)

    def keep_all(self) -> None:
        """None is deleted that is not already: the run ends or begins anew, and they are its own."""
        with self._lock:
            self._waiting = {uid: each for uid, each in self._waiting.items() if each.asked}

    def __contains__(self, uid: str) -> bool:
        with self._lock:
            return uid in self._waiting

    def tick(self, now_s: float) -> None:
        """Delete what is due. Never raises what the server may do: it is tried again."""
        with self._lock:
            due = [each for each in self._waiting.values() if each.due_s <= now_s]
        for each in due:
            try:
                gone = self._see_to(each, now_s)
            except KubeError as error:
                gone = error.status in (NOT_FOUND, CONFLICT)  # gone, or another one of that name
                each.failures += 1
                each.due_s = now_s + min(_AGAIN_S[0] * 2**each.failures, _AGAIN_S[1])
                if not gone and each.failures in (1, 8):
                    logger.warning("pod %s is not deleted yet: %s", each.pod, error)
            if gone:
                self.keep(each.uid)

    def _see_to(self, each: _Release, now_s: float) -> bool:
        """Whether it is gone."""
        pod = self.pod_of(each.pod)
        if pod is None or pod.uid != each.uid:
            return True
        node = self.node_of(pod.node)
        if node is not None and node.dead:
            if not pod.over:
                logger.warning("pod %s cannot end, as its node %s is dead: it is declared failed", pod.name, pod.node)
                self.api.call("PATCH", f"{self._path(pod)}/status", _failed(pod), STRATEGIC_PATCH)
            self.api.call("DELETE", self._path(pod), _options(each.uid, grace_s=0))
            each.asked, each.due_s = True, now_s + _LOOK_AGAIN_S
        elif not each.asked and not pod.deleting:
            logger.info("pod %s on %s is deleted: the run has given the node up", pod.name, pod.node)
            self.api.call("DELETE", self._path(pod), _options(each.uid))
            each.asked = True
        return False

    def _path(self, pod: PodView) -> str:
        return path_to("v1", "Pod", self.namespace, pod.name)


def _options(uid: str, grace_s: int | None = None) -> Manifest:
    """Only this pod, and not one that has its name since."""
    grace = {} if grace_s is None else {"gracePeriodSeconds": grace_s}
    return {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}, **grace}


def _failed(pod: PodView) -> Manifest:
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": _REASON,
        "message": f"everstep: node {pod.node} is dead, and the run goes on without it",
    }
    return {"metadata": {"uid": pod.uid}, "status": {"phase": "Failed", "conditions": [condition]}}
