"""The scheduler inside a SLURM allocation: agents are steps on its nodes, started from the batch host."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from cluster import slurm_steps
from cluster.rundir import RunDir, safe_name
from cluster.slurm_commands import SlurmCommands, SlurmError, checked_job, checked_node
from cluster.slurm_exclude import exclude
from cluster.slurm_watchdog import Watchdog
from configs.schema import JobConfig
from health.verdict import Verdict

_FRESH_S = 1.5
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.2
_CALL_TIMEOUT_S = 15.0
_PATIENCE_S = 120.0
_AGAIN_S = 2.0
_PRESENT_S = 15.0
_THREADS = 16
_T = TypeVar("_T")

logger = logging.getLogger("everstep.slurm")


class SlurmScheduler:
    """See `cluster.scheduler.Scheduler`. A handle is `job:step name`; names are never used twice, ids of steps are.

    No call of the supervisor's loop waits for SLURM: what takes longer runs in threads of a pool. Only `start`, which
    is for the beginning, waits until an agent that was killed on the same node before is gone.
    """

    def __init__(
        self,
        run_dir: RunDir,
        ram_dir: str,
        bad_node: str,
        job_id: str,
        names: Sequence[str],
        commands: SlurmCommands,
        watchdog: Watchdog,
    ) -> None:
        self.run_dir = run_dir
        self.ram_dir = ram_dir
        self.bad_node = bad_node
        self.job_id = job_id
        self.names = tuple(names)
        self.commands = commands
        self.watchdog = watchdog
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "slurm")
        self._killing: dict[str, concurrent.futures.Future[None]] = {}
        self._littered: set[str] = set()
        self._steps = _KnownSteps(self.commands, self._pool)
        self._present = _Present(self.commands, self._pool, self.names)

    @classmethod
    def inside(cls, config: JobConfig, run_dir: RunDir, environ: Mapping[str, str]) -> SlurmScheduler:
        """The scheduler of the job that this process runs in.

        Raises:
            ValueError: if it runs in none.
            SlurmError: if SLURM's commands are not here.
        """
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME") if name not in environ]
        if missing:
            raise ValueError(
                f'cluster.backend = "slurm", but {", ".join(missing)} is not set: this is no SLURM job; '
                "`everstep submit --cluster slurm` makes one"
            )
        commands = SlurmCommands(environ, _CALL_TIMEOUT_S)
        names = commands.hostnames(environ["SLURM_JOB_NODELIST"])
        answering = _answering(commands, names)
        return cls(
            run_dir,
            config.checkpoint.ram_dir,
            config.cluster.bad_node,
            checked_job(environ["SLURM_JOB_ID"]),
            names,
            commands,
            Watchdog(run_dir, answering, checked_node(environ["SLURMD_NODENAME"]), environ),
        )

    def node_names(
        self, count: int, usable: Callable[[Sequence[str]], int] = len, stopped: Callable[[], bool] = bool
    ) -> list[str]:
        """See `Scheduler`: the nodes of the allocation that SLURM hears of, in its own order."""
        return _answering(self.commands, self.names)

    def start(self, node: str) -> str:
        """See `Scheduler`."""
        if (killing := self._killing.pop(node, None)) is not None:
            concurrent.futures.wait([killing], _KILL_TIMEOUT_S + _CALL_TIMEOUT_S)
        logs = self.run_dir.logs(safe_name(node, "node"))
        logs.mkdir(parents=True, exist_ok=True)
        name = slurm_steps.new_step_name(node)
        with (logs / "agent.log").open("ab") as log:
            child = subprocess.Popen(
                slurm_steps.agent_command(self.run_dir, self.ram_dir, node, name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.commands.environ, "OMP_NUM_THREADS": self.commands.environ.get("OMP_NUM_THREADS", "1")},
            )
        handle = slurm_steps.handle_of(self.job_id, name)
        self._children[handle] = child
        self._present.started(node)
        self.watchdog.open()
        return handle

    def alive(self, handle: str) -> bool:
        """See `Scheduler`. An agent of ours lives as long as its srun; of others SLURM is asked, seconds apart."""
        self.watchdog.tend()
        child = self._children.get(handle)
        if child is not None:
            ended = child.poll()
            if ended is None:
                return True
            # An srun that was killed says nothing of its step.
            if ended >= 0:
                return False
        job_id, name = slurm_steps.split_handle(handle)
        known = self._steps.of(job_id, wait=child is None)
        there = known is None or name in known
        if there and child is None:
            self.watchdog.open()
        return there

    def kill(self, node: str, handle: str, for_good: bool = False) -> None:
        """See `Scheduler`: SIGKILL to the step, without waiting: the node may be dead, and would not answer."""
        child = self._children.get(handle)
        ended = child.poll() if child is not None else None
        if ended is None or ended < 0:
            self.watchdog.avoid(node)
            self._littered.add(node)
            self._killing[node] = self._pool.submit(self._end_step, node, handle)

    def appeared(self) -> Sequence[str]:
        """See `Scheduler`: nodes of the allocation that are up, and had no agent yet or were down since."""
        return self._present.appeared()

    def verdicts(self, step: int, nodes: Collection[str]) -> Sequence[Verdict]:
        """See `Scheduler`: nobody else looks at these nodes."""
        return ()

    def report_bad(self, node: str, reason: str) -> None:
        """See `Scheduler`: as the configuration says, `scontrol update nodename=... state=drain|down`."""
        self.watchdog.avoid(node)
        self._pool.submit(self._report, node, reason)

    def last_words(self, node: str) -> tuple[str, ...]:
        """Last lines of the agent's log; srun's complaints are there too."""
        log = self.run_dir.logs(node) / "agent.log"
        return tuple(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ()

    def close(self) -> None:
        """Wait for what is still being killed, and free what killed agents left in their nodes' memory."""
        self.watchdog.close()
        concurrent.futures.wait(self._killing.values(), _KILL_TIMEOUT_S + _CALL_TIMEOUT_S)
        self._killing.clear()
        if self._littered:
            list(self._pool.map(self._tidy, sorted(self._littered)))
            self._littered.clear()

    # In the pool --------------------------------------------------------------------------------------------------

    def _end_step(self, node: str, handle: str) -> None:
        job_id, name = slurm_steps.split_handle(handle)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        try:
            while ids := [step.id for step in self.commands.steps(job_id) if step.name == name]:
                for step_id in ids:
                    self.commands.kill_step(step_id, _KILL_TIMEOUT_S / 2)
                if time.monotonic() > deadline or not self._answers(node):
                    logger.warning("the step of %s is not known to be gone: its node does not answer", node)
                    break
                time.sleep(_POLL_S)
        except SlurmError as error:
            logger.warning("the agent of %s may live: %s", node, error)
        self._end_child(handle)

    def _end_child(self, handle: str) -> None:
        """srun waits for its step, for ever if the node is dead."""
        child = self._children.get(handle)
        if child is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(_KILL_TIMEOUT_S)

    def _answers(self, node: str) -> bool:
        try:
            return any(row.answers for row in self.commands.nodes([node]))
        except SlurmError as error:
            logger.warning("whether %s answers is not known: %s", node, error)
            return False

    def _report(self, node: str, reason: str) -> None:
        try:
            if self.bad_node == "none":
                exclude(self.run_dir.path, node)
            else:
                self.commands.update_node(node, "down" if self.bad_node == "down" else "drain", reason)
                logger.warning("told SLURM to take %s out of work: %s", node, reason)
        except (OSError, ValueError) as error:
            logger.warning("SLURM was not told that %s is bad (%s); the job keeps off it by itself", node, error)
            with contextlib.suppress(OSError, ValueError):
                exclude(self.run_dir.path, node)

    def _tidy(self, node: str) -> None:
        if not self._answers(node):
            return
        command = slurm_steps.tidy_command(self.run_dir, self.ram_dir, node)
        try:
            subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True,
                env=slurm_steps.bare_environment(self.commands.environ),
                timeout=_CALL_TIMEOUT_S, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("what a killed agent left in the memory of %s may still be there: %s", node, error)


