"""What a job becomes on Kubernetes, decided and checked once; every manifest is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import msgspec

from cluster.backend import JobRequest
from cluster.kube_names import ANNOTATION_RUN, LABEL_ROLE, LABEL_RUN, OWN_VARIABLES, KubeKind, Role, object_name
from cluster.rundir import safe_name
from configs.profile import ClusterProfile
from configs.profile_kubernetes import KubernetesProfile
from configs.schema import JobConfig

JOB_FOLDER = "/etc/everstep/job"
JOB_FILE = f"{JOB_FOLDER}/job.toml"
KEY_FOLDER = "/etc/everstep/key"
_MARGIN_S = 10
"""Between the end of the time in which a job saves, and that of its pods."""
_SUPERVISOR_LONGER_S = 15


@dataclass(frozen=True)
class KubePlan:
    """A job's place in a cluster. name: of its objects; config: the job's as pods see it, with their run.dir."""

    name: str
    config: JobConfig
    profile: ClusterProfile

    @classmethod
    def of(cls, request: JobRequest) -> KubePlan:
        """Check what only both together, job and profile, show.

        Raises:
            ValueError: naming the key, its value and the fix.
        """
        kubernetes, config = request.profile.kubernetes, request.config
        if not kubernetes.image:
            raise ValueError('kubernetes.image = "": name the image that has Everstep in it, in a file for --profile')
        where = kubernetes.run_dir or config.run.dir
        config = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, dir=where))
        _check_run_dir(where, kubernetes)
        for name in request.profile.variables:
            if name in OWN_VARIABLES:
                raise ValueError(f"environment.{name}: everstep sets it in each pod; remove it from the profile")
        needed_s = config.cluster.leave_timeout_s + _MARGIN_S
        if kubernetes.grace_s < needed_s:
            raise ValueError(
                f"kubernetes.grace_s = {kubernetes.grace_s}: saving may take cluster.leave_timeout_s = "
                f"{config.cluster.leave_timeout_s:g}; set kubernetes.grace_s to {needed_s:.0f} or more"
            )
        return cls(object_name(safe_name(config.run.name, "run.name")), config, request.profile)

    @property
    def kubernetes(self) -> KubernetesProfile:
        """The profile's section."""
        return self.profile.kubernetes

    @property
    def namespace(self) -> str:
        return self.kubernetes.namespace

    @property
    def kind(self) -> KubeKind:
        return self.kubernetes.kind

    @property
    def agents(self) -> int:
        """Pods that train or stand by."""
        return self.config.cluster.nodes + self.config.cluster.spares

    @property
    def run_dir(self) -> str:
        """The run's folder, as pods see it."""
        return str(PurePosixPath(self.config.run.dir) / self.config.run.name)

    @property
    def own_account(self) -> bool:
        """Whether submit makes a ServiceAccount with its roles for this job."""
        return not self.kubernetes.service_account

    @property
    def account(self) -> str:
        """The supervisor's ServiceAccount."""
        return self.kubernetes.service_account or self.name

    @property
    def cluster_role(self) -> str:
        """Name of what is not in a namespace."""
        return f"everstep-{self.namespace}-{self.name}"

    def grace_s(self, role: Role) -> int:
        """How long a pod may take to end. The supervisor's is the last to go."""
        return self.kubernetes.grace_s + (_SUPERVISOR_LONGER_S if role == "supervisor" else 0)

    def labels(self, role: Role | None = None) -> dict[str, str]:
        """What everything of the run has; with a role, what its pods have."""
        common = {"app.kubernetes.io/name": "everstep", "app.kubernetes.io/managed-by": "everstep"}
        return {**common, **self.selector(role)}

    def selector(self, role: Role | None = None) -> dict[str, str]:
        """What the run's pods are found by."""
        return {LABEL_RUN: self.name, **({LABEL_ROLE: role} if role else {})}

    def metadata(self, name: str, namespaced: bool = True) -> dict[str, object]:
        """Of an object of the run."""
        there = {"namespace": self.namespace} if namespaced else {}
        annotations = {ANNOTATION_RUN: self.config.run.name}
        return {"name": name, **there, "labels": self.labels(), "annotations": annotations}


def _check_run_dir(path: str, kubernetes: KubernetesProfile) -> None:
    where = PurePosixPath(path)
    if not where.is_absolute() or ".." in where.parts:
        raise ValueError(
            f"run.dir = {path!r}: pods need an absolute path without '..'; set kubernetes.run_dir in the profile to a "
            "folder on one of kubernetes.mounts"
        )
    homes = [mount for mount in kubernetes.mounts if where.is_relative_to(mount.path)]
    if not homes:
        have = ", ".join(mount.path for mount in kubernetes.mounts) or "none"
        raise ValueError(
            f"run.dir = {path!r}: is on no volume that pods share (kubernetes.mounts has {have}); set "
            "kubernetes.run_dir to a folder on one"
        )
    if max(homes, key=lambda mount: len(mount.path)).read_only:
        raise ValueError(f"run.dir = {path!r}: its volume is read_only in kubernetes.mounts; take another")
