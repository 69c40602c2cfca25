"""The two kinds of pod that a job has: agents, one a node, and the supervisor. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.kube_names import (
    DOMAIN_LABEL,
    KIND,
    LABEL_ROLE,
    LABEL_RUN,
    NAMESPACE,
    NODE_NAME,
    POD_NAME,
    POD_UID,
    WORKLOAD,
    Role,
)
from cluster.kube_plan import JOB_FILE, JOB_FOLDER, KEY_FOLDER, KubePlan
from configs.profile_kubernetes import Toleration, read_toleration

Manifest = dict[str, Any]

SCRATCH = "/scratch"
"""A folder of the pod's own, for whatever needs one."""
_HOST = "kubernetes.io/hostname"
# An agent whose node the cluster has lost sight of may train on: whether it is lost, heartbeats say. A supervisor
# whose node is gone is replaced soon.
_AGENT_UNREACHABLE_S = 600
_SUPERVISOR_UNREACHABLE_S = 15
_MODE_OWNER_READS = 0o400


def container_name(plan: KubePlan, role: Role) -> str:
    """Kubeflow's trainer knows the container of a node by its name."""
    if role == "supervisor":
        return "supervisor"
    return "node" if plan.kind == "trainjob" else "agent"


def pod_template(plan: KubePlan, role: Role) -> Manifest:
    """The template of a Job's pods."""
    kubernetes = plan.kubernetes
    supervisor = role == "supervisor"
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": supervisor,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": plan.grace_s(role),
        "securityContext": _pod_security(plan),
        "tolerations": _tolerations(plan, role),
        "affinity": _affinity(plan, role),
        "containers": [_container(plan, role)],
        "volumes": _volumes(plan, role),
    }
    if supervisor:
        spec["serviceAccountName"] = plan.account
    if plan.kind == "job":
        spec["subdomain"] = plan.name
    if kubernetes.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if kubernetes.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in kubernetes.image_pull_secrets]
    if kubernetes.priority_class:
        spec["priorityClassName"] = kubernetes.priority_class
    if selector := kubernetes.supervisor_selector if supervisor else kubernetes.node_selector:
        spec["nodeSelector"] = dict(selector)
    return {"metadata": {"labels": plan.labels(role)}, "spec": spec}


def _container(plan: KubePlan, role: Role) -> Manifest:
    kubernetes = plan.kubernetes
    container: Manifest = {
        "name": container_name(plan, role),
        "image": kubernetes.image,
        "imagePullPolicy": kubernetes.image_pull_policy,
        "command": [_unexpanded(word) for word in _command(plan, role)],
        "env": [*_own_variables(plan, role), *_variables(plan)],
        "resources": _resources(plan, role),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": kubernetes.read_only_root,
            "capabilities": {
                "drop": ["ALL"],
                **({"add": list(kubernetes.capabilities)} if kubernetes.capabilities and role == "agents" else {}),
            },
        },
        "volumeMounts": _mounts(plan, role),
    }
    if kubernetes.working_dir:
        container["workingDir"] = kubernetes.working_dir
    if kubernetes.secret_env:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in kubernetes.secret_env]
    return container


def _command(plan: KubePlan, role: Role) -> Sequence[str]:
    python = plan.profile.python or "python"
    if role == "supervisor":
        return (python, "-m", "cluster.kube_run", JOB_FILE, KEY_FOLDER)
    return (python, "-m", "cluster.kube_pod", plan.run_dir, KEY_FOLDER)


def _own_variables(plan: KubePlan, role: Role) -> Sequence[Manifest]:
    fields = {POD_NAME: "metadata.name", POD_UID: "metadata.uid", NODE_NAME: "spec.nodeName"}
    values = {"HOME": SCRATCH, "TMPDIR": SCRATCH, "PYTHONUNBUFFERED": "1"}
    if role == "supervisor":
        fields |= {NAMESPACE: "metadata.namespace"}
        values |= {WORKLOAD: plan.name, KIND: plan.kind, DOMAIN_LABEL: plan.kubernetes.domain_label}
    return [
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        *({"name": name, "value": value} for name, value in values.items() if name not in plan.profile.variables),
    ]


def _variables(plan: KubePlan) -> Sequence[Manifest]:
    return [{"name": name, "value": _unexpanded(value)} for name, value in plan.profile.variables.items()]


def _unexpanded(text: str) -> str:
    """Kubernetes replaces `$(NAME)` in commands and variables; `$$` stands for `$`."""
    return text.replace("$", "$$")