def _answering(commands: SlurmCommands, names: Sequence[str]) -> list[str]:
    there = {row.name for row in patiently(lambda: commands.nodes(names)) if row.answers}
    return [name for name in names if name in there]


class _Present:
    """Which nodes of the allocation are up, as SLURM said last. It is asked in the background, and only while somebody
    wants to know."""

    def __init__(self, commands: SlurmCommands, pool: concurrent.futures.Executor, names: Sequence[str]) -> None:
        self.commands = commands
        self.pool = pool
        self.names = names
        self._in_use: set[str] = set()
        self._up: tuple[str, ...] = ()
        self._asked_s = float("-inf")
        self._asking: concurrent.futures.Future[None] | None = None

    def started(self, node: str) -> None:
        """An agent was started there: it only appears once it has been down."""
        self._in_use.add(node)
        self._up = tuple(name for name in self._up if name != node)

    def appeared(self) -> Sequence[str]:
        """See `Scheduler`."""
        idle = self._asking is None or self._asking.done()
        if idle and time.monotonic() - self._asked_s > _PRESENT_S:
            self._asked_s = time.monotonic()
            self._asking = self.pool.submit(self._refresh)
        return [name for name in self._up if name not in self._in_use]

    def _refresh(self) -> None:
        try:
            rows = self.commands.nodes(self.names)
        except SlurmError as error:
            logger.warning("which nodes are up is not known now: %s", error)
            return
        self._in_use -= {row.name for row in rows if not row.answers}
        up = {row.name for row in rows if row.usable}
        self._up = tuple(name for name in self.names if name in up)


class _KnownSteps:
    """Names of a job's running steps, as SLURM said last. It is asked in the background, and only while somebody wants
    to know. While it does not answer, its last answer holds."""

    def __init__(self, commands: SlurmCommands, pool: concurrent.futures.Executor) -> None:
        self.commands = commands
        self.pool = pool
        self._known: dict[str, frozenset[str]] = {}
        self._asked_s: dict[str, float] = {}
        self._asking: concurrent.futures.Future[None] | None = None

    def of(self, job_id: str, wait: bool) -> frozenset[str] | None:
        """What is known, None for nothing yet. wait: for the first answer; SlurmError if it does not come."""
        if wait and job_id not in self._known:
            self._asked_s[job_id] = time.monotonic()
            self._known[job_id] = patiently(lambda: self._ask(job_id))
        elif self._idle and time.monotonic() - self._asked_s.get(job_id, float("-inf")) > _FRESH_S:
            self._asked_s[job_id] = time.monotonic()
            self._asking = self.pool.submit(self._refresh, job_id)
        return self._known.get(job_id)

    @property
    def _idle(self) -> bool:
        return self._asking is None or self._asking.done()

    def _ask(self, job_id: str) -> frozenset[str]:
        return frozenset(step.name for step in self.commands.steps(job_id))

    def _refresh(self, job_id: str) -> None:
        try:
            self._known[job_id] = self._ask(job_id)
        except SlurmError as error:
            logger.warning("which agents run is not known now: %s", error)


def patiently(ask: Callable[[], _T]) -> _T:
    """Ask, and ask again while the controller is away: it may be restarting. SlurmError if it stays away."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask()
        except SlurmError as error:
            if time.monotonic() > deadline_s:
                raise
            logger.warning("%s; asking again", error)
            time.sleep(_AGAIN_S)
