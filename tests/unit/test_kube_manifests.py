"""Promise: what is submitted to Kubernetes is valid there, says what our exit codes mean, holds the key in one place,
and nothing that a user or a site names becomes anything else in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import kubernetes_validate
import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

from cluster.backend import JobRequest
from cluster.kube_key import new_key_files, secret
from cluster.kube_manifests import manifests, render
from cluster.kube_names import KubeKind, object_name
from cluster.kube_paths import path_of, workload_path
from cluster.kube_plan import KEY_FOLDER, KubePlan
from cluster.kube_rbac import namespace_rules, node_rules
from configs.load import parse_job
from configs.profile import load_profile
from configs.profile_kubernetes import KubernetesProfile, Mount, check_kubernetes
from tests.unit.kubejobs import FULL, RUNS, SITE, action_of, expanded, jobs_of, plan, request, selects
from trainer.exits import ExitCode

ROOT = Path(__file__).parents[2]
KINDS = get_args(KubeKind)
VERSIONS = ("1.31", "1.33", kubernetes_validate.latest_version())
CUSTOM = {
    "JobSet": JobsetV1alpha2JobSet,
    "TrainJob": TrainerV1alpha1TrainJob,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
}
ROLES = ("supervisor", "agents")


def of_kind(kind: str, site: KubernetesProfile = FULL) -> KubePlan:
    """A plan of that kind of workload."""
    return plan(msgspec.structs.replace(site, kind=kind))


def jobs(made: KubePlan) -> dict[str, dict[str, Any]]:
    """The plan's two Jobs, by role."""
    found: dict[str, dict[str, Any]] = {}
    for each in manifests(made):
        found |= jobs_of(each)
    assert set(found) == set(ROLES)
    return found


def pod(made: KubePlan, role: str) -> dict[str, Any]:
    """The spec of a role's pods."""
    spec: dict[str, Any] = jobs(made)[role]["template"]["spec"]
    return spec


def texts(value: object) -> list[str]:
    """Every text in a manifest, keys too."""
    if isinstance(value, dict):
        return [text for key, each in value.items() for text in (key, *texts(each))]
    if isinstance(value, list):
        return [text for each in value for text in texts(each)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", [SITE, FULL], ids=["least", "full"])
def test_manifests_are_valid(site: KubernetesProfile, kind: str, version: str) -> None:
    """Against the schemas of these versions, no unknown fields: core objects, and the Jobs inside of the others."""
    made = of_kind(kind, site)
    for each in (secret(made, new_key_files()), *manifests(made)):
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)
    for role, spec in jobs(made).items():
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": role}, "spec": spec}
        kubernetes_validate.validate(job, version, strict=True)


