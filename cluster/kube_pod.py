"""The entry of an agent's pod: `python -m cluster.kube_pod RUN_DIR KEY_FOLDER`.

The Job controller makes pods; the supervisor says, through a file in the run directory, which agent a pod shall run
(`cluster.kube_orders`). The entry runs it as a child, says how it stands, and ends the pod when it must end.

Exit codes are read by the Job's failure policy (`cluster.kube_workloads`). It never ends with 0 before the run is over:
Kubernetes would take the index for complete, and make no new pod for it. One that nobody gives work, since there is no
supervisor for very long, ends too, and holds its GPUs no more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from cluster.kube_echo import Follower
from cluster.kube_key import submission_of
from cluster.kube_names import NODE_NAME, POD_NAME, POD_UID
from cluster.kube_orders import PodOrder, PodState, checked_pod, read_ended, read_order, write_state
from cluster.kube_orphans import reap_orphans
from cluster.lease import Lease, read_lease
from cluster.local import LocalScheduler
from cluster.rundir import RunDir
from configs.load import load_job
from configs.schema import ClusterConfig
from trainer.exits import ExitCode

DOMAIN = "EVERSTEP_FAILURE_DOMAIN"

_TICK_S = 0.1
_ORDERS_S = 0.5
_REAP_S = 5.0
_WARN_EVERY_S = 60.0
_ENDS_THE_POD = (ExitCode.REQUEUE, ExitCode.BAD_NODE)
"""An agent that was cut off, or whose node failed its examination: another pod shall take its place."""

logger = logging.getLogger("everstep.pod")


class Pod(msgspec.Struct, frozen=True):
    """Which pod this is."""

    name: str
    uid: str
    node: str


class PodEntry:
    """Runs the agents that a pod is told to run, one at a time.

    submission: see `cluster.kube_key.submission_of`. to: where the agents' output goes besides the run's logs.
    domain_given: the site has named the failure domain itself. wrap: see `LocalScheduler`.
    """

    def __init__(
        self,
        run_dir: RunDir,
        pod: Pod,
        submission: str,
        to: IO[bytes],
        domain_given: bool = False,
        wrap: Callable[[str], Sequence[str]] = lambda node: (),
    ) -> None:
        self.run_dir = run_dir
        self.pod = pod
        self.submission = submission
        self.to = to
        self.domain_given = domain_given
        self.wrap = wrap
        self._local: LocalScheduler | None = None
        self._agent = ""
        self._handle = ""
        self._follower: Follower | None = None
        self._state = PodState(serial=0, running=False, pod_uid=pod.uid, node_name=pod.node)
        self._said: PodState | None = None
        # Set by a signal's handler, which may interrupt anything: no lock is in it.
        self._told = False
        self._passed_on = False
        self._lease: object = None
        self._heard_s = time.monotonic()
        self._lost_timeout_s: float | None = None
        self._warned: dict[str, float] = {}
        self._orders_due_s = 0.0
        self._reap_due_s = 0.0

    def terminate(self) -> None:
        """The pod is being taken away: the agent shall have the run save and move its ranks."""
        self._told = True

    def run(self) -> int:
        """Until the pod must end; returns its exit code."""
        while True:
            code = self.tick(time.monotonic())
            if code is not None:
                return self._leave(code)
            time.sleep(_TICK_S)

    def tick(self, now_s: float) -> int | None:
        """One look at the agent and the orders; an exit code ends the pod."""
        if (code := self._see_agent()) is not None:
            return code
        if self._told and (code := self._pass_on()) is not None:
            return code
        if now_s >= self._orders_due_s:
            self._orders_due_s = now_s + _ORDERS_S
            if (code := self._obey()) is not None:
                return code
            if self._forgotten(now_s):
                logger.error("no supervisor and no work for %.0f s: the pod ends, to be made again", self._patience_s())
                return ExitCode.FAILED
        if now_s >= self._reap_due_s:
            self._reap_due_s = now_s + _REAP_S
            reap_orphans(self._state.pid)
        self._say()
        return None

    def _see_agent(self) -> int | None:
        """Whether the agent has ended by itself."""
        if not self._handle or self._local is None:
            return None
        ended = self._local.ended(self._handle)
        if ended is None:
            return None
        code = 128 - ended if ended < 0 else ended
        logger.info("the agent %s ended with %d", self._agent, code)
        self._give_back(code)
        return code if code in _ENDS_THE_POD else None

    def _pass_on(self) -> int | None:
        if not self._handle:
            return ExitCode.REQUEUE
        if not self._passed_on and self._state.pid is not None:
            logger.info("the pod is being taken away: %s saves and leaves", self._agent)
            self._passed_on = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._state.pid, signal.SIGTERM)
        return None

    def _obey(self) -> int | None:
        try:
            if (ended := read_ended(self.run_dir.path, self.submission)) is not None:
                logger.info("the run is over (%d)", ended.exit_code)
                self._stop()
                return ended.exit_code
            order = read_order(self.run_dir.path, self.pod.name)
        except (OSError, ValueError) as error:
            self._warn(f"what to do cannot be read: {error}")
            return None
        if order is not None and order.serial > self._state.serial:
            self._carry_out(order)
        return None

    def _forgotten(self, now_s: float) -> bool:
        """Whether there is no agent here, and was nobody for very long who could want one: its own agent knows by
        itself what to do without a supervisor."""
        lease = read_lease(self.run_dir.lease)
        if self._handle or (isinstance(lease, Lease) and lease != self._lease):
            self._lease, self._heard_s = lease, now_s
        return now_s - self._heard_s > self._patience_s()

    def _patience_s(self) -> float:
        """As the run says, once it has begun."""
        if self._lost_timeout_s is None:
            try:
                self._lost_timeout_s = load_job(self.run_dir.config).cluster.supervisor_lost_timeout_s
            except (OSError, ValueError):
                return ClusterConfig().supervisor_lost_timeout_s
        return self._lost_timeout_s

    def _warn(self, text: str) -> None:
        """Not ten times a second, while it goes on."""
        now_s = time.monotonic()
        if now_s - self._warned.get(text, -_WARN_EVERY_S) >= _WARN_EVERY_S:
            self._warned = {text: now_s}
            logger.warning("%s", text)

    def _carry_out(self, order: PodOrder) -> None:
        self._stop()
        if order.action == "start" and not self._told:
            try:
                self._start(order)
            except (OSError, ValueError) as error:
                logger.warning("the agent %s could not be started: %s", order.agent_name, error)
                self._change(serial=order.serial, running=False, pid=None, exit_code=int(ExitCode.FAILED))
                return
        self._change(serial=order.serial)

    def _start(self, order: PodOrder) -> None:
        config = load_job(self.run_dir.config)
        self._local = LocalScheduler(self.run_dir, config.checkpoint.ram_dir, self.wrap)
        if order.domain and not self.domain_given:
            os.environ[DOMAIN] = order.domain
        log = self.run_dir.logs(order.agent_name) / "agent.log"
        self._follower = Follower(log, self.to)
        self._agent = order.agent_name
        logger.info("starting the agent %s", self._agent)
        self._handle = self._local.start(self._agent)
        self._change(running=True, pid=int(self._handle.split(":")[0]), exit_code=None)

    def _stop(self) -> None:
        """End the agent now, if there is one."""
        if self._handle:
            logger.info("ending the agent %s", self._agent)
            self._give_back(128 + signal.SIGKILL)

    def _give_back(self, code: int) -> None:
        """No process of the agent is left after this, and nothing that it held."""
        assert self._local is not None
        self._local.kill(self._agent, self._handle)
        if self._follower is not None:
            self._follower.stop()
        self._handle, self._follower, self._passed_on = "", None, False
        self._change(running=False, pid=None, exit_code=code)

    def _change(self, **changes: object) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        self._say()

    def _say(self) -> None:
        """Write the state down, if it is not; again with the next tick if that fails."""
        if self._state == self._said:
            return
        try:
            write_state(self.run_dir.path, self.pod.name, msgspec.structs.replace(self._state, t_wall_s=time.time()))
            self._said = self._state
        except OSError as error:
            self._warn(f"how the pod stands cannot be written: {error}")

    def _leave(self, code: int) -> int:
        logger.info("the pod ends with %d", code)
        if self._local is not None:
            self._local.close()
        self._change(leaving=True)
        return code


def this_pod(environ: Mapping[str, str]) -> Pod:
    """Which pod this is. ValueError if it is none."""
    missing = [name for name in (POD_NAME, POD_UID, NODE_NAME) if not environ.get(name)]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not set: this is no pod of ours; `everstep submit` makes them")
    return Pod(checked_pod(environ[POD_NAME]), environ[POD_UID], environ[NODE_NAME])


def main() -> int:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        run_dir, submission = RunDir(Path(sys.argv[1])), submission_of(Path(sys.argv[2]))
        pod = this_pod(os.environ)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return ExitCode.BAD_INPUT if isinstance(error, ValueError) else ExitCode.FAILED
    entry = PodEntry(run_dir, pod, submission, sys.stdout.buffer, DOMAIN in os.environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: entry.terminate())
    return entry.run()


if __name__ == "__main__":
    sys.exit(main())
