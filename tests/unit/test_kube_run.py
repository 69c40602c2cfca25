"""Promise: the supervisor's entry ends a run only when the run has ended, starts it again whatever else happens, and
keeps the job's keys. Its children are real processes."""

from __future__ import annotations

import fcntl
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster import kube_orders
from cluster.events import RunStarted, RunStopped
from cluster.keys import make_or_read_keys, make_transfer_key, others_may_read, read_keys
from cluster.kube_calls import KubeError
from cluster.kube_key import link_keys, new_key_files, submission_of
from cluster.kube_names import Inside, inside
from cluster.kube_orders import Ended, read_ended, read_state
from cluster.kube_pod import Pod, this_pod
from cluster.kube_run import SupervisorEntry, has_begun, whole_job_ends
from cluster.rundir import RunDir
from tests.unit.kubejobs import POD, WITHIN_S, eventually, key_folder
from trainer.paths import transfer_key_path


class Supervising:
    """The supervisor's entry in a thread, with a shell's line in place of `everstep run`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run_dir = RunDir(home / "runs" / "demo")
        self.run_dir.create()
        self.log = io.BytesIO()
        self.all_ends = True
        self.code: int | None = None

    def start(
        self,
        code: str,
        pauses_s: tuple[float, float] = (0.02, 0.02),
        pause: Callable[[float], None] | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Run it. pause: in place of waiting."""
        self.code = None
        program = f"cd {shlex.quote(str(self.home))}; {code}"
        command = ["bash", "-c", program]
        self.entry = SupervisorEntry(
            self.run_dir, command, "this", lambda: self.all_ends, self.log, 0.1, pauses_s, prepare
        )
        if pause is not None:
            self.entry._pause = pause  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.entry.run()

    def join(self) -> int | None:
        """Its exit code."""
        self._thread.join(WITHIN_S)
        return self.code

    def tries(self) -> int:
        """How often it was run."""
        path = self.home / "tries"
        return len(path.read_text()) if path.exists() else 0


@pytest.fixture
def supervising(tmp_path: Path) -> Supervising:
    """See `Supervising`."""
    return Supervising(tmp_path)


def stops(code: int) -> str:
    """A shell's line that ends the run as a supervisor does: in its journal."""
    ended = RunStopped(t_wall_s=1.0, t_mono_s=1.0, exit_code=code, reason="said", last_step=3)
    return f"echo {shlex.quote(msgspec.json.encode(ended).decode())} >> runs/demo/events.jsonl"


@pytest.mark.parametrize(("code", "said"), [(0, 0), (2, 2), (93, 93), (1, 93)])
def test_the_end_of_a_run_is_told_to_all_pods(supervising: Supervising, code: int, said: int) -> None:
    """As one of the codes that the failure policies know, and if the supervisor fails after its word: a report cannot
    be written, say. One that the Job makes again ends the same way."""
    supervising.start(f"echo hello; {stops(code)}; exit 1")
    assert supervising.join() == said
    assert read_ended(supervising.run_dir.path, "this") == Ended(submission="this", exit_code=said)
    assert read_ended(supervising.run_dir.path, "next") is None
    assert supervising.log.getvalue() == b"hello\n"
    assert (supervising.run_dir.path / "supervisor.log").read_bytes() == b"hello\n"
    supervising.start("printf x >> tries")
    assert (supervising.join(), supervising.tries()) == (said, 0)


def test_a_run_that_was_done_before_is_done(supervising: Supervising) -> None:
    """`everstep run` has nothing to do, and writes no end."""
    supervising.start("exit 0")
    assert supervising.join() == 0
    assert read_ended(supervising.run_dir.path, "this") == Ended(submission="this", exit_code=0)


