"""Promise: a site's profile is read strictly, and nothing in it can become a line, an option or a secret in a job."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.profile import load_profile
from configs.tomltext import toml_value

WHOLE = """
interface = "ib0"
python = "/opt/venv/bin/python"
[environment]
OMP_NUM_THREADS = "8"
[nccl]
ib_hca = "mlx5"
[slurm]
partition = "main"
gres = "gpu:8"
time_limit = "1-00:00:00"
chain = 7
options = ["--licenses=x"]
[kubernetes]
image = "registry.example/everstep:1"
tolerations = ["nvidia.com/gpu=present:NoSchedule"]
[[kubernetes.mounts]]
claim = "runs"
path = "/runs"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return path


def test_a_whole_profile_is_read(tmp_path: Path) -> None:
    """Sections, lists and tables; NCCL's variables get their prefix."""
    profile = load_profile(written(tmp_path, WHOLE))
    assert profile.variables == {"OMP_NUM_THREADS": "8", "NCCL_IB_HCA": "mlx5"}
    assert (profile.slurm.chain, profile.slurm.exclusive) == (7, True)
    assert profile.kubernetes.mounts[0].claim == "runs"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[slurm]\npartitoin = "main"', 'slurm.partitoin = "main"'),
        ('[slurm]\npartitoin = "main"', 'did you mean "partition"?'),
        ('[slurm]\ngrace_s = "long"', "must be a whole number"),
        ('[slurm]\nbad_node = "explode"', "drain, down, none"),
        ('[slurm]\ntime_limit = "a day"', "HH:MM:SS"),
        ("[slurm]\nchain = 3", "needs slurm.time_limit"),
        ('[slurm]\noptions = ["licenses=x"]', "write each whole"),
        ('[slurm]\noptions = ["--nodes=3"]', "is set by everstep"),
        ('[slurm]\npartition = "a\\nrm -rf /"', "write it on one line"),
        ('[slurm]\nmodules = ["a\\nb"]', "write it on one line"),
        ('[[kubernetes.mounts]]\nclaim = "a\\nb"\npath = "/x"', "write it on one line"),
        ('[[kubernetes.mounts]]\nclaim = "a"\npath = "/x/../etc"', "absolute path"),
        ('[kubernetes]\ntolerations = ["a b"]', "key=value:NoSchedule"),
        ('[kubernetes]\ntolerations = ["a=b:NoSuch"]', "key=value:NoSchedule"),
        ('[kubernetes]\nnamespace = "Prod"', "is no name of a namespace"),
        ('[kubernetes]\nimage = "a b"', "registry/name:tag"),
        ('[kubernetes]\nqueue = "a/b"', "is no name of an object"),
        ('[kubernetes]\nsecret_env = ["A"]', "is no name of an object"),
        ('[kubernetes]\ntopology_key = "a b"', "is no label"),
        ('[kubernetes]\nnode_selector = { "everstep.dev/run" = "x" }', "is no label of nodes"),
        ('[kubernetes]\nnode_selector = { pool = "a b" }', "is no label's value"),
        ('[kubernetes]\ncpu = "many"', '"500m" or "64Gi"'),
        ('[kubernetes]\nresources = { "nvidia.com/gpu" = "8" }', "has a key of its own"),
        ('[kubernetes]\nresources = { rdma = "some" }', '"resource" = "8"'),
        ('[kubernetes]\nrun_dir = "runs"', "must be an absolute path"),
        ('[kubernetes]\ncapabilities = ["SYS_ADMIN"]', "IPC_LOCK"),
        ('[kubernetes]\nkind = "pod"', "jobset, job, trainjob"),
        ('[[kubernetes.mounts]]\npath = "/x"', "either claim or host_path"),
        ('[[kubernetes.mounts]]\nclaim = "a"\nhost_path = "/y"\npath = "/x"', "either claim or host_path"),
        ('[[kubernetes.mounts]]\nhost_path = "y"\npath = "/x"', "absolute path without '..' on the nodes"),
        ('[[kubernetes.mounts]]\nclaim = "a"\npath = "/dev/shm/x"', "has something else there"),
        ('[environment]\n"A B" = "1"', "no name of a variable"),
        ('[environment]\nWANDB_API_KEY = "hunter2"', "looks like a secret"),
        ('[environment]\nA = "b\\u0000c"', "write it on one line"),
        ("[slurm", "this is not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(tmp_path: Path, text: str, said: str) -> None:
    """The file, the key, the value and the fix; a secret's value is not repeated."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """No traceback for a wrong path."""
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_profile(tmp_path / "nowhere.toml")


@given(st.text(), st.sampled_from(["partition", "account", "qos", "constraint", "gres", "exclude", "reservation"]))
def test_no_text_becomes_a_second_line(tmp_path_factory: pytest.TempPathFactory, text: str, key: str) -> None:
    """Whatever is accepted has no line break and no control character."""
    path = tmp_path_factory.mktemp("profile") / "site.toml"
    path.write_text(f"[slurm]\n{key} = {toml_value(text)}\n", encoding="utf-8", errors="replace")
    try:
        accepted = getattr(load_profile(path).slurm, key)
    except ConfigError:
        return
    assert all(ord(character) >= 32 and ord(character) != 127 for character in accepted)
    assert accepted == "".join(accepted.splitlines())
