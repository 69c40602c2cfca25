"""The watchdog for the loss of the batch host: `python -m cluster.slurm_watch RUN_DIR BATCH_HOST`.

A job that may lose nodes (`--no-kill`) is not requeued when the one node dies that its batch script runs on: SLURM
goes on to call it running, and nobody is left in it who could ask for more. So a step on another node looks after that
host, and requeues the job when it is gone. It does nothing about a supervisor that died on a host that lives: the batch
script starts the next one.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.lease import Lease, read_lease
from cluster.rundir import RunDir
from cluster.slurm_commands import SlurmCommands, SlurmError
from cluster.slurm_exclude import exclude, exclude_in_queue
from configs.load import load_job
from configs.schema import ClusterConfig

_LOOK_S = 1.0
_CONNECT_S = 2.0
_ASK_S = 5.0
_TIMEOUT_S = 15.0

logger = logging.getLogger("everstep.watchdog")


@dataclass(frozen=True)
class Sight:
    """What the watchdog sees. unrenewed_s: for how long the lease has not changed; unreachable_s: for how long the
    batch host has not answered; known_down: SLURM's own opinion of it."""

    unrenewed_s: float
    unreachable_s: float
    known_down: bool


def why_gone(seen: Sight, cluster: ClusterConfig) -> str:
    """Why the batch host must be taken for lost, "" while it need not be.

    A lease that nobody renews is not enough: the host may be well and its supervisor on the way back. Nor is a host
    that does not answer here: this node may be the one that is cut off. Both together are, or a lease that is unrenewed
    for as long as agents wait for a supervisor.
    """
    if seen.unrenewed_s < cluster.lease_timeout_s:
        return ""
    if seen.known_down:
        return f"SLURM says that it is down, and no lease for {seen.unrenewed_s:.0f} s"
    if seen.unreachable_s >= cluster.lease_timeout_s / 2:
        return f"it does not answer, and no lease for {seen.unrenewed_s:.0f} s"
    if seen.unrenewed_s >= cluster.supervisor_lost_timeout_s:
        return f"no lease for {seen.unrenewed_s:.0f} s"
    return ""


class Watch:
    """Looks once a second. Monotonic seconds of its own clock: no clocks of two nodes are compared.

    succeeded: another supervisor than the one that was seen first has the run now, and a watchdog of its own.
    """

    def __init__(self, run_dir: RunDir, batch_host: str, commands: SlurmCommands, now_s: float) -> None:
        self.run_dir = run_dir
        self.batch_host = batch_host
        self.commands = commands
        self._lease: Lease | None = None
        self._watched = ""
        self._renewed_s = now_s
        self._reached_s = now_s
        self._asked_s = now_s
        self._known_down = False
        self.succeeded = False

    def look(self, cluster: ClusterConfig) -> Sight:
        """Look at the lease; at the host only if nobody renews it."""
        found, before = read_lease(self.run_dir.lease), self._lease
        now_s = time.monotonic()
        if isinstance(found, Lease) and found != before:
            if before is not None:
                self.succeeded = self._watched not in ("", found.supervisor)
                self._watched = self._watched or found.supervisor
            self._lease, self._renewed_s, self._reached_s, self._known_down = found, now_s, now_s, False
        elif now_s - self._renewed_s >= cluster.lease_timeout_s / 2:
            self._examine_host(now_s)
        now_s = time.monotonic()
        return Sight(now_s - self._renewed_s, now_s - self._reached_s, self._known_down)

    def _examine_host(self, now_s: float) -> None:
        if self._host_answers():
            self._reached_s = time.monotonic()
        if now_s - self._asked_s >= _ASK_S:
            self._asked_s = now_s
            try:
                rows = self.commands.nodes([self.batch_host])
            except SlurmError as error:
                logger.warning("the controller cannot be asked: %s", error)
                return
            self._known_down = any(not row.answers for row in rows)

    def _host_answers(self) -> bool:
        """Whether something answers where the supervisor listened last; to be refused is an answer too."""
        endpoint = self.run_dir.read_endpoint()
        try:
            port = endpoint.port if endpoint else 0
            socket.create_connection((endpoint.host if endpoint else self.batch_host, port), _CONNECT_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True


def requeue(commands: SlurmCommands, run_dir: Path, job_id: str, batch_host: str, bad_node: str, why: str) -> None:
    """Give the host up, as the site wants it, and the job back to the queue.

    In this order: SLURM ends a job only when all of its nodes have said so or are down.

    Raises:
        SlurmError: if the job could not be requeued now.
    """
    logger.warning("batch host %s is lost: %s; requeueing job %s", batch_host, why, job_id)
    told = False
    if bad_node != "none":
        try:
            reason = f"everstep: batch host lost: {why}"
            commands.update_node(batch_host, "down" if bad_node == "down" else "drain", reason)
            told = True
        except SlurmError as error:
            logger.warning("SLURM was not told: %s", error)
    if not told:
        exclude(run_dir, batch_host)
    commands.requeue(job_id)
    try:
        commands.update_job(job_id, "Comment", f"everstep: batch host {batch_host} lost; goes on from newest snapshot")
        if not told:
            exclude_in_queue(commands, run_dir, job_id)
    except SlurmError as error:
        logger.warning("the job is requeued, but %s", error)


def main() -> int:
    """Entry point. Ends with the job, and when another supervisor takes over."""
    run_dir, batch_host = RunDir(Path(sys.argv[1])), sys.argv[2]
    job_id = os.environ["SLURM_JOB_ID"]
    logging.basicConfig(
        filename=run_dir.path / "slurm-watch.log",
        level=logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    cluster = load_job(run_dir.config).cluster
    commands = SlurmCommands(timeout_s=_TIMEOUT_S)
    watch = Watch(run_dir, batch_host, commands, time.monotonic())
    logger.info("job %s: watching %s from %s", job_id, batch_host, socket.gethostname())
    while True:
        why = why_gone(watch.look(cluster), cluster)
        if watch.succeeded:
            return 0
        if why:
            # The requeue ends this step too, before all is said.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                requeue(commands, run_dir.path, job_id, batch_host, cluster.bad_node, why)
                return 0
            except SlurmError as error:
                logger.warning("the job could not be requeued yet: %s", error)
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    sys.exit(main())
