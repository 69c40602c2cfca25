"""`everstep submit --cluster kubernetes` and its companions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import get_args

from cluster.backend import JobRequest, JobStatus, NodeStatus
from cluster.kube_calls import (
    CONFLICT,
    FORBIDDEN,
    MERGE_PATCH,
    NOT_FOUND,
    KubeApi,
    KubeError,
)
from cluster.kube_client import KubeClient
from cluster.kube_key import new_key_files, secret
from cluster.kube_manifests import manifests, render
from cluster.kube_marks import is_cordoned, mark, unmark
from cluster.kube_names import LABEL_RUN, KubeKind
from cluster.kube_paths import all_paths, path_of, path_to, workload_path
from cluster.kube_plan import KubePlan
from cluster.kube_pods import Manifest
from cluster.kube_views import is_over, job_status, node_status
from cluster.rundir import safe_name
from configs.profile import ClusterProfile

_GONE_TIMEOUT_S = 60.0
_POLL_S = 0.5
_PATCH_TRIES = 5
_PAGE = "500"
_FOREGROUND = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
"""An object stays, marked, until its pods are gone."""
_BACKGROUND = {**_FOREGROUND, "propagationPolicy": "Background"}
_NOT_SEEN_YET = "must be created before"
"""Kubeflow's Trainer says so of a runtime that is there, until its own view of the cluster has caught up."""
_SEEN_TRIES = 10

logger = logging.getLogger("everstep.kubernetes")


