"""Where objects are on an API server. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

from cluster.kube_names import KubeKind
from cluster.kube_pods import Manifest

_PLURALS = {
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "ConfigMap": "configmaps",
    "Job": "jobs",
    "JobSet": "jobsets",
    "NetworkPolicy": "networkpolicies",
    "Node": "nodes",
    "Pod": "pods",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "Secret": "secrets",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "TrainJob": "trainjobs",
    "TrainingRuntime": "trainingruntimes",
}


def path_to(api_version: str, kind: str, namespace: str, name: str = "", query: Mapping[str, str] | None = None) -> str:
    """The path of an object, or without a name that of all of its kind. namespace "": of the whole cluster."""
    root = "/api/v1" if api_version == "v1" else f"/apis/{api_version}"
    there = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
    one = f"/{quote(name, safe='')}" if name else ""
    return f"{root}{there}/{_PLURALS[kind]}{one}" + (f"?{urlencode(query)}" if query else "")


def path_of(manifest: Manifest, collection: bool = False) -> str:
    """The path of this object, or the one it is created at."""
    metadata = manifest["metadata"]
    name = "" if collection else metadata["name"]
    return path_to(manifest["apiVersion"], manifest["kind"], metadata.get("namespace", ""), name)


def workload_path(kind: KubeKind, namespace: str, name: str) -> str:
    """The path of what stands for the whole job: where there are two Jobs, that of the agents, whose policy ends it."""
    match kind:
        case "jobset":
            return path_to("jobset.x-k8s.io/v1alpha2", "JobSet", namespace, name)
        case "job":
            return path_to("batch/v1", "Job", namespace, f"{name}-agents")
        case "trainjob":
            return path_to("trainer.kubeflow.org/v1alpha1", "TrainJob", namespace, name)


def all_paths(kind: KubeKind, namespace: str, name: str) -> Sequence[str]:
    """All that may have been made for a workload, itself first."""
    rbac = "rbac.authorization.k8s.io/v1"
    shared = f"everstep-{namespace}-{name}"
    more = {
        "jobset": (),
        "job": (path_to("batch/v1", "Job", namespace, f"{name}-supervisor"), path_to("v1", "Service", namespace, name)),
        "trainjob": (path_to("trainer.kubeflow.org/v1alpha1", "TrainingRuntime", namespace, name),),
    }
    return (
        workload_path(kind, namespace, name),
        *more[kind],
        path_to("v1", "Secret", namespace, f"{name}-key"),
        path_to("v1", "ConfigMap", namespace, f"{name}-job"),
        path_to("policy/v1", "PodDisruptionBudget", namespace, name),
        path_to("networking.k8s.io/v1", "NetworkPolicy", namespace, name),
        path_to(rbac, "RoleBinding", namespace, name),
        path_to(rbac, "Role", namespace, name),
        path_to(rbac, "ClusterRoleBinding", "", shared),
        path_to(rbac, "ClusterRole", "", shared),
        path_to("v1", "ServiceAccount", namespace, name),
    )
