"""Promise: the two entries of pods end with the code that the Job's policy is to read, start what they are told to
start, and leave no process behind. Their children are real processes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import kube_orders, kube_pod
from cluster.events import RunStarted, RunStopped
from cluster.keys import make_or_read_keys, make_transfer_key, others_may_read, read_keys
from cluster.kube_calls import KubeError
from cluster.kube_key import link_keys, new_key_files, submission_of
from cluster.kube_names import Inside, inside
from cluster.kube_orders import Ended, PodOrder, PodState, read_ended, read_order, read_state, write_ended, write_order
from cluster.kube_pod import DOMAIN, Pod, PodEntry, this_pod
from cluster.kube_run import SupervisorEntry, has_begun, whole_job_ends
from cluster.lease import Lease
from cluster.rundir import RunDir, write_atomically
from configs.load import load_job, resolve_toml
from trainer.paths import transfer_key_path

POD = Pod("demo-agents-0-1-abcde", "uid-1", "node7")
WITHIN_S = 20.0
# An agent: says that it runs, and then does what the file beside it says; on SIGTERM it leaves.
AGENT = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
child = subprocess.Popen(["sleep", "300"])
print("agent", os.environ.get("EVERSTEP_FAILURE_DOMAIN"), sys.argv[1], child.pid, flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
print("ending", flush=True)
os._exit(int(open(sys.argv[2]).read()))
"""


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


class Running:
    """A pod's entry in a thread."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run_dir = RunDir(home / "runs" / "demo")
        self.run_dir.create()
        words = ["--checkpoint.ram_dir", str(home / "ram")]
        self.run_dir.config.write_text(resolve_toml(load_job("debug_dense", words)))
        self.ends = home / "ends"
        self.log = io.BytesIO()
        program = home / "agent.py"
        program.write_text(AGENT)
        self.entry = PodEntry(
            self.run_dir, POD, "this", self.log, wrap=lambda node: [sys.executable, str(program), node, str(self.ends)]
        )
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        eventually(lambda: self.state is not None)

    def _run(self) -> None:
        self.code = self.entry.run()

    @property
    def state(self) -> PodState:
        """What the pod says of itself."""
        return read_state(self.run_dir.path, POD.name)  # type: ignore[return-value]

    @property
    def said(self) -> str:
        """The pod's log."""
        return self.log.getvalue().decode()

    def order(self, serial: int, action: kube_orders.Action, agent: str = "node7", domain: str = "") -> None:
        """Tell it, and wait until it was done."""
        told = PodOrder(agent_name=agent, serial=serial, action=action, domain=domain)
        write_order(self.run_dir.path, POD.name, told)
        eventually(lambda: self.state.serial == serial)

    def start(self, serial: int = 1, **more: str) -> list[int]:
        """Start an agent; returns its pid and that of a worker."""
        before = self.said
        self.order(serial, "start", **more)
        eventually(lambda: "\n" in self.said[len(before) :])
        assert self.state.running
        assert self.state.pid is not None
        return [self.state.pid, int(self.said[len(before) :].split()[3])]

    def join(self) -> int:
        """Wait for its end."""
        self._thread.join(WITHIN_S)
        assert self.code is not None
        assert self.state.leaving
        assert not self.state.running
        return self.code