class KubeBackend:
    """See `cluster.backend.Backend`. A job's name is `kind/name`. All calls raise KubeError, an OSError, with the
    server's own words; ValueError where there is no way to a cluster."""

    def __init__(self, profile: ClusterProfile, open_api: Callable[[str], KubeApi] = KubeClient) -> None:
        self.profile = profile
        self.open_api = open_api
        self._api: KubeApi | None = None

    @property
    def api(self) -> KubeApi:
        """Opened when it is first needed: a dry run needs none."""
        if self._api is None:
            self._api = self.open_api(self.profile.kubernetes.context)
        return self._api

    def render(self, request: JobRequest) -> str:
        """All that is applied, but the Secret, of which it says how it is made."""
        return render(KubePlan.of(request))

    def submit(self, request: JobRequest) -> str:
        """Make the Secret and all objects; if one is refused, take back those that were made before it."""
        plan = KubePlan.of(request)
        self._make_room(plan)
        made: list[Manifest] = []
        try:
            for manifest in (secret(plan, new_key_files()), *manifests(plan)):
                self._put(manifest)
                made.append(manifest)
        except KubeError:
            self._take_back(made)
            raise
        return f"{plan.kind}/{plan.name}"

    def status(self, job_id: str) -> JobStatus:
        """What the workload's conditions and its pods say."""
        kind, name = _split(job_id)
        workload = self._find(workload_path(kind, self._namespace, name))
        if workload is None:
            return JobStatus("unknown", f"{job_id} is not in namespace {self._namespace}")
        return job_status(workload, self._list("Pod", self._namespace, f"{LABEL_RUN}={name}"))

    def cancel(self, job_id: str) -> None:
        """Delete the workload and what was made for it: its pods save and leave in their grace time."""
        kind, name = _split(job_id)
        self._delete_all(kind, self._namespace, name)

    def drain(self, node: str, reason: str) -> None:
        """Cordon, and taint as the profile says; pods that run there go on."""
        self._patch_node(node, lambda found: mark(found, reason, self.profile.kubernetes.bad_node == "taint"))

    def readmit(self, node: str) -> None:
        """Take back what Everstep did to it. ValueError if somebody else cordoned it: that is for them to undo."""
        found = self._patch_node(node, unmark)
        if is_cordoned(found):
            raise ValueError(f"{node} is cordoned, and not by everstep; who did it may say: kubectl uncordon {node}")

    def nodes(self) -> Sequence[NodeStatus]:
        """All nodes of the cluster."""
        return tuple(node_status(each) for each in self._list("Node", ""))

    # What it needs ------------------------------------------------------------------------------------------------

    @property
    def _namespace(self) -> str:
        return self.profile.kubernetes.namespace

    def _make_room(self, plan: KubePlan) -> None:
        """The run's last workload may be there still; one that is over makes way, with all that was made for it."""
        for kind in get_args(KubeKind):
            path = workload_path(kind, plan.namespace, plan.name)
            found = self._find(path, or_hidden=kind != plan.kind)
            if found is None or _is_made_by_another(found):
                continue
            if not _is_run(found, plan.name):
                raise KubeError(_not_ours(path, plan), CONFLICT)
            if not found["metadata"].get("deletionTimestamp") and not is_over(found):
                state = job_status(found, ()).detail
                raise KubeError(
                    f"{kind}/{plan.name} is there already, in namespace {plan.namespace} ({state}): "
                    f"`everstep cancel {plan.config.run.name}` first, or choose another run.name",
                    CONFLICT,
                )
            deleted = self._delete_all(kind, plan.namespace, plan.name)
            deadline_s = time.monotonic() + _GONE_TIMEOUT_S
            for each in deleted:
                self._await_gone(each, deadline_s)

    def _delete_all(self, kind: KubeKind, namespace: str, name: str) -> Sequence[str]:
        """Delete a workload and what was made for it; returns what was there."""
        paths = all_paths(kind, namespace, name)
        # Jobs stay until their pods are gone, which may still save; nothing depends on the others.
        return [path for path in paths if self._delete(path, name, _FOREGROUND if _has_pods(path) else _BACKGROUND)]

    def _await_gone(self, path: str, deadline_s: float) -> None:
        while self._find(path) is not None:
            if time.monotonic() > deadline_s:
                raise KubeError(f"{path} is still being deleted; submit again when it is gone", CONFLICT)
            time.sleep(_POLL_S)

    def _put(self, manifest: Manifest) -> None:
        """Create an object; one that an earlier submission of the run left is replaced, any other is a conflict."""
        try:
            self._post(manifest)
        except KubeError as error:
            if error.status != CONFLICT:
                raise
            path = path_of(manifest)
            found = self._find(path)
            name = manifest["metadata"]["labels"][LABEL_RUN]
            if found is None or not _is_run(found, name):
                raise
            if found["metadata"].get("deletionTimestamp"):
                self._await_gone(path, time.monotonic() + _GONE_TIMEOUT_S)
                self._post(manifest)
                return
            metadata = {**manifest["metadata"], "resourceVersion": found["metadata"].get("resourceVersion")}
            self.api.call("PUT", path, {**manifest, "metadata": metadata})

    def _post(self, manifest: Manifest) -> None:
        for attempt in range(_SEEN_TRIES):
            try:
                self.api.call("POST", path_of(manifest, collection=True), manifest)
                return
            except KubeError as error:
                if _NOT_SEEN_YET not in str(error) or attempt == _SEEN_TRIES - 1:
                    raise
                time.sleep(_POLL_S)

    def _take_back(self, made: Sequence[Manifest]) -> None:
        for manifest in reversed(made):
            try:
                self._delete(path_of(manifest), manifest["metadata"]["labels"][LABEL_RUN], _BACKGROUND)
            except KubeError as error:
                logger.warning("%s may be left over: %s", path_of(manifest), error)

    def _find(self, path: str, or_hidden: bool = False) -> Manifest | None:
        """The object, or None; None too where the cluster has no such kind. or_hidden: and where we may not look."""
        try:
            return self.api.call("GET", path)
        except KubeError as error:
            if error.status == NOT_FOUND or (or_hidden and error.status == FORBIDDEN):
                return None
            raise

    def _list(self, kind: str, namespace: str, selector: str = "") -> list[Manifest]:
        items: list[Manifest] = []
        more = ""
        while True:
            wanted = {"limit": _PAGE, "labelSelector": selector, "continue": more}
            query = {name: value for name, value in wanted.items() if value}
            answer = self.api.call("GET", path_to("v1", kind, namespace, query=query))
            items += answer.get("items") or ()
            more = answer.get("metadata", {}).get("continue", "")
            if not more:
                return items

    def _delete(self, path: str, name: str, options: Manifest) -> bool:
        """Delete what is there and is of this run; what this user may not even see was not made by them. Whether it was
        there."""
        try:
            found = self._find(path)
            if found is None or not _is_run(found, name):
                return False
            if not found["metadata"].get("deletionTimestamp"):
                self.api.call("DELETE", path, options)
            return True
        except KubeError as error:
            if error.status == NOT_FOUND or (error.status == FORBIDDEN and "rbac.authorization" in path):
                return False
            raise

    def _patch_node(self, node: str, patch: Callable[[Manifest], Manifest | None]) -> Manifest:
        """Patch a node as it stands, again if it changed meanwhile; returns it as it stands then."""
        path = path_to("v1", "Node", "", safe_name(node, "node"))
        for attempt in range(_PATCH_TRIES):
            found = self._find(path)
            if found is None:
                raise ValueError(f"the cluster has no node {node!r}; `everstep nodes --cluster kubernetes` lists them")
            change = patch(found)
            if change is None:
                return found
            try:
                return self.api.call("PATCH", path, change, MERGE_PATCH)
            except KubeError as error:
                if error.status != CONFLICT or attempt == _PATCH_TRIES - 1:
                    raise
        raise AssertionError("the last try returns or raises")


def _split(job_id: str) -> tuple[KubeKind, str]:
    kind, _, name = job_id.partition("/")
    if kind not in get_args(KubeKind) or not name:
        raise ValueError(f"{job_id!r} is no job on Kubernetes; submission.json of the run is damaged")
    return kind, safe_name(name, "job")  # type: ignore[return-value]


def _is_run(found: Manifest, name: str) -> bool:
    return (found["metadata"].get("labels") or {}).get(LABEL_RUN) == name


def _is_made_by_another(found: Manifest) -> bool:
    """Whether a controller made it, and takes it away with what it made it of: the JobSet of a TrainJob, say."""
    return any(each.get("controller") for each in found["metadata"].get("ownerReferences") or ())


def _has_pods(path: str) -> bool:
    return path.split("/")[-2] in ("jobs", "jobsets", "trainjobs")


def _not_ours(path: str, plan: KubePlan) -> str:
    return f"{path} is there, and not of run {plan.config.run.name}; choose another run.name"
