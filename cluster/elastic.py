"""Torch elastic under the supervisor's ranks: the one import site of torch in the agent.

`AssignedRendezvous` is torch elastic's plug-in point: it waits until the supervisor's plan names this node.
`NodeElasticAgent` is its LocalElasticAgent with two differences. A failed generation is killed at once and entirely,
since the survivors wait in collectives that never end and the stock agent gives each 30 s to be polite. And nothing is
decided here: every failure is reported, and the supervisor alone says what happens next.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import multiprocessing.util
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import msgspec
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousGracefulExitError, RendezvousHandler
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStoreInfo

from cluster.messages import Assignment

_STORE_TIMEOUT = timedelta(seconds=60)
_RESTARTS_WITHOUT_END = 1 << 30
_IDENTICAL = {"TORCH_ELASTIC_WORKER_IDENTICAL": "1"}


class Planner(Protocol):
    """What the rendezvous needs of the agent."""

    def await_plan(self, store_port: int) -> Assignment | None:
        """Report readiness and block until a plan names this node; None when the node shall leave."""

    def wants_restart(self) -> bool:
        """Whether the supervisor asked for a newer generation than the one that runs."""


class WorkerDeath(msgspec.Struct, frozen=True):
    """How one local worker ended."""

    local_rank: int
    exit_code: int | None
    signal_number: int | None


class AssignedRendezvous(RendezvousHandler):
    """Ranks come from the supervisor; every generation meets in a fresh store."""

    def __init__(self, node: str, host: str, planner: Planner) -> None:
        self.node = node
        self.host = host
        self.planner = planner
        self.plan: Assignment | None = None
        self._server: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        """Workers use the store that the first node's agent hosts."""
        return True

    def get_backend(self) -> str:
        """Name for torch elastic's logs."""
        return "everstep"

    def next_rendezvous(self) -> RendezvousInfo:
        """Host a fresh store, wait for the plan; workers join the store of the first node that it names."""
        self._server = TCPStore(self.host, 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
        self.plan = self.planner.await_plan(self._server.port)
        if self.plan is None:
            raise RendezvousGracefulExitError("the supervisor let this node go")
        rank = self.plan.place
        # Every node has as many workers, so torch elastic works ranks out without a store (see `_IDENTICAL`): an
        # agent that asked the store of a node that has just died would wait, deaf to the supervisor.
        return RendezvousInfo(
            PrefixStore("agents", self._server),
            rank,
            self.plan.nodes,
            RendezvousStoreInfo(self.plan.store_host, self.plan.store_port),
        )

    def is_closed(self) -> bool:
        """Never: the agent ends when the supervisor says so."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Positive makes the agent stop its workers and come back to `next_rendezvous`."""
        return int(self.planner.wants_restart())

    def get_run_id(self) -> str:
        """The generation; reaches workers as TORCHELASTIC_RUN_ID."""
        return str(self.plan.generation if self.plan else 0)

    def shutdown(self) -> bool:
        """Let go of the store."""
        self._server = None
        return True


class _OwnLogs(LogsSpecs):
    """Workers redirect their own output, appending over restarts; elastic needs only a place for its error files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """No redirection; one error file a worker."""
        nothing = dict.fromkeys(envs, "")
        errors = {local_rank: str(self.folder / f"elastic-error-{local_rank}.json") for local_rank in envs}
        for local_rank, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = errors[local_rank]
        return LogsDest(stdouts=nothing, stderrs=nothing, tee_stdouts={}, tee_stderrs={}, error_files=errors)

    @property
    def root_log_dir(self) -> str:
        """Folder of the error files."""
        return str(self.folder)


class NodeElasticAgent(LocalElasticAgent):
    """Starts and stops the workers of this node; see the module's docstring for what it changes."""

    def __init__(
        self,
        rendezvous: AssignedRendezvous,
        entrypoint: Callable[[str], None],
        local_world_size: int,
        scratch: Path,
        worker_argument: Callable[[Assignment], str],
        on_deaths: Callable[[Sequence[WorkerDeath]], None],
        all_begun: Callable[[], bool],
        on_term: Callable[[], None],
        monitor_interval_s: float,
    ) -> None:
        spec = WorkerSpec(
            role="trainer",
            local_world_size=local_world_size,
            entrypoint=entrypoint,
            rdzv_handler=rendezvous,
            max_restarts=_RESTARTS_WITHOUT_END,
            monitor_interval=monitor_interval_s,
        )
        os.environ.update(_IDENTICAL)
        super().__init__(spec, logs_specs=_OwnLogs(scratch), start_method="forkserver", exit_barrier_timeout=0)
        self._rendezvous_handler = rendezvous
        self._worker_argument = worker_argument
        self._on_deaths = on_deaths
        self._all_begun = all_begun
        self._on_term = on_term
        self._semaphores_linked = False

    def worker_pids(self) -> dict[int, int]:
        """Process ids by local rank; empty while no worker runs."""
        return dict(self._pcontext.pids()) if self._pcontext is not None else {}

    def signal_workers(self, number: signal.Signals) -> None:
        """Send a signal to every worker that is alive."""
        for process in self._processes():
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def _processes(self) -> Sequence[multiprocessing.process.BaseProcess]:
        started = getattr(self._pcontext, "_pc", None)
        return started.processes if started is not None else ()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        plan = self._rendezvous_handler.plan
        assert plan is not None
        worker_group.spec.args = (self._worker_argument(plan),)
        self._semaphores_linked = True
        started = super()._start_workers(worker_group)
        for process in self._processes():
            # Torch elastic, where it notices a death first, would give the others 30 s after a SIGTERM.
            process.terminate = process.kill  # type: ignore[method-assign]
        # Torch elastic's own handler, set just now, would end the workers without a word.
        signal.signal(signal.SIGTERM, lambda *_: self._on_term())
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(signal.SIGKILL)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 10) -> None:
        super()._shutdown(signal.SIGKILL, timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        deaths = [_death(i, code) for i, process in enumerate(self._processes()) if (code := process.exitcode)]
        if self._semaphores_linked and self._all_begun():
            _unlink_semaphores()
            self._semaphores_linked = False
        if not deaths:
            result = super()._monitor_workers(worker_group)
            # A worker may die between our look and torch elastic's own, which ends the others too.
            self._report_failures(result)
            return result
        self._on_deaths(deaths)
        self._stop_workers(worker_group)
        return RunResult(state=WorkerState.FAILED)

    def _report_failures(self, result: RunResult) -> None:
        if result.failures:
            self._on_deaths([_death(failure.local_rank, failure.exitcode) for failure in result.failures.values()])

    def _exit_barrier(self) -> None:
        """The supervisor knows when all nodes are done; a barrier would only tie them to a store that may be gone."""


def _death(local_rank: int, exit_code: int) -> WorkerDeath:
    return WorkerDeath(local_rank, exit_code if exit_code > 0 else None, -exit_code if exit_code < 0 else None)


def _unlink_semaphores() -> None:
    """Remove the names of this process' semaphores, once every worker has opened them.

    They would otherwise stay in shared memory for ever when this process is killed together with its tracker.
    """
    for finalizer in list(multiprocessing.util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if getattr(finalizer, "_callback", None) is multiprocessing.synchronize.SemLock._cleanup:  # type: ignore[attr-defined]
            finalizer()


def name_semaphores(prefix: str) -> None:
    """Have the names of this process' semaphores begin with `prefix`, which ends in a hyphen.

    One that is killed between making them and `_unlink_semaphores`, its tracker with it, leaves them to be found.
    """
    multiprocessing.current_process()._config["semprefix"] = f"/{prefix.removesuffix('-')}"  # type: ignore[attr-defined]


def warm_forkserver(preload: Sequence[str]) -> None:
    """Start the fork server, load `preload` in it, and wait until it has forked a child that ended well.

    Raises:
        RuntimeError: if the child failed, which means that a module of the trainer cannot be imported here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    probe = context.Process(target=time.monotonic)
    probe.start()
    probe.join()
    if probe.exitcode != 0:
        raise RuntimeError(f"the fork server's first child ended with {probe.exitcode}; its output says why")
