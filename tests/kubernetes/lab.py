"""A Kubernetes on one machine: an API server, controllers, and nodes whose kubelets run pods as real processes."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from tests.kubernetes import rbac
from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.controller import PODS, condition, reconcile
from tests.kubernetes.kubelet import Kubelet
from tests.kubernetes.nodes import NODES, NodeControllers
from tests.kubernetes.store import Object, Store

_TICK_S = 0.05
_POLL_S = 0.05
_GRACE_S = 6.0
"""More than the jobs' own time for heartbeats, as it is on a real cluster (40 s and more)."""


class Lab:
    """See the module. A context manager: whatever happens in between, no process is left.

    Controllers and kubelets use the store directly, with its versions and refusals; clients use HTTP, with a user.
    """

    def __init__(self, home: Path, nodes: Mapping[str, Mapping[str, str]]) -> None:
        self.home = home
        self.store = Store()
        self.server = ApiServer(self.store)
        self.controllers = NodeControllers(self.store, _GRACE_S)
        self.kubelets: dict[str, Kubelet] = {}
        self._labels = dict(nodes)
        self._begun = 0
        self._scratch = tempfile.TemporaryDirectory(prefix="kube-")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controllers", daemon=True)

    def __enter__(self) -> Lab:
        self.server.__enter__()
        for node in self._labels:
            self.power_on(node)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(5)
        for kubelet in self.kubelets.values():
            kubelet.lose_power()
        self.server.__exit__(kind, error, at)
        self._scratch.cleanup()

    # What an administrator can see and do -------------------------------------------------------------------------

    def kubeconfig(self, user: str = rbac.ADMIN) -> Path:
        """A file with the way to this cluster."""
        path = self.home / f"{user.replace(':', '-')}.kubeconfig"
        path.write_text(self.server.kubeconfig(user))
        path.chmod(0o600)
        return path

    def node(self, name: str) -> Object:
        """A node as it stands."""
        return self.store.get(NODES, "", name)

    def taints(self, name: str) -> set[tuple[str, str]]:
        """The taints of a node: key and effect."""
        return {(each["key"], each["effect"]) for each in self.node(name)["spec"].get("taints") or ()}

    def pods(self, role: str) -> dict[str, Object]:
        """Pods of ours that are not over, by node."""
        return {
            pod["spec"].get("nodeName", pod["metadata"]["name"]): pod
            for pod in self.store.list(PODS)
            if pod["metadata"]["labels"].get("everstep.dev/role") == role
            and pod["status"].get("phase") in ("Pending", "Running")
        }

    def set_condition(self, node: str, kind: str, reason: str, message: str, status: str = "True") -> None:
        """As something that looks after nodes would."""
        others = [each for each in self.node(node)["status"]["conditions"] if each["type"] != kind]
        conditions = [*others, condition(kind, reason, message, status)]
        self.store.merge(NODES, "", node, {"status": {"conditions": conditions}})

    # What may happen to a node ------------------------------------------------------------------------------------

    def power_on(self, node: str) -> None:
        """Start the node's kubelet; whatever ran there before is gone."""
        self._begun += 1
        folder = self.home / "nodes" / f"{node}-{self._begun}"
        kubelet = Kubelet(
            self.store, node, folder, Path(self._scratch.name), self._heard, self._account, self._labels[node]
        )  # fmt: skip
        kubelet.register()
        kubelet.start()
        self.kubelets[node] = kubelet

    def power_off(self, node: str) -> None:
        """The node loses power, and with it its memory."""
        self.kubelets[node].lose_power()

    def repair(self) -> None:
        """Delete all jobs, and make every node as new."""
        for resource in ("jobsets.jobset.x-k8s.io", "jobs.batch"):
            for each in self.store.list(resource):
                self.store.delete(resource, each["metadata"]["namespace"], each["metadata"]["name"])
        for node, kubelet in self.kubelets.items():
            if not kubelet.is_alive():
                self.power_on(node)
        for pod in self.store.list(PODS):
            self.store.delete(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], grace_s=0)
        self.wait_until(lambda: not self.store.list(PODS), "an end of all pods", 20)
        for node in self._labels:
            self.store.update(NODES, "", node, lambda old: {
                **old, "spec": {}, "metadata": {**old["metadata"], "annotations": {}},
                "status": {"conditions": [condition("Ready", "KubeletReady", "")]},
            })  # fmt: skip

    def wait_until(self, true: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for a condition; what it is, and what pods print, are said if it does not come true."""
        deadline_s = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{what} did not happen in {timeout_s:g} s:\n{self.said()}")
            time.sleep(_POLL_S)

    def said(self) -> str:
        """How pods stand, and the last that each printed."""
        lines: list[str] = []
        for log in sorted((self.home / "nodes").glob("*/*/log")):
            lines += [f"--- {log.parent.name}", *log.read_text(errors="replace").splitlines()[-15:]]
        lines += [
            f"{pod['metadata']['name']} on {pod['spec'].get('nodeName')}: {pod['status']['phase']}, "
            f"{pod['metadata'].get('deletionTimestamp')}"
            for pod in self.store.list(PODS)
        ]
        return "\n".join(lines)

    # The inside ---------------------------------------------------------------------------------------------------

    def _heard(self, node: str) -> None:
        self.controllers.heard_s[node] = time.monotonic()

    def _account(self, pod: Object) -> str:
        name = pod["spec"].get("serviceAccountName", "default")
        return self.server.kubeconfig(rbac.account(pod["metadata"]["namespace"], name))

    def _run(self) -> None:
        while not self._stop.wait(_TICK_S):
            reconcile(self.store)
            self.controllers.reconcile(time.monotonic())