@pytest.mark.parametrize("how", ["exit 2", "exit 1", "exit 93", "kill -9 $$"])
def test_a_supervisor_that_cannot_start_ends_no_run(supervising: Supervising, how: str) -> None:
    """The run trains on without it: no pod is told to leave, and the Job makes another pod. An end that stands in the
    journal from before is not this one's."""
    assert not has_begun(supervising.run_dir, "this")
    begun = RunStarted(t_wall_s=1.0, t_mono_s=1.0, run="demo", attempt=1, supervisor_pid=1, target_steps=9)
    supervising.run_dir.events.write_bytes(msgspec.json.encode(begun) + b"\n")
    subprocess.run(["bash", "-c", stops(93)], cwd=supervising.home, check=True)
    supervising.start(f"printf x >> tries; {how}")
    assert (supervising.join(), supervising.tries()) == (1, 5)
    assert read_ended(supervising.run_dir.path, "this") is None


def test_bad_input_ends_what_never_began(supervising: Supervising) -> None:
    """After some tries, since a name that is not found may be found soon; then nodes are given back. What an earlier
    submission did of the run does not count."""
    begun = RunStarted(t_wall_s=1.0, t_mono_s=1.0, run="demo", attempt=1, supervisor_pid=1, target_steps=9)
    supervising.run_dir.events.write_bytes(msgspec.json.encode(begun) + b"\n")
    supervising.start("printf x >> tries; exit 2")
    assert (supervising.join(), supervising.tries()) == (2, 5)
    assert read_ended(supervising.run_dir.path, "this") == Ended(submission="this", exit_code=2)


def test_a_supervisor_that_dies_is_started_again(supervising: Supervising) -> None:
    """SIGKILL, an error of its own, bad input for a moment, or a requeue; the pod stays."""
    supervising.start(
        """printf x >> tries; case $(wc -c < tries) in
        1) kill -9 $$ ;;
        2) exit 1 ;;
        3) exit 2 ;;
        4) exit 75 ;;
        5) exit 0 ;;
        esac"""
    )
    assert (supervising.join(), supervising.tries()) == (0, 5)


def test_there_is_a_pause_between_failures(supervising: Supervising) -> None:
    """It doubles, up to a bound; one that must go does not wait for its end."""
    paused: list[float] = []
    supervising.start("kill -9 $$", pauses_s=(5.0, 30.0), pause=paused.append)
    assert supervising.join() == 1
    assert paused == [5.0, 10.0, 20.0, 30.0]
    supervising.start("printf x >> tries; exit 1", pauses_s=(300.0, 300.0))
    eventually(lambda: supervising.tries() == 1)
    supervising.entry.terminate()
    assert (supervising.join(), supervising.tries()) == (75, 1)


def test_losing_the_race_for_a_run_is_no_failure(supervising: Supervising, caplog: pytest.LogCaptureFixture) -> None:
    """Two waited for the run and one has it: the other waits again, and ends nobody."""
    caplog.set_level("INFO")
    supervising.start(
        "printf x >> tries; [ -e held ] && exit 0; touch starting; while [ ! -e held ]; do sleep 0.02; done; exit 2"
    )
    eventually((supervising.home / "starting").exists)
    with (supervising.run_dir.path / "supervisor.lock").open("w") as winner:
        fcntl.flock(winner, fcntl.LOCK_EX)
        (supervising.home / "held").touch()
        eventually(lambda: "another supervisor holds the run" in caplog.text)
        assert (supervising.code, supervising.tries(), "in a row" in caplog.text) == (None, 1, False)
    assert (supervising.join(), supervising.tries()) == (0, 2)


