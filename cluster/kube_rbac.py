"""What a supervisor may do on the API server: watch and replace its pods, look at nodes, and mark bad ones. Pure.

Agents have no token. Pods cannot be told apart by their labels in a Role, so this one holds for all of a namespace.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.kube_plan import KubePlan
from cluster.kube_pods import Manifest

_RBAC = "rbac.authorization.k8s.io"


def namespace_rules() -> Sequence[Manifest]:
    """In the namespace of the job. Pods of nodes that were given up are deleted, so that others are made; one on a dead
    node must be declared failed before that, or the Job waits for it."""
    return (
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "delete"]},
        {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]},
        {"apiGroups": ["jobset.x-k8s.io"], "resources": ["jobsets"], "verbs": ["get"]},
        {"apiGroups": ["trainer.kubeflow.org"], "resources": ["trainjobs"], "verbs": ["get"]},
    )


def node_rules(marks_nodes: bool) -> Sequence[Manifest]:
    """In the cluster: conditions of nodes are read. patch, to cordon and taint, only where the profile wants that."""
    verbs = ["get", "list", "watch", *(["patch"] if marks_nodes else [])]
    return ({"apiGroups": [""], "resources": ["nodes"], "verbs": verbs},)


def account_objects(plan: KubePlan) -> Sequence[Manifest]:
    """A ServiceAccount for this job alone, with its roles; nothing where the profile names one that is there."""
    if not plan.own_account:
        return ()
    subject = {"kind": "ServiceAccount", "name": plan.account, "namespace": plan.namespace}
    shared, kind = plan.cluster_role, f"{_RBAC}/v1"
    namespaced, everywhere = plan.metadata(plan.account), plan.metadata(shared, namespaced=False)
    return (
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": namespaced,
            "automountServiceAccountToken": False,
        },
        {"apiVersion": kind, "kind": "Role", "metadata": namespaced, "rules": [*namespace_rules()]},
        {
            "apiVersion": kind,
            "kind": "RoleBinding",
            "metadata": namespaced,
            "roleRef": {"apiGroup": _RBAC, "kind": "Role", "name": plan.account},
            "subjects": [subject],
        },
        {
            "apiVersion": kind,
            "kind": "ClusterRole",
            "metadata": everywhere,
            "rules": [*node_rules(plan.kubernetes.bad_node != "none")],
        },
        {
            "apiVersion": kind,
            "kind": "ClusterRoleBinding",
            "metadata": everywhere,
            "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": shared},
            "subjects": [subject],
        },
    )
