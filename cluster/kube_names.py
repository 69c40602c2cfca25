"""Names that manifests, the scheduler inside the cluster and pods agree on: labels, annotations, taints, variables."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from cluster.rundir import safe_name

Role = Literal["agents", "supervisor"]
KubeKind = Literal["jobset", "job", "trainjob"]

LABEL_RUN = "everstep.dev/run"
"""On everything of a run, pods included; its value is the workload's name (`object_name`)."""
LABEL_ROLE = "everstep.dev/role"
"""On pods: "agents" or "supervisor"."""
ANNOTATION_RUN = "everstep.dev/run-name"
"""On the workload: the run's name as the user wrote it."""

TAINT_BAD = "everstep.dev/bad"
"""On a node that a run evicted; the effect is NoSchedule, the reason stands in ANNOTATION_REASON."""
TAINT_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
OUT_OF_SERVICE_VALUE = "everstep"
"""Value of that taint where it is ours to take away again."""
ANNOTATION_REASON = "everstep.dev/reason"
"""On a node that is out of work because of us: why, in a line that begins with `everstep:`."""
ANNOTATION_CORDONED = "everstep.dev/cordoned"
"""On a node that we cordoned ("true"): it was not before, so `readmit` may uncordon it."""

POD_NAME = "EVERSTEP_POD_NAME"
POD_UID = "EVERSTEP_POD_UID"
NODE_NAME = "EVERSTEP_NODE_NAME"
NAMESPACE = "EVERSTEP_KUBE_NAMESPACE"
WORKLOAD = "EVERSTEP_KUBE_NAME"
KIND = "EVERSTEP_KUBE_KIND"
DOMAIN_LABEL = "EVERSTEP_KUBE_DOMAIN_LABEL"
OWN_VARIABLES = (POD_NAME, POD_UID, NODE_NAME, NAMESPACE, WORKLOAD, KIND, DOMAIN_LABEL)
"""Variables of the pods. All have the first three; the others are the supervisor's."""

_LONGEST_NAME = 40  # a JobSet's pod is called <name>-supervisor-0-0-xxxxx, and has no more than 63 characters
_PLAIN = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


class Inside(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor's pod knows of itself. name: the workload's; domain_label: a label of nodes, "" for none."""

    namespace: str
    name: str
    kind: KubeKind
    pod_name: str
    pod_uid: str
    node_name: str
    domain_label: str


def inside(environ: Mapping[str, str]) -> Inside:
    """Read it from the pod's environment.

    Raises:
        ValueError: if this process does not run in such a pod.
    """
    missing = [name for name in (NAMESPACE, WORKLOAD, KIND, POD_NAME, POD_UID, NODE_NAME) if not environ.get(name)]
    if missing:
        raise ValueError(
            f'cluster.backend = "kubernetes", but {", ".join(missing)} is not set: this is no pod of ours; '
            "`everstep submit --cluster kubernetes` makes one"
        )
    kind = environ[KIND]
    if kind not in ("jobset", "job", "trainjob"):
        raise ValueError(f"{KIND} = {kind!r}: must be jobset, job or trainjob")
    return Inside(
        namespace=environ[NAMESPACE],
        name=environ[WORKLOAD],
        kind=kind,  # type: ignore[arg-type]
        pod_name=environ[POD_NAME],
        pod_uid=environ[POD_UID],
        node_name=environ[NODE_NAME],
        domain_label=environ.get(DOMAIN_LABEL, ""),
    )


def object_name(run: str) -> str:
    """What a run's objects are called in its namespace: its own name if Kubernetes takes that, else one made of it.

    Different runs get different names. ValueError if it is no name of a run.
    """
    if _PLAIN.fullmatch(safe_name(run, "run.name")) and "--" not in run:
        return run
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[: _LONGEST_NAME - len("r---") - len(digest)].strip("-")
    return f"r-{slug}--{digest}"
