"""Promise: the job script does what its exit codes and signals say, and nothing that is named in it becomes code.

The script itself is run by bash. SLURM's commands, which are not there, are small recorders.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.backend import JobRequest
from cluster.slurm_exclude import exclude, excluded
from cluster.slurm_script import render_script
from configs.load import load_job
from configs.profile import ClusterProfile, SlurmProfile, load_profile

ROOT = Path(__file__).parents[2]
LINE = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\x85\u2028\u2029"))

_SLURM = SlurmProfile()


def request(tmp: Path, slurm: SlurmProfile = _SLURM, **more: object) -> JobRequest:
    """A request for two nodes and a spare."""
    config = load_job("debug_dense", ["--cluster.nodes", "2", "--cluster.ranks_per_node", "1", "--cluster.spares", "1"])
    made = JobRequest("job.toml", (), config, ClusterProfile(slurm=slurm), tmp / "runs" / "debug_dense", tmp)
    return msgspec.structs.replace(made, **more)


def options(script: str) -> dict[str, str]:
    """The options that sbatch reads, unquoted: its rules are those of a shell, without anything that expands."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=True)
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
    return found


def test_the_allocation_is_what_the_job_needs(tmp_path: Path) -> None:
    """Spares are in it, it outlives its nodes, it comes back, and its shell is warned in time."""
    slurm = SlurmProfile(
        partition="gpu", account="lab", qos="high", reservation="mine", constraint="h100&nvlink", gres="gpu:8",
        exclude="bad1,bad[2-3]", time_limit="1-00:00:00", switches="1@10:00", grace_s=300, options=("--licenses=a:1",),
    )  # fmt: skip
    script = render_script(request(tmp_path, slurm), "/opt/python", ["node7"])
    assert options(script) == {
        "job-name": "debug_dense",
        "comment": f"everstep run debug_dense in {tmp_path}/runs/debug_dense",
        "nodes": "3",
        "ntasks-per-node": "1",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "reservation": "mine",
        "constraint": "h100&nvlink",
        "gres": "gpu:8",
        "switches": "1@10:00",
        "exclude": "bad1,bad[2-3],node7",
        "time": "1-00:00:00",
        "exclusive": "",
        "mem": "0",
        "no-kill": "",
        "requeue": "",
        "signal": "B:TERM@300",
        "open-mode": "append",
        "chdir": str(tmp_path),
        "output": f"{tmp_path}/runs/debug_dense/slurm-%j.out",
        "licenses": "a:1",
    }
    assert "array" in options(render_script(request(tmp_path, SlurmProfile(time_limit="60", chain=7)), "python"))


def test_the_sample_profile_makes_a_script(tmp_path: Path) -> None:
    """The file that a site begins with is valid as it is."""
    profile = load_profile(ROOT / "configs" / "profiles" / "slurm.toml")
    script = render_script(request(tmp_path, profile=profile), "python")
    assert options(script)["constraint"] == "h100"
    assert "export NCCL_IB_HCA=mlx5" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@settings(max_examples=50)
@given(value=LINE, path=LINE.filter(lambda text: "\\" not in text), word=LINE)
def test_nothing_that_is_named_becomes_code(value: str, path: str, word: str) -> None:
    """Whatever stands in a profile, a path or an override leaves sbatch's and the shell's parsers as it went in."""
    tmp = Path("/shared") / f"x{path.replace('/', '_')}"
    slurm = SlurmProfile(partition=value, options=(f"--licenses={value}",), modules=(value,), time_limit="60", chain=2)
    profile = ClusterProfile(environment={"SOME": value}, nccl={"debug": value}, slurm=slurm)
    made = request(tmp, profile=profile, config_path=word, overrides=("--run.dir", value))
    script = render_script(made, word or "python")
    found = options(script)
    assert (found.get("partition", ""), found["licenses"], found["chdir"]) == (value, value, str(tmp))
    assert found["output"].replace("%%", "%") == f"{tmp}/runs/debug_dense/slurm-%A_%a.out"
    head, _, rest = script.partition("near_end_s=")
    # Everything else is the same in all scripts.
    assert rest == render_script(request(Path("/a"), slurm), "p").partition("near_end_s=")[2]
    show = '\nprintf \'%s\\0\' "$SOME" "$NCCL_DEBUG" "$run_dir" "${train[@]}"\n'
    code = "module() { printf '%s\\0' \"$@\"; }\n" + head + show
    done = subprocess.run(["bash", "--norc"], input=code.encode(), capture_output=True, check=True, env={}, timeout=20)
    train = [word or "python", "-m", "cluster.cli", "run", word, "--run.dir", value]
    assert done.stderr == b""
    assert done.stdout.decode().split("\0")[:-1] == ["load", value, value, value, str(made.run_dir), *train]


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x00b", "a\x1bb", "a\u2028b"])
def test_a_second_line_is_refused(tmp_path: Path, text: str) -> None:
    """No text begins a line of its own, in which sbatch would read an option."""
    for slurm in (SlurmProfile(partition=text), SlurmProfile(setup=(text,)), SlurmProfile(options=(f"--x={text}",))):
        with pytest.raises(ValueError, match=r"control character|not one line"):
            render_script(request(tmp_path, slurm), "python")
    with pytest.raises(ValueError, match="control character"):
        render_script(request(tmp_path, config_path=text), "python")


def test_excluded_nodes_are_names_and_nothing_else(tmp_path: Path) -> None:
    """The file that the script reads holds names; one that was tampered with stops a submission."""
    exclude(tmp_path, "node1")
    exclude(tmp_path, "node2")
    exclude(tmp_path, "node1")
    assert excluded(tmp_path) == ("node1", "node2")
    with pytest.raises(ValueError, match="no node's name"):
        exclude(tmp_path, "node3,node4")
    (tmp_path / "slurm-exclude").write_text("node1,$(reboot)")
    with pytest.raises(ValueError, match="no node's name"):
        excluded(tmp_path)


