"""`[kubernetes]` of a site's profile, and what may stand in it: names as Kubernetes takes them, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from configs.errors import Problem
from configs.schema import NonNegative, Section

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,499}")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|[MGTPE]i?)?")
_PATH = re.compile(r"/[A-Za-z0-9._/@+-]*")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_LONGEST_NAME = 253
# Set for the run's own labels; others of that prefix would be taken for them.
_OURS = "everstep.dev/"
TAKEN = ("/etc/everstep", "/dev/shm", "/scratch")
"""Where pods have something of ours."""


class Mount(Section, frozen=True, kw_only=True):
    """`[[kubernetes.mounts]]`: a volume, and where every pod sees it.

    Either claim, a PersistentVolumeClaim that many nodes may write (ReadWriteMany), or host_path, a folder of each
    node: a file system that all nodes have mounted there, or a disk of their own.
    """

    path: str
    claim: str = ""
    host_path: str = ""
    read_only: bool = False


class KubernetesProfile(Section, frozen=True, kw_only=True):
    """`[kubernetes]`: what this site's pods want.

    context is one of the kubeconfig's ("": the current one). kind: what is made of a job: a JobSet, two plain Jobs, or
    a TrainJob with its runtime. service_account: the supervisor's; "" has submit make one, with the roles it needs,
    for each job. queue is a Kueue LocalQueue. topology_key: a node label; the agents of a job get one domain of it for
    themselves. domain_label: a node label; nodes that agree in it fail together. tolerations are `key=value:Effect`.

    gpus_per_node, cpu, memory, resources (any others) are an agent's, with node_selector; supervisor_cpu,
    supervisor_memory and supervisor_selector those of the supervisor's pod, which needs no GPU. shm_size bounds
    /dev/shm, where snapshots live ("": the pod's memory does).

    run_dir: where pods keep runs, on one of mounts ("": the job's run.dir). working_dir: what relative paths of the
    job begin at ("": the image's). secret_env: Secrets of which every key becomes a variable of all pods.

    run_as_user, fs_group: whose processes they are, and the group of their volumes. capabilities: added to none at all;
    only root has what is added, so they need run_as_user = 0.
    grace_s: how long a pod may take to save and leave. bad_node: what is done to a node that is evicted as bad;
    with none, nothing keeps the Job from making the next pod there.
    """

    namespace: str = "default"
    context: str = ""
    kind: Literal["jobset", "job", "trainjob"] = "jobset"
    image: str = ""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    service_account: str = "everstep"
    queue: str = ""
    priority_class: str = ""
    topology_key: str = ""
    domain_label: str = ""
    node_selector: dict[str, str] = msgspec.field(default_factory=dict)
    supervisor_selector: dict[str, str] = msgspec.field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    gpu_resource: str = "nvidia.com/gpu"
    gpus_per_node: NonNegative = 0
    cpu: str = ""
    memory: str = ""
    resources: dict[str, str] = msgspec.field(default_factory=dict)
    supervisor_cpu: str = "1"
    supervisor_memory: str = "2Gi"
    shm_size: str = ""
    mounts: tuple[Mount, ...] = ()
    run_dir: str = ""
    working_dir: str = ""
    secret_env: tuple[str, ...] = ()
    host_network: bool = False
    run_as_user: NonNegative = 1000
    fs_group: NonNegative = 1000
    capabilities: tuple[Literal["IPC_LOCK", "SYS_PTRACE", "SYS_NICE", "SYS_RESOURCE"], ...] = ()
    read_only_root: bool = True
    grace_s: Annotated[int, msgspec.Meta(ge=1, le=86400)] = 120
    bad_node: Literal["taint", "cordon", "none"] = "taint"


class Toleration(msgspec.Struct, frozen=True):
    """One of a profile's tolerations, read. value None: any; effect "": any."""

    key: str
    value: str | None
    effect: str


def read_toleration(text: str) -> Toleration | None:
    """`key`, `key=value`, `key:Effect` or `key=value:Effect`; None if it is none of them."""
    rest, colon, effect = text.partition(":")
    key, equals, value = rest.partition("=")
    good = _is_key(key) and _VALUE.fullmatch(value) and (effect in _EFFECTS if colon else True)
    return Toleration(key, value if equals else None, effect) if good else None


def check_kubernetes(profile: KubernetesProfile) -> Iterator[Problem]:
    """Everything in the section that Kubernetes would refuse, or that could mean something else in a manifest."""
    yield from _check_names(profile)
    yield from _check_labels(profile)
    yield from _check_amounts(profile)
    if profile.capabilities and profile.run_as_user != 0:
        # Kubernetes takes it, but gives a process of any other user none of them: it has no ambient capabilities.
        fix = "have an effect only with run_as_user = 0; set that too, or leave them out"
        yield Problem("kubernetes.capabilities", ", ".join(profile.capabilities), fix)
    yield from _check_mounts(profile)
    for toleration in profile.tolerations:
        if read_toleration(toleration) is None:
            yield Problem("kubernetes.tolerations", toleration, 'write each as "key=value:NoSchedule"')


def _check_names(profile: KubernetesProfile) -> Iterator[Problem]:
    if not _LABEL.fullmatch(profile.namespace):
        fix = "is no name of a namespace; use lower-case letters, digits and '-', at most 63"
        yield Problem("kubernetes.namespace", profile.namespace, fix)
    if profile.image and not _IMAGE.fullmatch(profile.image):
        yield Problem("kubernetes.image", profile.image, 'is no image; write "registry/name:tag"')
    single = ("service_account", "queue", "priority_class")
    several = ("image_pull_secrets", "secret_env")
    names = [(key, value) for key in single if (value := getattr(profile, key))]
    names += [(key, value) for key in several for value in getattr(profile, key)]
    for key, value in names:
        if not _is_subdomain(value):
            fix = "is no name of an object; use lower-case letters, digits, '-' and '.'"
            yield Problem(f"kubernetes.{key}", value, fix)


def _check_labels(profile: KubernetesProfile) -> Iterator[Problem]:
    for key in ("topology_key", "domain_label"):
        if (value := getattr(profile, key)) and not _is_key(value):
            yield Problem(f"kubernetes.{key}", value, 'is no label; write "topology.kubernetes.io/zone", say')
    for key in ("node_selector", "supervisor_selector"):
        for label, value in getattr(profile, key).items():
            if not _is_key(label) or label.startswith(_OURS):
                yield Problem(f"kubernetes.{key}", label, 'is no label of nodes; write "key" = "value"')
            elif not _VALUE.fullmatch(value):
                fix = "is no label's value; use letters, digits, '-', '_' and '.', at most 63"
                yield Problem(f"kubernetes.{key}.{label}", value, fix)


def _check_amounts(profile: KubernetesProfile) -> Iterator[Problem]:
    for key in ("cpu", "memory", "supervisor_cpu", "supervisor_memory", "shm_size"):
        if (value := getattr(profile, key)) and not _QUANTITY.fullmatch(value):
            yield Problem(f"kubernetes.{key}", value, 'is no quantity; write "8", "500m" or "64Gi"')
    if not _is_key(profile.gpu_resource):
        yield Problem("kubernetes.gpu_resource", profile.gpu_resource, 'is no resource; write "nvidia.com/gpu", say')
    for name, value in profile.resources.items():
        if not _is_key(name) or not _QUANTITY.fullmatch(value):
            yield Problem(f"kubernetes.resources.{name}", value, 'write "resource" = "8"')
        elif name in ("cpu", "memory", profile.gpu_resource):
            yield Problem(f"kubernetes.resources.{name}", value, "has a key of its own; set that")


def _check_mounts(profile: KubernetesProfile) -> Iterator[Problem]:
    for key in ("run_dir", "working_dir"):
        if (path := getattr(profile, key)) and not _is_path(path):
            yield Problem(f"kubernetes.{key}", path, "must be an absolute path without '..', as pods see it")
    seen: set[str] = set()
    for index, mount in enumerate(profile.mounts):
        key = f"kubernetes.mounts[{index}]"
        if not _is_path(mount.path) or mount.path == "/":
            yield Problem(f"{key}.path", mount.path, "must be an absolute path without '..'; say where pods see it")
        elif any(f"{mount.path}/".startswith(f"{taken}/") for taken in TAKEN) or mount.path in seen:
            yield Problem(f"{key}.path", mount.path, "has something else there; take another path")
        seen.add(mount.path)
        if bool(mount.claim) == bool(mount.host_path):
            yield Problem(key, mount.claim, "needs either claim or host_path; set one of them")
        elif mount.claim and not _is_subdomain(mount.claim):
            what = "is no name of a PersistentVolumeClaim; use lower-case letters, digits, '-' and '.'"
            yield Problem(f"{key}.claim", mount.claim, what)
        elif mount.host_path and not _is_path(mount.host_path):
            yield Problem(f"{key}.host_path", mount.host_path, "must be an absolute path without '..' on the nodes")


def _is_key(text: str) -> bool:
    return bool(_KEY.fullmatch(text))


def _is_subdomain(text: str) -> bool:
    return len(text) <= _LONGEST_NAME and bool(_SUBDOMAIN.fullmatch(text))


def _is_path(path: str) -> bool:
    return bool(_PATH.fullmatch(path)) and ".." not in path.split("/") and "//" not in path