def gone(pids: list[int]) -> bool:
    """Whether none of them runs."""
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """See `Running`."""
    monkeypatch.delenv(DOMAIN, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(kube_pod, "_TICK_S", 0.02)
    monkeypatch.setattr(kube_pod, "_ORDERS_S", 0.04)
    made = Running(tmp_path)
    yield made
    made.entry.terminate()
    made.ends.write_text("0")
    made._thread.join(WITHIN_S)


def test_a_pod_runs_what_it_is_told_to(running: Running) -> None:
    """Its first word is that it is up. An order counts once; a new one ends the agent before, and all of its processes.
    What the agent prints is in the pod's log and in the run's."""
    assert msgspec.structs.replace(running.state, t_wall_s=0.0) == PodState(
        serial=0, running=False, pod_uid="uid-1", node_name="node7"
    )
    first = running.start(1, domain="zone-a")
    assert "agent zone-a node7" in running.said
    second = running.start(2, agent="node8")
    eventually(lambda: gone(first))
    running.order(3, "stop")
    eventually(lambda: gone(second))
    assert (running.state.running, running.state.exit_code) == (False, 137)
    assert "node8" in (running.run_dir.logs("node8") / "agent.log").read_text()
    assert running.said.count("agent zone-a") == 2
    # An order that was carried out is not carried out again, nor is an older one.
    write_order(running.run_dir.path, POD.name, PodOrder(agent_name="node7", serial=2, action="start"))
    running.order(4, "stop")
    assert not running.state.running


@pytest.mark.parametrize(("code", "pod_ends"), [(75, True), (94, True), (0, False), (1, False)])
def test_an_agents_own_end(running: Running, code: int, pod_ends: bool) -> None:
    """Cut off, or on a bad node: the pod ends with its code, to be replaced. Else it waits for what comes next."""
    pids = running.start()
    running.ends.write_text(str(code))
    if pod_ends:
        assert running.join() == code
    else:
        eventually(lambda: not running.state.running)
        assert running.code is None
        running.ends.unlink()
        running.start(2)
    assert running.state.exit_code == (code if pod_ends else None)
    eventually(lambda: gone(pids))
    assert running.said.count("ending") == 1


def test_a_pod_that_is_taken_away_lets_its_agent_save(running: Running) -> None:
    """SIGTERM goes to the agent once; the pod ends after it, and not as if it were complete."""
    pids = running.start()
    running.entry.terminate()
    assert running.join() == 75
    assert "saved" in running.said
    assert gone(pids)


def test_a_pod_without_an_agent_goes_at_once(running: Running) -> None:
    """Nor does it start one any more."""
    running.entry.terminate()
    assert running.join() == 75


@pytest.mark.parametrize("code", [0, 2, 93])
def test_the_end_of_the_run_ends_the_pod(running: Running, code: int) -> None:
    """With the run's code; what an earlier submission left is not its end."""
    write_ended(running.run_dir.path, Ended(submission="earlier", exit_code=93))
    pids = running.start()
    write_ended(running.run_dir.path, Ended(submission="this", exit_code=code))
    assert running.join() == code
    assert gone(pids)


def test_what_cannot_be_read_or_started_is_no_reason_to_end(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Orders that are garbage are not obeyed; an agent that cannot start is one that failed."""
    kube_orders.order_path(running.run_dir.path, POD.name).write_bytes(b'{"serial": 1')
    running.run_dir.config.rename(running.home / "config.toml")
    eventually(lambda: "what to do cannot be read" in caplog.text)
    assert running.state.serial == 0
    running.order(2, "start")
    assert (running.state.running, running.state.exit_code, running.code) == (False, 1, None)
    (running.home / "config.toml").rename(running.run_dir.config)
    running.start(3)


def test_a_pod_that_nobody_gives_work_gives_its_node_back(tmp_path: Path) -> None:
    """Not while somebody renews the lease, nor while its agent runs: that knows by itself what to do."""
    run_dir = RunDir(tmp_path / "runs" / "demo")
    run_dir.create()
    entry = PodEntry(run_dir, POD, "this", io.BytesIO())
    began_s = time.monotonic()
    assert entry.tick(began_s + 590) is None
    for renewals in (1, 2):
        lease = Lease(supervisor="s", host="h", pid=1, renewals=renewals, rounds=1, t_wall_s=0.0)
        write_atomically(run_dir.lease, msgspec.json.encode(lease))
        assert entry.tick(began_s + 650 * renewals) is None
    entry._handle = "an agent"
    assert entry.tick(began_s + 5000) is None
    entry._handle = ""
    # As long as the run says, once there is one.
    run_dir.config.write_text(resolve_toml(load_job("debug_dense", ["--cluster.supervisor_lost_timeout_s", "700"])))
    assert entry.tick(began_s + 5690) is None
    assert entry.tick(began_s + 5710) == 1


def test_what_goes_on_is_said_once(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A pod's log is not filled with one line while a volume is away."""
    kube_orders.order_path(running.run_dir.path, POD.name).write_bytes(b"{")
    eventually(lambda: "what to do cannot be read" in caplog.text)
    looks = running.entry._orders_due_s
    eventually(lambda: running.entry._orders_due_s > looks + 0.3)
    assert caplog.text.count("what to do cannot be read") == 1


@given(st.binary(max_size=60), st.text(max_size=20))
def test_orders_are_read_strictly(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    """Garbage is said to be that, and a name can be no path."""
    run = tmp_path_factory.getbasetemp() / "orders"
    path = kube_orders.order_path(run, POD.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        read_order(run, POD.name)
    with contextlib.suppress(ValueError):
        assert kube_orders.order_path(run, name).parent == path.parent
    for made in (f"../{name}", f"{name}/x", "x" * 254, f"{name}\n"):
        with pytest.raises(ValueError, match="no name of a pod"):
            kube_orders.order_path(run, made)
    for wrong in ({"agent_name": "../x"}, {"domain": "a\nb"}, {"domain": "$(x)"}):
        with pytest.raises(ValueError, match="use letters"):
            PodOrder(**{"agent_name": "node1", "serial": 1, "action": "start", **wrong})


# The supervisor's entry -------------------------------------------------------------------------------------------


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