def test_a_wrong_manifest_is_not_valid() -> None:
    """The schemas are strict enough to matter."""
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        "spec": jobs(of_kind("jobset"))["agents"],
    }
    job["spec"]["podFailurePolcy"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_custom_objects_are_what_their_owners_publish(kind: str) -> None:
    """JobSet's and Kubeflow's own models read them, and know every field."""
    seen = set()
    for each in manifests(of_kind(kind)):
        if each["kind"] in CUSTOM:
            seen.add(each["kind"])
            assert CUSTOM[each["kind"]].from_dict(each).to_dict() == each
    assert seen == ({"JobSet"} if kind == "jobset" else {"TrainJob", "TrainingRuntime"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_code_means_something(kind: str) -> None:
    """For good, not counted, or counted; and an eviction is nobody's fault. Done is no failure, so no rule has it."""
    policy = jobs(of_kind(kind))["agents"]["podFailurePolicy"]
    assert {code.name: action_of(policy, code) for code in ExitCode if code != ExitCode.DONE} == {
        "FAILED": "Count",
        "BAD_INPUT": "FailJob",
        "REQUEUE": "Ignore",
        "DO_NOT_RESTART": "FailJob",
        "BAD_NODE": "Count",
    }
    assert (action_of(policy, 137), action_of(policy, 137, disrupted=True)) == ("Count", "Ignore")
    assert action_of(policy, 143) == "Ignore"
    named = [code for rule in policy["rules"] for code in rule.get("onExitCodes", {}).get("values", ())]
    assert len(named) == len(set(named))
    assert set(ExitCode) - set(named) == {ExitCode.DONE}
    (name,) = {rule["onExitCodes"]["containerName"] for rule in policy["rules"] if "onExitCodes" in rule}
    assert name == pod(of_kind(kind), "agents")["containers"][0]["name"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_supervisors_successor_does_not_wait_for_a_dead_node(kind: str) -> None:
    """Its pod is replaced while the old one ends; Kubernetes takes that only without a failure policy."""
    job = jobs(of_kind(kind))["supervisor"]
    assert job["podReplacementPolicy"] == "TerminatingOrFailed"
    assert "podFailurePolicy" not in job


def test_what_ends_first_stands_for_the_whole_job() -> None:
    """The policy that knows what is for good is the agents': of two plain Jobs theirs says how the job stands."""
    made = of_kind("job")
    (path,) = [path_of(each) for each in manifests(made) if "podFailurePolicy" in each.get("spec", {})]
    assert workload_path("job", made.namespace, made.name) == path


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_what_was_asked_for(kind: str) -> None:
    """A pod for each node and spare, each on its own node; GPUs for agents, none for the supervisor."""
    made = of_kind(kind)
    job, agents, supervisor = jobs(made)["agents"], pod(made, "agents"), pod(made, "supervisor")
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (3, 3, "Indexed")
    apart = agents["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert "kubernetes.io/hostname" in [each["topologyKey"] for each in apart]
    assert agents["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert not [name for name in supervisor["containers"][0]["resources"]["limits"] if "gpu" in name]
    assert agents["nodeSelector"] != supervisor["nodeSelector"]
    assert (agents["terminationGracePeriodSeconds"], supervisor["terminationGracePeriodSeconds"]) == (120, 135)
    assert all(each["metadata"]["labels"]["everstep.dev/run"] == "demo" for each in manifests(made))


@pytest.mark.parametrize("kind", KINDS)
def test_topology_is_the_agents_alone(kind: str) -> None:
    """One domain for the agents, with no agents of others in it. The supervisor may be anywhere: in that domain, if
    the cluster has no other; JobSet's own annotation would not allow that."""
    made = of_kind(kind)
    agents, supervisor = (pod(made, role)["affinity"] for role in ("agents", "supervisor"))
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    (together,) = agents["podAffinity"][required]
    apart = [each for each in agents["podAntiAffinity"][required] if each["topologyKey"] == "example.com/rack"]
    assert together["topologyKey"] == "example.com/rack"
    ours = made.labels("agents")
    assert selects(together["labelSelector"], ours)
    assert [selects(each["labelSelector"], ours) for each in apart] == [False]
    assert [selects(each["labelSelector"], {**ours, "everstep.dev/run": "other"}) for each in apart] == [True]
    for each in (together, *agents["podAntiAffinity"][required]):
        assert not selects(each["labelSelector"], made.labels("supervisor"))
    assert required not in {**supervisor["podAntiAffinity"], **supervisor.get("podAffinity", {})}
    assert not [text for each in manifests(made) for text in texts(each) if "exclusive-topology" in text]


def test_kueue_gets_the_workload() -> None:
    """Its label is on what it admits, once, and on no part of that: a second one might be admitted alone."""
    for kind in KINDS:
        queued = [each["kind"] for each in manifests(of_kind(kind)) if "kueue.x-k8s.io/queue-name" in str(each)]
        assert queued == {"jobset": ["JobSet"], "job": ["Job"], "trainjob": ["TrainJob"]}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_is_in_its_secret_and_nowhere_else(kind: str) -> None:
    """All pods mount it, readable by their user alone; no other object, no argument and no variable has it."""
    made, files = of_kind(kind), new_key_files()
    held = json.loads(files["job.json"])
    data = secret(made, files)["data"]
    assert set(data) == {"job.json", "transfer.key"}
    shown = render(made) + json.dumps(manifests(made))
    for key in (held["server"]["secret"], held["client"]["secret"], *data.values()):
        assert key not in shown
    assert "kind: Secret" not in shown
    # One that is made by hand is known for this run's by its label, or nobody would replace or delete it.
    assert "kubectl label secret demo-key -n default everstep.dev/run=demo" in render(made)
    for role in ROLES:
        spec = pod(made, role)
        (volume,) = [each for each in spec["volumes"] if each["name"] == "key"]
        assert volume["secret"] == {"secretName": "demo-key", "defaultMode": 0o400}
        assert {"name": "key", "mountPath": KEY_FOLDER, "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert new_key_files() != files


@pytest.mark.parametrize("kind", KINDS)
def test_pods_may_do_little(kind: str) -> None:
    """No root, no privilege, no token but the supervisor's."""
    made = of_kind(kind)
    for role in ROLES:
        spec, container = pod(made, role), pod(made, role)["containers"][0]
        assert (spec["securityContext"]["runAsNonRoot"], spec["securityContext"]["runAsUser"]) == (True, 1000)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert "add" not in container["securityContext"]["capabilities"]
        assert spec["automountServiceAccountToken"] == (role == "supervisor")
    assert "serviceAccountName" not in pod(made, "agents")


def test_root_is_asked_for_by_name() -> None:
    """Then the key is closed to any group; else it is open to that of the pod alone. Only root's agents have
    capabilities, for nobody else would get them."""
    site = msgspec.structs.replace(SITE, run_as_user=0, capabilities=("IPC_LOCK",))
    root = pod(plan(site), "agents")["securityContext"]
    assert root == {"runAsNonRoot": False, "runAsUser": 0, "seccompProfile": {"type": "RuntimeDefault"}}
    held = {role: pod(plan(site), role)["containers"][0]["securityContext"]["capabilities"] for role in ROLES}
    assert held == {"agents": {"drop": ["ALL"], "add": ["IPC_LOCK"]}, "supervisor": {"drop": ["ALL"]}}
    assert not list(check_kubernetes(site))
    (problem,) = check_kubernetes(msgspec.structs.replace(site, run_as_user=1000))
    assert problem.key == "kubernetes.capabilities"
    assert pod(plan(SITE), "agents")["securityContext"]["fsGroup"] == 1000


def test_our_own_variables_are_not_a_sites() -> None:
    """They would say that a pod is another one."""
    with pytest.raises(ValueError, match=r"environment.EVERSTEP_POD_NAME: everstep sets it"):
        plan(SITE, environment={"EVERSTEP_POD_NAME": "x"})
    assert plan(SITE, environment={"EVERSTEP_FAILURE_DOMAIN": "x"})


def test_roles_are_least() -> None:
    """Nodes are patched only where the profile says so; nothing is granted on Secrets, and nothing with a star."""
    for bad_node, verbs in (("taint", {"get", "list", "watch", "patch"}), ("none", {"get", "list", "watch"})):
        made = manifests(plan(msgspec.structs.replace(FULL, bad_node=bad_node)))
        (role,) = [each for each in made if each["kind"] == "ClusterRole"]
        assert [(rule["resources"], set(rule["verbs"])) for rule in role["rules"]] == [(["nodes"], verbs)]
    (role,) = [each for each in manifests(plan(FULL)) if each["kind"] == "Role"]
    granted = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert ("pods", "delete") in granted
    changed = {(resource, verb) for resource, verb in granted if verb not in ("get", "list", "watch", "delete")}
    assert changed <= {("pods/status", "patch")}
    assert not {"*", "secrets"} & {word for pair in granted for word in pair}
    assert not [each for each in manifests(plan(SITE)) if "Role" in each["kind"] or "Account" in each["kind"]]


def test_the_base_of_a_site_has_the_same_roles() -> None:
    """What an administrator applies once grants what a job of its own account would get."""
    base = ROOT / "cluster" / "deploy" / "base"
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    found = [doc for name in listed for doc in yaml.safe_load_all((base / name).read_text())]
    roles = {each["kind"]: each for each in found if each["kind"] in ("Role", "ClusterRole")}
    assert roles["Role"]["rules"] == [*namespace_rules()]
    assert roles["ClusterRole"]["rules"] == [*node_rules(marks_nodes=True)]
    assert {each["metadata"]["name"] for each in found if each["kind"] == "ServiceAccount"} == {"everstep"}
    for each in found:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_objects(kind: str) -> None:
    """What a dry run prints is read back as exactly what is submitted, and the job in it is the job."""
    made = of_kind(kind)
    assert list(yaml.safe_load_all(render(made))) == [*manifests(made)]
    (held,) = [each for each in manifests(made) if each["kind"] == "ConfigMap"]
    job = parse_job(held["data"]["job.toml"], "job.toml")
    assert (job, job.run.dir) == (made.config, "/runs")


ANY = st.text(max_size=40)


@settings(max_examples=25)
@given(value=ANY, path=ANY, name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True))
def test_nothing_that_is_named_becomes_anything_else(value: str, path: str, name: str) -> None:
    """Values of variables, paths and names leave a YAML parser and Kubernetes' own expansion as they went in."""
    site = msgspec.structs.replace(SITE, working_dir=f"/{path}")
    asked = request(site, name, environment={"SOME": value, "OTHER": "$(SOME)"}, python=f"/{path}")
    data = msgspec.structs.replace(asked.config.data, tokenizer=value)
    asked = msgspec.structs.replace(asked, config=msgspec.structs.replace(asked.config, data=data))
    made = KubePlan.of(asked)
    assert list(yaml.safe_load_all(render(made))) == [*manifests(made)]
    container = pod(made, "agents")["containers"][0]
    environ = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    seen = {each: expanded(text, environ) for each, text in environ.items()}
    assert (seen["SOME"], seen["OTHER"]) == (value, "$(SOME)")
    words = [expanded(word, environ) for word in container["command"]]
    assert words == [f"/{path}", "-m", "cluster.kube_pod", f"/runs/{name}", KEY_FOLDER]
    for each in manifests(made):
        assert re.fullmatch(r"[a-z0-9-]{1,63}", each["metadata"]["name"])


NAMES = (
    "namespace", "image", "queue", "priority_class", "service_account", "cpu", "memory", "shm_size", "topology_key",
    "domain_label", "gpu_resource",
)  # fmt: skip


@settings(max_examples=200)
@given(text=ANY, key=st.sampled_from(NAMES))
def test_names_in_a_profile_are_names_or_refused(text: str, key: str) -> None:
    """Each is what Kubernetes takes, on one line, without a space, or the profile is refused with the key's name."""
    problems = list(check_kubernetes(msgspec.structs.replace(SITE, **{key: text})))
    if problems:
        assert {problem.key for problem in problems} == {f"kubernetes.{key}"}
    else:
        assert re.fullmatch(r"[A-Za-z0-9._:/@-]*", text)


@pytest.mark.parametrize(
    "text", ["yes", "1e3", "0x10", "~", "null", "1:30", "- a", "a: b", "#", "a\nb", "é", "\t", "", " "]
)
def test_texts_stay_texts(text: str) -> None:
    """Quoted, since parsers of YAML disagree about what is a number or a truth."""
    made = plan(SITE, environment={"SOME": text})
    line = re.search(r"- name: SOME\n\s+value: (.*)", render(made))
    assert line is not None
    assert line[1].startswith(('"', "|"))
    assert list(yaml.safe_load_all(render(made))) == [*manifests(made)]


@given(
    st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True), min_size=2, max_size=2, unique=True)
)
def test_different_runs_have_different_objects(runs: list[str]) -> None:
    """Names are short enough for a pod's, begin with a letter, and differ where the runs' names do."""
    made = [object_name(run) for run in runs]
    assert made[0] != made[1]
    for each in made:
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", each)
    assert object_name("demo") == "demo"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": ""}, r'kubernetes.image = "": name the image'),
        ({"run_dir": ""}, "run.dir = 'runs': pods need an absolute path"),
        ({"run_dir": "/elsewhere"}, "is on no volume that pods share .kubernetes.mounts has /runs."),
        ({"run_dir": "/runs/../etc"}, "without '..'"),
        ({"mounts": (Mount(path="/runs", claim="runs", read_only=True),)}, "read_only"),
        ({"mounts": (RUNS, Mount(path="/runs/ro", claim="b", read_only=True)), "run_dir": "/runs/ro"}, "read_only"),
        ({"grace_s": 60}, "set kubernetes.grace_s to 70 or more"),
    ],
)
def test_what_cannot_work_is_said_before_it_is_submitted(changes: dict[str, Any], said: str) -> None:
    """The key, its value and the fix."""
    with pytest.raises(ValueError, match=said):
        plan(msgspec.structs.replace(SITE, **changes))


def test_the_sample_profile_makes_manifests() -> None:
    """The file that a site begins with is valid as it is, and has every key."""
    path = ROOT / "configs" / "profiles" / "kubernetes.toml"
    profile = load_profile(path)
    asked: JobRequest = msgspec.structs.replace(request(), profile=profile)
    assert "NCCL_IB_HCA" in render(KubePlan.of(asked))
    missing = [field for field in KubernetesProfile.__struct_fields__ if f"\n{field} = " not in path.read_text()]
    assert missing == ["mounts"]
