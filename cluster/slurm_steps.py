"""How agents and the watchdog are started inside an allocation: each a step of its own on one node."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping

from cluster.rundir import RunDir
from cluster.slurm_commands import checked_job, checked_node

WATCHDOG = "everstep-watchdog"
_KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")

# Gives back what an earlier agent of this node left in shared memory, says which switches the node hangs on unless the
# site has said so, and becomes the agent. The words are arguments: none of them is read as code.
_AGENT = """\
log=$1 ram=$2 semaphores=$3
shift 3
exec >>"$log" 2>&1
rm -rf -- "$ram"
rm -f -- /dev/shm/sem."$semaphores"*
address=${SLURM_TOPOLOGY_ADDR:-}
case "$address" in *.*) export EVERSTEP_FAILURE_DOMAIN="${EVERSTEP_FAILURE_DOMAIN:-${address%.*}}" ;; esac
exec "$@"
"""
_TIDY = 'rm -rf -- "$1"; rm -f -- /dev/shm/sem."$2"*'


def new_step_name(node: str) -> str:
    """A name for an agent's step that no other step has: ids begin again when a job is requeued."""
    return f"everstep-agent.{checked_node(node)}.{secrets.token_hex(4)}"


def handle_of(job_id: str, step_name: str) -> str:
    """What the journal keeps of an agent."""
    return f"{job_id}:{step_name}"


def split_handle(handle: str) -> tuple[str, str]:
    """Job and step name. ValueError if it is no handle of SLURM's."""
    job_id, _, name = handle.partition(":")
    return checked_job(job_id), name


def agent_command(run_dir: RunDir, ram_dir: str, node: str, step_name: str) -> list[str]:
    """Start a node's agent; its output is written on its own node, whatever becomes of srun."""
    words = [
        str(run_dir.logs(node) / "agent.log"),
        str(run_dir.ram_root(ram_dir) / node),
        run_dir.semaphore_prefix(node),
    ]
    agent = [sys.executable, "-m", "cluster.agent_main", str(run_dir.path), node]
    # A node that SLURM loses sight of for a while may go on training: whether it is lost, heartbeats say.
    own = ["--no-kill", f"--job-name={step_name}", "--export=ALL"]
    return [*_step(node), *own, "sh", "-c", _AGENT, "everstep", *words, *agent]


def watchdog_command(run_dir: RunDir, node: str, batch_host: str) -> list[str]:
    """Start the watchdog for the loss of the batch host. It shares the node with an agent, and needs no GPU."""
    watchdog = [sys.executable, "-m", "cluster.slurm_watch", str(run_dir.path), batch_host]
    return [*_step(node), f"--job-name={WATCHDOG}", "--export=ALL", "--gres=none", *watchdog]


def tidy_command(run_dir: RunDir, ram_dir: str, node: str) -> list[str]:
    """Remove what an agent that was killed left in its node's shared memory."""
    words = [str(run_dir.ram_root(ram_dir) / node), run_dir.semaphore_prefix(node)]
    return [*_step(node), "--no-kill", "--job-name=everstep-tidy", "--gres=none", "sh", "-c", _TIDY, "everstep", *words]


def bare_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a step needs that does not train: none of the job's credentials are in it."""
    return {
        name: value for name, value in environ.items() if name in _KEPT or name.startswith(("SLURM", "PYTHON", "MUNGE"))
    }


def _step(node: str) -> list[str]:
    # The whole of the node, shared with other steps: memory and CPUs as the job has them, and no binding of our own.
    return [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={checked_node(node)}",
        "--cpu-bind=none",
        "--mem=0",
        "--input=none",
    ]
