"""A real SLURM on one machine: a controller and nodes, each in network, UTS and mount namespaces of its own.

The bridge that joins them is inside the controller's namespace, so nothing of the machine's own network is touched and
any number of labs can be up at a time. Root is needed, and the packages that `make slurm-packages` installs.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

NETWORK = "10.77.0"
BINARIES = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
_PREFIX = "everstep-slurm"
_POLL_S = 0.05

_CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=ctl({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=100000,defer=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=3
MinJobAge=300
ReturnToService=1
JobRequeue=1
TCPTimeout=2
MessageTimeout=10
UnkillableStepTimeout=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoAddrCache
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = (
    "NodeName={name} NodeAddr={address} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 "
    "RealMemory=16000 Gres=gpu:2 Feature=h100,rack{rack} State=UNKNOWN"
)


class Lab:
    """See the module. A context manager: whatever happens in between, no process and no namespace is left."""

    def __init__(self, home: Path, nodes: int = 4) -> None:
        self.home = home
        self.nodes = tuple(f"node{index + 1}" for index in range(nodes))
        self._tag = f"{_PREFIX}-{os.getpid()}"

    def __enter__(self) -> Lab:
        remove_stale_labs()
        try:
            self._write_files()
            self._make_network()
            self._start_controller()
            for node in self.nodes:
                self.power_on(node)
            self.wait_until(lambda: set(self.states()) == set(self.nodes) and self.all_idle(), "all nodes idle", 30)
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tear_down()

    # What a user and an administrator can do ----------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What SLURM's commands need to find this cluster, on the controller and on every node."""
        return {**os.environ, "SLURM_CONF": str(self.home / "slurm.conf")}

    def command(self, *arguments: str, node: str = "") -> list[str]:
        """The command line that runs a command on a node, or (without one) where users log in."""
        host = node or "ctl"
        script = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", script, host, str(self.home / "hosts"), *arguments]
        return ["nsenter", f"--net=/run/netns/{self._tag}-{host}", *inside]

    def run(self, *arguments: str, node: str = "", cwd: Path | None = None, may_end_with: Sequence[int] = (0,)) -> str:
        """Run a command to its end; returns what it printed."""
        done = subprocess.run(
            self.command(*arguments, node=node),
            env=self.environment(),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        words = f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}{done.stdout}"
        assert done.returncode in may_end_with, words
        return done.stdout

    def states(self) -> dict[str, str]:
        """The state of every node, as `sinfo` has it."""
        rows = (line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        return dict(rows)

    def reason(self, node: str) -> str:
        """Why a node is out of work; "" if it is not."""
        found = re.search(r"Reason=(.*)", self.run("scontrol", "show", "node", node))
        return found[1].strip() if found else ""

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` of one job, as its words say it."""
        said = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", said))

    def all_idle(self) -> bool:
        """Whether every node waits for work."""
        return set(self.states().values()) == {"idle"}

    # What may happen to a node ------------------------------------------------------------------------------------

    def power_on(self, node: str) -> None:
        """Start the node's slurmd, and plug its cable in."""
        self._ctl("ip", "link", "set", f"v-{node}", "up")
        log = (self.home / "log" / f"{node}.out").open("ab")
        with log:
            subprocess.run(
                self.command("slurmd", "-N", node, node=node),
                env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=30,
            )  # fmt: skip

    def power_off(self, node: str) -> None:
        """No process of the node takes another step, and nobody hears of it: the cable is out first."""
        self.cut(node)
        _kill_all(f"{self._tag}-{node}")

    def cut(self, node: str) -> None:
        """Pull the node's cable."""
        self._ctl("ip", "link", "set", f"v-{node}", "down")

    def heal(self, node: str) -> None:
        """Plug the node's cable in again."""
        self._ctl("ip", "link", "set", f"v-{node}", "up")

    def repair(self) -> None:
        """End all jobs, and bring every node back to work."""
        self.run("scancel", "--user=root", "--signal=KILL", "--full")
        self.run("scancel", "--user=root")
        for node in self.nodes:
            if not self._processes(node):
                self.power_on(node)
            self.heal(node)

        def well() -> bool:
            for node, state in self.states().items():
                if state not in ("idle", "allocated", "mixed", "completing") and "*" not in state:
                    # A node that is just coming back refuses; it is asked again.
                    with contextlib.suppress(AssertionError):
                        self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return self.all_idle() and not self.run("squeue", "-h")

        self.wait_until(well, "all nodes idle again", 40)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for a condition; what it is, and the cluster's state, are said if it does not come true."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                seen = self.run("sinfo", "-N", "-l") + self.run("squeue", "-l", "-s") + self.run("squeue", "-l")
                raise AssertionError(f"{what} did not happen in {timeout_s:g} s:\n{seen}")
            time.sleep(_POLL_S)

    # The inside ---------------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        for folder in ("state", "spool", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        address = {node: f"{NETWORK}.{10 + index}" for index, node in enumerate(self.nodes)}
        hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 ctl", *(f"{address[node]} {node}" for node in self.nodes)]
        (self.home / "hosts").write_text("\n".join(hosts) + "\n")
        nodes = "\n".join(
            _NODE.format(name=node, address=address[node], rack=index // 2 + 1) for index, node in enumerate(self.nodes)
        )
        text = _CONFIGURATION.format(home=self.home, network=NETWORK, nodes=nodes)
        (self.home / "slurm.conf").write_text(text)
        # Devices that every container has stand for GPUs.
        (self.home / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        key = self.home / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.address = address

    def _make_network(self) -> None:
        _run("ip", "netns", "add", f"{self._tag}-ctl")
        self._ctl("ip", "link", "set", "lo", "up")
        self._ctl("ip", "link", "add", "br0", "type", "bridge")
        self._ctl("ip", "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
        self._ctl("ip", "link", "set", "br0", "up")
        for node in self.nodes:
            space = f"{self._tag}-{node}"
            _run("ip", "netns", "add", space)
            self._ctl("ip", "link", "add", f"v-{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ctl("ip", "link", "set", f"v-{node}", "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{self.address[node]}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")

    def _start_controller(self) -> None:
        folder = self.home
        # munged refuses a folder that others may write to.
        folder.chmod(0o755)
        munged = ["munged", "--force", f"--socket={folder}/munge.sock", f"--key-file={folder}/munge.key",
                  f"--pid-file={folder}/munged.pid", f"--log-file={folder}/log/munged.log",
                  f"--seed-file={folder}/munge.seed", "--num-threads=2"]  # fmt: skip
        for daemon in (munged, ["slurmctld", "-i"]):
            subprocess.run(self.command(*daemon), env=self.environment(), check=True, timeout=30,
                           stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip

    def _ctl(self, *arguments: str) -> None:
        _run("nsenter", f"--net=/run/netns/{self._tag}-ctl", *arguments)

    def _processes(self, node: str) -> list[int]:
        return _processes(f"{self._tag}-{node}")

    def _tear_down(self) -> None:
        for name in _namespaces():
            if name.startswith(f"{self._tag}-"):
                _remove(name)
        for folder in ("state", "spool"):
            shutil.rmtree(self.home / folder, ignore_errors=True)


def missing_binaries() -> list[str]:
    """What is not installed of what a lab needs."""
    return [name for name in BINARIES if shutil.which(name) is None]


def remove_stale_labs() -> None:
    """Remove labs of test processes that are gone."""
    for name in _namespaces():
        found = re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _remove(space: str) -> None:
    _kill_all(space)
    _run("ip", "netns", "del", space)


def _processes(space: str) -> list[int]:
    return [int(pid) for pid in _run("ip", "netns", "pids", space).split()]


def _kill_all(space: str) -> None:
    deadline = time.monotonic() + 10.0
    while found := list(_living(space)):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"processes {found} of {space} survive SIGKILL"
        time.sleep(_POLL_S)


def _living(space: str) -> Iterator[int]:
    for pid in _processes(space):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                yield pid


def _run(*arguments: str) -> str:
    done = subprocess.run(list(arguments), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout
