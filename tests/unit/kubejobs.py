"""Jobs for tests of Kubernetes: requests, plans, and what their manifests mean."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cluster.backend import JobRequest
from cluster.kube_key import new_key_files
from cluster.kube_plan import KubePlan
from cluster.kube_pod import Pod
from configs.load import load_job
from configs.profile import ClusterProfile
from configs.profile_kubernetes import KubernetesProfile, Mount

WITHIN_S = 20.0
POD = Pod("demo-agents-0-1-abcde", "uid-1", "node7")
RUNS = Mount(path="/runs", claim="runs")
SITE = KubernetesProfile(image="registry.example/everstep:1", mounts=(RUNS,), run_dir="/runs")
FULL = msgspec.structs.replace(
    SITE,
    service_account="",
    queue="train",
    priority_class="high",
    topology_key="example.com/rack",
    domain_label="topology.kubernetes.io/zone",
    node_selector={"example.com/gpu": "h100"},
    supervisor_selector={"example.com/pool": "cpu"},
    tolerations=("nvidia.com/gpu:NoSchedule", "dedicated=training:NoExecute", "any"),
    gpus_per_node=8,
    cpu="96",
    memory="1Ti",
    resources={"rdma/hca": "8"},
    shm_size="512Gi",
    working_dir="/srv",
    secret_env=("wandb",),
    image_pull_secrets=("registry",),
    mounts=(RUNS, Mount(path="/data", host_path="/mnt/data", read_only=True)),
)
_WORDS = "--run.name demo --cluster.backend kubernetes --cluster.nodes 2 --cluster.ranks_per_node 1 --cluster.spares 1"
_JOB = load_job("debug_dense", _WORDS.split())


def request(profile: KubernetesProfile = SITE, name: str = "demo", **more: object) -> JobRequest:
    """A request for two nodes and a spare. more: of the whole profile."""
    config = msgspec.structs.replace(_JOB, run=msgspec.structs.replace(_JOB.run, name=name))
    whole = msgspec.convert({**more, "kubernetes": profile}, ClusterProfile, from_attributes=True)
    return JobRequest("job.toml", (), config, whole, Path("runs") / name, Path("/home"))


def plan(profile: KubernetesProfile = SITE, name: str = "demo", **more: object) -> KubePlan:
    """The plan of such a request."""
    return KubePlan.of(request(profile, name, **more))


def jobs_of(workload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The specs of a workload's Jobs, by role."""
    match workload["kind"]:
        case "Job":
            return {workload["metadata"]["name"].rpartition("-")[2]: workload["spec"]}
        case "JobSet":
            return {each["name"]: each["template"]["spec"] for each in workload["spec"]["replicatedJobs"]}
        case "TrainingRuntime":
            return jobs_of({"kind": "JobSet", "spec": workload["spec"]["template"]["spec"]})
    return {}


def expanded(text: str, environ: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command, or of a variable."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else environ.get(found[1], found[0]),
        text,
    )


def action_of(policy: dict[str, Any], code: int, disrupted: bool = False) -> str:
    """What a Job does with a failed pod, as the API says it: the first rule that fits, else it counts."""
    for rule in policy["rules"]:
        if codes := rule.get("onExitCodes"):
            if (code in codes["values"]) == (codes["operator"] == "In"):
                return str(rule["action"])
        elif disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]:
            return str(rule["action"])
    return "Count"


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector takes an object with these labels."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    found = []
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] in ("In", "NotIn")
        found.append((labels.get(each["key"]) in each["values"]) == (each["operator"] == "In"))
    return all(found)


def eventually(true: Callable[[], object]) -> None:
    """Wait until it is."""
    deadline_s = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def key_folder(at: Path) -> Path:
    """A job's key, as a pod has it mounted."""
    at.mkdir(mode=0o700)
    for name, content in new_key_files().items():
        (at / name).write_bytes(content)
        (at / name).chmod(0o400)
    return at