class Site:
    """A folder with recorders for SLURM's commands, and a supervisor that does what its test says."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.said = home / "said"
        (home / "bin").mkdir()
        (home / "runs" / "debug_dense").mkdir(parents=True)
        for name in ("scontrol", "scancel", "squeue"):
            self.program(name, f'printf "%s " {name} "$@" >> {shlex.quote(str(self.said))}; echo >> {self.said}')

    def program(self, name: str, code: str) -> str:
        """Write a program."""
        path = self.home / "bin" / name
        path.write_text(f"#!/bin/bash\n{code}\n")
        path.chmod(0o755)
        return str(path)

    def start(self, supervisor: str, slurm: SlurmProfile = _SLURM) -> subprocess.Popen[str]:
        """Run the script as SLURM would, with this supervisor."""
        script = self.home / "script"
        script.write_text(render_script(request(self.home, slurm), self.program("supervisor", supervisor)))
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        environ = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
        return subprocess.Popen(["bash", str(script)], env=environ, cwd=self.home, stdout=subprocess.PIPE, text=True)

    def calls(self) -> list[str]:
        """What SLURM was asked, without comments."""
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        return [line.strip() for line in lines if "Comment=" not in line]

    def wait_for(self, name: str) -> None:
        """Wait until the supervisor has made this file."""
        deadline = time.monotonic() + 20
        while not (self.home / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.01)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """See `Site`."""
    return Site(tmp_path)


@pytest.mark.parametrize(("code", "calls"), [(0, []), (75, ["scontrol requeue 7"]), (93, []), (2, []), (1, [])])
def test_exit_codes_of_a_single_job(site: Site, code: int, calls: list[str]) -> None:
    """75 requeues, nothing else does, and the code is the job's own."""
    job = site.start(f"exit {code}")
    said, _ = job.communicate(timeout=20)
    assert job.returncode == code, said
    assert site.calls() == calls
    assert f"Comment=everstep run debug_dense: {'done' if code == 0 else ''}" in site.said.read_text()


@pytest.mark.parametrize(
    ("code", "left_s", "calls"),
    [
        (0, 9999, ["scancel --state=PENDING 5"]),
        (93, 9999, ["scancel --state=PENDING 5"]),
        (75, 9999, ["scontrol requeue 7"]),
        (75, 100, []),
    ],
)
def test_exit_codes_in_a_chain(site: Site, code: int, left_s: int, calls: list[str]) -> None:
    """The end of the run ends the chain; a job whose time is up leaves the rest to the next; one that lost its nodes
    is requeued itself."""
    site.program("squeue", f"date -d '+{left_s} seconds' +%FT%T")
    job = site.start(f"exit {code}", SlurmProfile(time_limit="60", chain=3))
    job.communicate(timeout=20)
    assert job.returncode == code
    assert site.calls() == calls


def test_a_requeue_keeps_off_bad_nodes(site: Site) -> None:
    """Those of the site and those that SLURM could not be told of."""
    exclude(site.home / "runs" / "debug_dense", "node9")
    site.start("exit 75", SlurmProfile(exclude="old[1-2]")).communicate(timeout=20)
    # The one was excluded before the script was written, and the file may have grown since.
    assert site.calls() == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=old[1-2],node9"]


_SAVES = "trap 'echo >> heard; sleep 0.3; exit 75' TERM; touch ready; for i in $(seq 400); do sleep 0.05; done; exit 9"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_is_passed_on_once(site: Site, number: signal.Signals) -> None:
    """The run saves and the job requeues; a second warning does not keep it from saving."""
    job = site.start(_SAVES)
    site.wait_for("ready")
    job.send_signal(number)
    site.wait_for("heard")
    job.send_signal(number)
    job.communicate(timeout=20)
    assert job.returncode == 75
    assert (site.home / "heard").read_text() == "\n"
    assert site.calls() == ["scontrol requeue 7"]


def test_a_cancelled_job_saves_and_stays_away(site: Site) -> None:
    """It is told to save, and cancels itself instead of requeueing."""
    job = site.start(_SAVES)
    site.wait_for("ready")
    job.send_signal(signal.SIGUSR2)
    job.communicate(timeout=20)
    assert site.calls() == ["scancel 7"]


def test_a_supervisor_that_dies_is_started_again(site: Site) -> None:
    """SIGKILL, or an error of its own that it wrote down; what it says of the run is not asked twice."""
    log = "runs/debug_dense/supervisor-error.log"
    job = site.start(
        f"""echo >> tries; case $(wc -l < tries) in
        1) kill -9 $$ ;;
        2) touch {log}; exit 1 ;;
        3) [ -e {log} ] && exit 9; exit 0 ;;
        esac"""
    )
    job.communicate(timeout=20)
    assert (job.returncode, site.calls()) == (0, [])
    assert (site.home / "tries").read_text() == "\n" * 3


def test_a_supervisor_that_always_dies_ends_the_job(site: Site) -> None:
    """Five times; then somebody must look."""
    job = site.start("echo >> tries; kill -9 $$")
    job.communicate(timeout=20)
    assert (job.returncode, site.calls()) == (137, [])
    assert (site.home / "tries").read_text() == "\n" * 5


def test_scripts_hold_no_key_and_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the profile names is in a script."""
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    script = render_script(request(tmp_path), sys.executable)
    assert "very-secret" not in script
    assert not re.search(r"secrets/|KEY", script)
