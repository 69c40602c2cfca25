"""The agent process: `python -m cluster.agent_main RUN_DIR NODE`. A composition root, with `cluster.tiers`.

It outlives its workers. It owns the node's shared memory (heartbeat slots, snapshot segments), runs torch elastic,
persists snapshots in the background, and speaks to the supervisor. Secrets come from a file, never from arguments.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.addresses import LOOPBACK, interface_of, own_address
from cluster.gpu_devices import split_visible
from cluster.gpus import GpuWatch, Place
from cluster.keys import read_keys
from cluster.lease import LeaseWatch
from cluster.node import Node
from cluster.preflight import Examiner
from cluster.rundir import RunDir, safe_name
from cluster.wire import AgentLink
from configs.load import load_job
from configs.timeouts import derive
from trainer.exits import ExitCode

_MONITOR_INTERVAL_S = 0.02
_WATCH_INTERVAL_S = 0.1
_CUT_OFF_GRACE_S = 5.0

logger = logging.getLogger("everstep.agent")


def run_node(node: Node) -> None:
    """Run torch elastic until the supervisor lets the node go."""
    from cluster.elastic import AssignedRendezvous, NodeElasticAgent, WorkerDeath
    from trainer.main import worker_main

    rendezvous = AssignedRendezvous(node.node, node.state.host, node.state)

    def on_deaths(deaths: Sequence[WorkerDeath]) -> None:
        node.forward_facts()  # what they had to say comes before how they ended
        ends = [node.worker_exit(d.local_rank, d.exit_code, d.signal_number) for d in deaths]
        # The first to fail comes first: of two alike it is the cause.
        node.state.workers_died(sorted(ends, key=lambda end: end.t_wall_s))

    while True:
        elastic = NodeElasticAgent(
            rendezvous,
            worker_main,
            len(node.local_ranks),
            node.ram_dir,
            node.worker_argument,
            on_deaths,
            node.all_begun,
            node.told_to_leave,
            _MONITOR_INTERVAL_S,
        )
        node.worker_pids = elastic.worker_pids
        node.state.beats = lambda e=elastic: node.beats(e.worker_pids())  # type: ignore[misc]
        node.state.on_save = lambda e=elastic: e.signal_workers(signal.SIGUSR1)  # type: ignore[misc]
        result = elastic.run()
        if result is None or result.is_failed():
            return
        node.forward_facts()
        node.tiers.flush(node.config.cluster.leave_timeout_s)
        last = node.slots.read(0)
        node.state.workers_finished(last.step if last else 0)
        if not node.state.await_orders_after_finish():
            return


def main() -> int:
    """Entry point."""
    run_dir, name = RunDir(Path(sys.argv[1])), safe_name(sys.argv[2], "node")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.WARNING)
    config = load_job(run_dir.config)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before torch elastic starts workers it has no handler of its own: end as it would, through `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host = own_address(config.cluster, socket.gethostname())
    if host != LOOPBACK:
        _bind_collectives(interface_of(host))
    _warm_up(run_dir.semaphore_prefix(name))
    node = Node(run_dir, config, name, host)
    node.state.domain = os.environ.get("EVERSTEP_FAILURE_DOMAIN", "")
    node.open()
    link = AgentLink(
        name,
        read_keys(run_dir.keys),
        run_dir.read_endpoint,
        node.state.report,
        node.state.take_order,
        config.health.heartbeat_interval_s,
        derive(config).unheard_s,
    )
    node.state.wake = link.wake
    gpus = _gpu_watch(node)
    examiner = Examiner(node)
    stop, cut_off = threading.Event(), threading.Event()
    try:
        link.start()
        gpus.start()
        threading.Thread(target=_watch, args=(node, link, stop), name="watch", daemon=True).start()
        watch_lease = threading.Thread(target=_watch_lease, args=(node, link, stop, cut_off), name="lease", daemon=True)
        watch_lease.start()
        if not examiner.fit():
            node.state.await_dismissal()
            return ExitCode.BAD_NODE
        examiner.start()
        run_node(node)
    finally:
        stop.set()
        link.stop()
        gpus.stop()
        examiner.stop()
        node.close()
    return ExitCode.REQUEUE if cut_off.is_set() else ExitCode.DONE


def _gpu_watch(node: Node) -> GpuWatch:
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    visible = split_visible(next((os.environ[name] for name in names if name in os.environ), None))

    def place() -> Place:
        plan = node.plan
        if plan is None:
            return Place()
        beats = [node.slots.read(local_rank) for local_rank in node.local_ranks]
        steps = [beat.step for beat in beats if beat is not None and beat.generation == plan.generation]
        return Place(node.first_rank(), max(steps, default=-1), plan.generation)

    health = node.config.health
    return GpuWatch(node.node, health, len(node.local_ranks), visible, place, node.state.accuse)


def _warm_up(semaphore_prefix: str) -> None:
    """Load torch here and all of the trainer in the fork server, before the first heartbeat.

    A node that reports is warm; and importing holds the interpreter's lock for seconds, in which no thread of this
    process could send a heartbeat.
    """
    from cluster.elastic import name_semaphores, warm_forkserver
    from trainer.main import PRELOAD

    name_semaphores(semaphore_prefix)
    warm_forkserver(PRELOAD)


def _bind_collectives(interface: str) -> None:
    """Workers are forked from here: what stands in this environment is what their gloo and NCCL read."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, interface)


def _watch(node: Node, link: AgentLink, stop: threading.Event) -> None:
    """Forward facts, and leave when there is nothing to do and nobody to say what next."""
    while not stop.wait(_WATCH_INTERVAL_S):
        node.forward_facts()
        if node.state.idle and link.silent_s > node.config.cluster.supervisor_lost_timeout_s:
            logger.warning("no supervisor for %.0f s and nothing left to do: leaving", link.silent_s)
            node.state.leave()
            return


def _watch_lease(node: Node, link: AgentLink, stop: threading.Event, cut_off: threading.Event) -> None:
    """Leave when this node is cut off. In a thread of its own: nothing else that fails may keep it from that."""
    lease = LeaseWatch(node.run_dir.lease, node.config.cluster.lease_timeout_s, derive(node.config).unheard_s)
    while not stop.wait(_WATCH_INTERVAL_S):
        if lease.cut_off(link.silent_s, time.monotonic()):
            cut_off.set()
            _leave_cut_off(node)
            return


def _leave_cut_off(node: Node) -> None:
    """Others are getting this node's ranks: write nothing more, kill the workers, and end, whatever hangs."""
    # Workers die with this process: what keeps it (a file system that hangs, say) must not keep them.
    killer = threading.Timer(_CUT_OFF_GRACE_S, os._exit, (ExitCode.REQUEUE,))
    killer.daemon = True
    killer.start()
    node.tiers.fence()
    node.state.leave()
    # Last, since a log on a file system that hangs takes for ever.
    logger.warning("cut off: the supervisor lives and does not reach this node; it stops, others take its ranks")


if __name__ == "__main__":
    sys.exit(main())
