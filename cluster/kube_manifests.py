"""Everything that is applied for a job, and as text that `kubectl apply` takes. Pure; the Secret is in `kube_key`."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.kube_names import LABEL_RUN
from cluster.kube_plan import KubePlan
from cluster.kube_pods import Manifest
from cluster.kube_rbac import account_objects
from cluster.kube_workloads import workloads
from cluster.kube_yaml import to_yaml
from configs.load import resolve_toml


def manifests(plan: KubePlan) -> Sequence[Manifest]:
    """All objects but the Secret, in the order in which they are made: what others need comes first."""
    return (*supports(plan), *workloads(plan))


def supports(plan: KubePlan) -> Sequence[Manifest]:
    """All but the workload itself."""
    made = [*account_objects(plan), _job_file(plan), _disruption_budget(plan)]
    if not plan.kubernetes.host_network:
        made.append(_network_policy(plan))
    if plan.kind == "job":
        made.append(_service(plan))
    return tuple(made)


def render(plan: KubePlan) -> str:
    """The text of `--dry-run`, which can be applied as it is, once the Secret is there."""
    name, namespace = plan.name, plan.namespace
    head = [
        f"# Everstep run {plan.config.run.name}: {plan.config.cluster.nodes} nodes train, "
        f"{plan.config.cluster.spares} stand by. Written by `everstep submit`.",
        f"# The Secret {name}-key is not shown. `everstep submit` makes it, with new keys each time. By hand:",
        f"#   python -m cluster.kube_key key/ && kubectl create secret generic {name}-key -n {namespace} "
        f"--from-file=key/ && kubectl label secret {name}-key -n {namespace} {LABEL_RUN}={name} && rm -r key/",
    ]
    return "\n".join([*head, *(f"---\n{to_yaml(each)}".rstrip("\n") for each in manifests(plan)), ""])


def _job_file(plan: KubePlan) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": plan.metadata(f"{plan.name}-job"),
        "data": {"job.toml": resolve_toml(plan.config)},
    }


def _disruption_budget(plan: KubePlan) -> Manifest:
    """Drains of nodes take one agent at a time, and the next when its successor runs."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": plan.metadata(plan.name),
        "spec": {
            # A number of pods: Kubernetes computes no share of a Job's.
            "minAvailable": plan.agents - 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": plan.selector("agents")},
        },
    }


def _network_policy(plan: KubePlan) -> Manifest:
    """Torch's connections have no key: only pods of this run get through to it."""
    ours = {"podSelector": {"matchLabels": plan.selector()}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": plan.metadata(plan.name),
        "spec": {**ours, "policyTypes": ["Ingress"], "ingress": [{"from": [ours]}]},
    }


def _service(plan: KubePlan) -> Manifest:
    """Names for pods, which a JobSet makes by itself."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": plan.metadata(plan.name),
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": plan.selector()},
    }
