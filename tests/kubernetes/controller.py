"""The controllers of Jobs and JobSets, as far as jobs of ours go: Indexed Jobs with their failure and replacement
policies, and JobSets with success and failure policies. Each looks at everything, and moves it one step on.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Sequence
from typing import Any

from tests.kubernetes.store import Object, Refused, Store, now
from tests.unit.kubejobs import action_of

JOBS, JOBSETS, PODS = "jobs.batch", "jobsets.jobset.x-k8s.io", "pods"
FINALIZER = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"


def reconcile(store: Store) -> None:
    """One look of all controllers at everything."""
    for step, resource in ((_jobset, JOBSETS), (_job, JOBS)):
        for found in store.list(resource):
            try:
                step(store, found)
            except Refused as error:
                if error.status not in (404, 409):  # changed meanwhile: it is looked at again
                    raise
    _collect_garbage(store)


# Jobs -----------------------------------------------------------------------------------------------------------------


def _job(store: Store, job: Object) -> None:
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    pods = [pod for pod in store.list(PODS, namespace) if owned_by(pod, job)]
    if job["metadata"].get("deletionTimestamp") or job["spec"].get("suspend") or finished(job):
        for pod in pods:
            _let_go(store, pod)
            if not job_over(pod) and not pod["metadata"].get("deletionTimestamp"):
                store.delete(PODS, namespace, pod["metadata"]["name"])
        return
    status = copy.deepcopy(job.get("status") or {"succeeded": [], "failed": {}})
    ended = [pod for pod in pods if _counts_as_ended(pod, job) and FINALIZER in _finalizers(pod)]
    verdict = None
    for pod in ended:
        verdict = verdict or _count(pod, job, status)
        _let_go(store, pod)
    done = len(status["succeeded"]) >= job["spec"]["completions"]
    if verdict or done:
        kind = ("Failed", *verdict) if verdict else ("Complete", "CompletionsReached", "")
        status["conditions"] = [condition(*kind)]
    if status != job.get("status"):
        store.merge(JOBS, namespace, name, {"status": status})
    if verdict or done:
        return
    busy = {index_of(pod) for pod in pods if pod not in ended and not job_over(pod) and _still_counts(pod, job)}
    for index in range(job["spec"]["completions"]):
        if index not in busy and index not in status["succeeded"]:
            _make_pod(store, job, index)


def _counts_as_ended(pod: Object, job: Object) -> bool:
    """With a failure policy, or a replacement policy `Failed`, a pod has failed when its phase says so, not before."""
    if job_over(pod):
        return True
    only_failed = "podFailurePolicy" in job["spec"] or job["spec"].get("podReplacementPolicy") == "Failed"
    return bool(pod["metadata"].get("deletionTimestamp")) and not only_failed


def _still_counts(pod: Object, job: Object) -> bool:
    return job["spec"].get("podReplacementPolicy") == "Failed" or not pod["metadata"].get("deletionTimestamp")


def _count(pod: Object, job: Object, status: Object) -> tuple[str, str] | None:
    """Take an ended pod into the books; returns why the Job has failed, if it has."""
    index = index_of(pod)
    if pod["status"].get("phase") == "Succeeded":
        if index not in status["succeeded"]:
            status["succeeded"].append(index)
        return None
    code = exit_code(pod)
    disrupted = any(each["type"] == "DisruptionTarget" for each in pod["status"].get("conditions", ()))
    policy = job["spec"].get("podFailurePolicy", {"rules": []})
    match action_of(policy, -1 if code is None else code, disrupted):
        case "FailJob":
            return "PodFailurePolicy", f"pod {pod['metadata']['name']} failed with exit code {code}"
        case "Count":
            failed = status["failed"].get(str(index), 0) + 1
            status["failed"][str(index)] = failed
            if failed > job["spec"].get("backoffLimitPerIndex", job["spec"].get("backoffLimit", 6)):
                return "BackoffLimitExceeded", "too many failures"
    return None


def _make_pod(store: Store, job: Object, index: int) -> None:
    template, name = copy.deepcopy(job["spec"]["template"]), job["metadata"]["name"]
    metadata = template.setdefault("metadata", {})
    labels = {"batch.kubernetes.io/job-name": name, "job-name": name, INDEX: str(index)}
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    metadata["annotations"] = {**metadata.get("annotations", {}), INDEX: str(index)}
    metadata |= {
        "name": f"{name}-{index}-{uuid.uuid4().hex[:5]}",
        "finalizers": [FINALIZER],
        "ownerReferences": [reference(job)],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "status": {"phase": "Pending"}}
    store.create(PODS, job["metadata"]["namespace"], pod)


def _let_go(store: Store, pod: Object) -> None:
    if FINALIZER in _finalizers(pod):
        left = [each for each in _finalizers(pod) if each != FINALIZER]
        place = (PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])
        store.merge(*place, {"metadata": {"finalizers": left}})


# JobSets --------------------------------------------------------------------------------------------------------------


def _jobset(store: Store, jobset: Object) -> None:
    namespace, name = jobset["metadata"]["namespace"], jobset["metadata"]["name"]
    jobs = {job["metadata"]["name"]: job for job in store.list(JOBS, namespace) if owned_by(job, jobset)}
    if jobset["metadata"].get("deletionTimestamp"):
        return
    if finished(jobset):
        for job in jobs.values():
            if not finished(job) and not job["metadata"].get("deletionTimestamp"):
                store.delete(JOBS, namespace, job["metadata"]["name"], finalizer="foregroundDeletion")
        return
    for replicated in jobset["spec"]["replicatedJobs"]:
        for index in range(replicated.get("replicas", 1)):
            job_name = f"{name}-{replicated['name']}-{index}"
            if job_name not in jobs:
                _make_job(store, jobset, replicated, job_name, index)
    failed = [job for job in jobs.values() if _true(job, "Failed")]
    targets = jobset["spec"].get("successPolicy", {}).get("targetReplicatedJobs") or [
        each["name"] for each in jobset["spec"]["replicatedJobs"]
    ]
    wanted = [job for job in jobs.values() if job["metadata"]["labels"][f"{_JOBSET}/replicatedjob-name"] in targets]
    if failed:
        why = failed[0]["status"]["conditions"][0]
        store.merge(JOBSETS, namespace, name, {"status": {"conditions": [
            condition("Failed", "FailedJobs", f"job {failed[0]['metadata']['name']} failed: {why.get('message')}")
        ]}})  # fmt: skip
    elif wanted and all(_true(job, "Complete") for job in wanted):
        store.merge(
            JOBSETS, namespace, name, {"status": {"conditions": [condition("Completed", "AllJobsCompleted", "")]}}
        )


_JOBSET = "jobset.sigs.k8s.io"


def _make_job(store: Store, jobset: Object, replicated: Object, name: str, index: int) -> None:
    template = copy.deepcopy(replicated["template"])
    labels = {
        f"{_JOBSET}/jobset-name": jobset["metadata"]["name"],
        f"{_JOBSET}/replicatedjob-name": replicated["name"],
        f"{_JOBSET}/job-index": str(index),
    }
    metadata = template.get("metadata", {})
    pods = template["spec"]["template"].setdefault("metadata", {})
    pods["labels"] = {**pods.get("labels", {}), **labels}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "labels": {**metadata.get("labels", {}), **labels},
            "annotations": metadata.get("annotations", {}),
            "ownerReferences": [reference(jobset)],
        },
        "spec": {**template["spec"], "suspend": bool(jobset["spec"].get("suspend"))},
    }
    store.create(JOBS, jobset["metadata"]["namespace"], job)


# Garbage --------------------------------------------------------------------------------------------------------------


def _collect_garbage(store: Store) -> None:
    """What belongs to something that is gone goes; what is deleted in the foreground waits for what belongs to it."""
    owners = {each["metadata"]["uid"]: each for resource in (JOBSETS, JOBS) for each in store.list(resource)}
    for resource in (JOBS, PODS):
        for each in store.list(resource):
            mine = [owners.get(ref["uid"]) for ref in each["metadata"].get("ownerReferences", ())]
            dying = mine and all(owner is None or owner["metadata"].get("deletionTimestamp") for owner in mine)
            if dying and not each["metadata"].get("deletionTimestamp"):
                finalizer = "foregroundDeletion" if resource == JOBS else ""
                store.delete(resource, each["metadata"]["namespace"], each["metadata"]["name"], finalizer=finalizer)
            if mine and all(owner is None for owner in mine) and resource == PODS:
                _let_go(store, each)
    for resource, owner in store.everything():
        finalizers = _finalizers(owner)
        if "foregroundDeletion" in finalizers and not _left(store, owner):
            left = [each for each in finalizers if each != "foregroundDeletion"]
            place = (resource, owner["metadata"].get("namespace", ""), owner["metadata"]["name"])
            store.merge(*place, {"metadata": {"finalizers": left}})


def _left(store: Store, owner: Object) -> list[Object]:
    return [each for resource in (JOBS, PODS) for each in store.list(resource) if owned_by(each, owner)]


# What objects say -----------------------------------------------------------------------------------------------------


def owned_by(item: Object, owner: Object) -> bool:
    """Whether it belongs to that very object."""
    return any(each["uid"] == owner["metadata"]["uid"] for each in item["metadata"].get("ownerReferences", ()))


def reference(owner: Object) -> Object:
    """The reference to an owner."""
    metadata = owner["metadata"]
    return {"kind": owner.get("kind", ""), "name": metadata["name"], "uid": metadata["uid"], "controller": True}


def condition(kind: str, reason: str, message: str, status: str = "True") -> Object:
    """A condition that has just come true."""
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}


def finished(item: Object) -> bool:
    """Whether a Job or a JobSet has come to its end."""
    return any(_true(item, kind) for kind in ("Complete", "Completed", "Failed"))


def job_over(pod: Object) -> bool:
    """Whether no process of the pod is left."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def index_of(pod: Object) -> int:
    """The pod's completion index."""
    return int(pod["metadata"]["annotations"][INDEX])


def exit_code(pod: Object) -> int | None:
    """How the pod's container ended."""
    for each in pod["status"].get("containerStatuses", ()):
        if "terminated" in each.get("state", {}):
            return int(each["state"]["terminated"]["exitCode"])
    return None


def _true(item: Object, kind: str) -> bool:
    conditions: Sequence[Any] = (item.get("status") or {}).get("conditions") or ()
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)


def _finalizers(item: Object) -> list[str]:
    return list(item["metadata"].get("finalizers") or ())