def _resources(plan: KubePlan, role: Role) -> Manifest:
    kubernetes = plan.kubernetes
    if role == "supervisor":
        # Not bounded in its CPU: it is idle but when something fails, and then it must be quick.
        amounts = {"cpu": kubernetes.supervisor_cpu, "memory": kubernetes.supervisor_memory}
        limits = {"memory": kubernetes.supervisor_memory}
    else:
        gpus = {kubernetes.gpu_resource: str(kubernetes.gpus_per_node)} if kubernetes.gpus_per_node else {}
        amounts = {"cpu": kubernetes.cpu, "memory": kubernetes.memory, **gpus, **kubernetes.resources}
        limits = amounts
    return {"requests": _given(amounts), "limits": _given(limits)}


def _given(amounts: Mapping[str, str]) -> dict[str, str]:
    return {name: amount for name, amount in amounts.items() if amount}


def _volumes(plan: KubePlan, role: Role) -> Sequence[Manifest]:
    shm: Manifest = {"medium": "Memory"}
    if role == "agents" and plan.kubernetes.shm_size:
        shm["sizeLimit"] = plan.kubernetes.shm_size
    key = {"secretName": f"{plan.name}-key", "defaultMode": _MODE_OWNER_READS}
    volumes: list[Manifest] = [
        {"name": "key", "secret": key},
        {"name": "shm", "emptyDir": shm},
        {"name": "scratch", "emptyDir": {}},
    ]
    if role == "supervisor":
        volumes.append({"name": "job", "configMap": {"name": f"{plan.name}-job"}})
    for index, mount in enumerate(plan.kubernetes.mounts):
        claim = {"persistentVolumeClaim": {"claimName": mount.claim}}
        source: Manifest = claim if mount.claim else {"hostPath": {"path": mount.host_path}}
        volumes.append({"name": f"mount-{index}", **source})
    return volumes


def _mounts(plan: KubePlan, role: Role) -> Sequence[Manifest]:
    mounts: list[Manifest] = [
        {"name": "key", "mountPath": KEY_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "scratch", "mountPath": SCRATCH},
    ]
    if role == "supervisor":
        mounts.append({"name": "job", "mountPath": JOB_FOLDER, "readOnly": True})
    for index, mount in enumerate(plan.kubernetes.mounts):
        only = {"readOnly": True} if mount.read_only else {}
        mounts.append({"name": f"mount-{index}", "mountPath": mount.path, **only})
    return mounts


def _pod_security(plan: KubePlan) -> Manifest:
    user, group = plan.kubernetes.run_as_user, plan.kubernetes.fs_group
    common = {"runAsNonRoot": user != 0, "runAsUser": user, "seccompProfile": {"type": "RuntimeDefault"}}
    if user == 0:
        # Root needs no group to read the key, which then stays closed to all others.
        return common
    # A volume with years of snapshots on it is not walked through each time that a pod starts.
    return {**common, "runAsGroup": group, "fsGroup": group, "fsGroupChangePolicy": "OnRootMismatch"}


def _tolerations(plan: KubePlan, role: Role) -> Sequence[Manifest]:
    wait_s = _SUPERVISOR_UNREACHABLE_S if role == "supervisor" else _AGENT_UNREACHABLE_S
    lost = [
        {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": wait_s}
        for state in ("not-ready", "unreachable")
    ]
    read = [read_toleration(text) for text in plan.kubernetes.tolerations]
    return [*(_toleration(each) for each in read if each is not None), *lost]


def _toleration(toleration: Toleration) -> Manifest:
    exists = {"operator": "Exists"} if toleration.value is None else {"operator": "Equal", "value": toleration.value}
    return {"key": toleration.key, **exists, **({"effect": toleration.effect} if toleration.effect else {})}


def _affinity(plan: KubePlan, role: Role) -> Manifest:
    ours = {"labelSelector": {"matchLabels": plan.selector("agents")}}
    if role == "supervisor":
        # A node that takes its ranks with it should not take the supervisor too.
        away = {"weight": 100, "podAffinityTerm": {**ours, "topologyKey": _HOST}}
        return {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [away]}}
    required: list[Manifest] = [{**ours, "topologyKey": _HOST}]
    affinity: Manifest = {}
    if plan.kubernetes.topology_key:
        # All of us in one domain, and nobody else's agents in it. JobSet has an annotation for that, but it keeps the
        # supervisor's pod out of the domain too, and places no follower any more once the pod of index 0 has failed.
        domain = plan.kubernetes.topology_key
        others = {
            "matchLabels": {LABEL_ROLE: "agents"},
            "matchExpressions": [{"key": LABEL_RUN, "operator": "NotIn", "values": [plan.name]}],
        }
        required.append({"labelSelector": others, "namespaceSelector": {}, "topologyKey": domain})
        together = [{**ours, "topologyKey": domain}]
        affinity["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": together}
    affinity["podAntiAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": required}
    return affinity