def test_it_waits_until_the_last_one_is_gone(supervising: Supervising, caplog: pytest.LogCaptureFixture) -> None:
    """Two never have the run; one that must go while it waits goes."""
    caplog.set_level("INFO")
    with (supervising.run_dir.path / "supervisor.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        supervising.start("printf x >> tries")
        supervising.entry.terminate()
        assert supervising.join() == 75
        caplog.clear()
        supervising.start("printf x >> tries")
        eventually(lambda: "another supervisor holds the run" in caplog.text)
        assert (supervising.code, supervising.tries()) == (None, 0)
    eventually(lambda: supervising.tries() == 1)
    assert supervising.join() == 0


@pytest.mark.parametrize("all_ends", [True, False])
def test_sigterm_means_one_of_two_things(supervising: Supervising, all_ends: bool) -> None:
    """All of the job goes: the run saves and leaves. Only this pod does: it dies at once, and the next takes over."""
    supervising.all_ends = all_ends
    supervising.start("trap 'printf saved > saved; exit 75' TERM; touch ready; while :; do sleep 0.02; done")
    eventually((supervising.home / "ready").exists)
    supervising.entry.terminate()
    assert supervising.join() == 75
    assert (supervising.home / "saved").exists() == all_ends
    assert read_ended(supervising.run_dir.path, "this") is None


class Answer:
    """A `KubeApi` that says one thing."""

    def __init__(self, said: dict[str, Any] | KubeError) -> None:
        self.said = said

    def call(self, method: str, path: str, body: object = None, content_type: str = "") -> dict[str, Any]:
        """See `KubeApi`."""
        assert (method, path) == ("GET", "/apis/jobset.x-k8s.io/v1alpha2/namespaces/ns/jobsets/demo")
        if isinstance(self.said, KubeError):
            raise self.said
        return self.said


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ({"metadata": {}, "spec": {"suspend": False}}, False),
        ({"metadata": {}, "spec": {"suspend": True}}, True),
        ({"metadata": {"deletionTimestamp": "now"}}, True),
        (KubeError("gone", 404), True),
        (KubeError("nobody answers"), True),
    ],
)
def test_whether_all_goes_is_asked_of_the_server(said: dict[str, Any] | KubeError, ends: bool) -> None:
    """Deleted, gone, suspended; and if nobody says, the run saves."""
    environ = {
        "EVERSTEP_KUBE_NAMESPACE": "ns", "EVERSTEP_KUBE_NAME": "demo", "EVERSTEP_KUBE_KIND": "jobset",
        "EVERSTEP_POD_NAME": "p", "EVERSTEP_POD_UID": "u", "EVERSTEP_NODE_NAME": "n",
    }  # fmt: skip
    here = inside(environ)
    assert isinstance(here, Inside)
    assert whole_job_ends(here, Answer(said)) is ends
    for name in environ:
        with pytest.raises(ValueError, match=f"{name} is not set"):
            inside({**environ, name: ""})
    assert this_pod(environ) == Pod("p", "u", "n")


def test_orphans_are_waited_for() -> None:
    """They become children of a pod's first process; its own child is left to who waits for it."""
    program = """
import ctypes, subprocess, time, psutil
from cluster.kube_orphans import reap_orphans
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: what process 1 is by itself
own = subprocess.Popen(["true"])
subprocess.run(["sh", "-c", "true & exec true"], check=True)
subprocess.run(["sh", "-c", "(sh -c 'exit 3' &) ; true"], check=True)
me, deadline_s = psutil.Process(), time.monotonic() + 10
while [each.status() for each in me.children()] != ["zombie"] or me.children()[0].pid != own.pid:
    reap_orphans(own.pid, first=True)
    assert time.monotonic() < deadline_s, me.children()
    time.sleep(0.02)
assert own.wait() == 0
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WITHIN_S)
    assert ran.returncode == 0, ran.stderr


# Keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_a_link_on_the_shared_volume(tmp_path: Path) -> None:
    """The run finds them where it always does, and none of ours lies there; those of another cluster are kept."""
    key = key_folder(tmp_path / "key")
    run_dir = RunDir(tmp_path / "runs" / "demo")
    run_dir.keys.parent.mkdir(parents=True)
    run_dir.keys.write_text("old")
    for _ in range(2):
        link_keys(run_dir, key)
        assert run_dir.keys.parent.readlink() == key
    assert read_keys(run_dir.keys) == read_keys(key / "job.json")
    other = key_folder(tmp_path / "other")
    link_keys(run_dir, other)
    assert read_keys(run_dir.keys) == read_keys(other / "job.json")
    assert submission_of(key) != submission_of(other)
    assert (run_dir.path / "secrets.before" / run_dir.keys.name).read_text() == "old"
    assert (key / "job.json").exists()


def test_a_run_leaves_kubernetes(tmp_path: Path) -> None:
    """Elsewhere the link leads nowhere: the run gets keys of its own."""
    run_dir = RunDir(tmp_path / "runs" / "demo")
    run_dir.create()
    link_keys(run_dir, tmp_path / "absent")
    made = make_or_read_keys(run_dir.keys)
    assert read_keys(run_dir.keys) == made
    assert not run_dir.keys.parent.is_symlink()
    assert run_dir.keys.parent.stat().st_mode & 0o777 == 0o700
    link_keys(run_dir, tmp_path / "absent")
    make_transfer_key(transfer_key_path(run_dir.path))
    assert transfer_key_path(run_dir.path).stat().st_size == 32


def test_keys_of_a_live_run_are_left_alone(supervising: Supervising, caplog: pytest.LogCaptureFixture) -> None:
    """They are changed only while nobody has the run, before a supervisor begins."""
    caplog.set_level("INFO")
    done: list[int] = []
    with (supervising.run_dir.path / "supervisor.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        supervising.start("printf x >> tries", prepare=lambda: done.append(supervising.tries()))
        eventually(lambda: "another supervisor holds the run" in caplog.text)
        assert done == []
    assert supervising.join() == 0
    assert done == [0]


def test_keys_are_made_by_hand_too(tmp_path: Path) -> None:
    """The command that a dry run names writes files that only their owner may read."""
    folder = tmp_path / "key"
    subprocess.run([sys.executable, "-m", "cluster.kube_key", str(folder)], check=True, timeout=WITHIN_S)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys(new_key_files(), 0o600)
    assert len(submission_of(folder)) == 16


@pytest.mark.parametrize(
    ("mode", "owner", "me", "readable"),
    [(0o600, 1, 1, False), (0o440, 0, 1, False), (0o440, 0, 0, True), (0o440, 1, 1, True), (0o444, 0, 1, True)],
)
def test_a_mounted_secret_is_not_open_to_others(mode: int, owner: int, me: int, readable: bool) -> None:
    """Kubernetes makes 0440 of 0400, root's, for the group of the pod's volumes; nothing wider is taken."""
    assert others_may_read(mode, owner, me) is readable


def test_entries_are_commands(tmp_path: Path) -> None:
    """As a pod starts them: told to go with nothing to save, they end with 75; without a key, with an error."""
    key, run = key_folder(tmp_path / "key"), tmp_path / "runs" / "demo"
    environ = {**os.environ, "EVERSTEP_POD_NAME": POD.name, "EVERSTEP_POD_UID": "u", "EVERSTEP_NODE_NAME": "n"}
    command = [sys.executable, "-m", "cluster.kube_pod", str(run), str(key)]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as entry:
        eventually(lambda: read_state(run, POD.name))
        entry.send_signal(signal.SIGTERM)
        _, said = entry.communicate(timeout=WITHIN_S)
    assert entry.returncode == 75, said
    command[-1] = str(tmp_path)
    lacking = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=WITHIN_S)
    assert (lacking.returncode, "job.json" in lacking.stderr) == (1, True)


def test_a_job_that_this_version_cannot_read_ends_at_once(tmp_path: Path) -> None:
    """Nobody holds nodes for it; but what was begun is left to those who run it."""
    key, job = key_folder(tmp_path / "key"), tmp_path / "job.toml"
    run_dir = RunDir(tmp_path / "runs" / "demo")
    job.write_text(f'[run]\nname = "demo"\ndir = "{tmp_path}/runs"\nnewer_key = 1\n')
    command = [sys.executable, "-m", "cluster.kube_run", str(job), str(key)]
    ended = [None, Ended(submission=submission_of(key), exit_code=2)]
    for begun in (False, True):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S)
        assert (ran.returncode, "newer_key" in ran.stderr) == (2, True), ran.stderr
        assert read_ended(run_dir.path, submission_of(key)) == ended[not begun]
        kube_orders.pods_folder(run_dir.path).joinpath("_ended.json").unlink(missing_ok=True)
        event = RunStarted(t_wall_s=1.0, t_mono_s=1.0, run="demo", attempt=1, supervisor_pid=1, target_steps=9)
        run_dir.events.write_bytes(msgspec.json.encode(event) + b"\n")
