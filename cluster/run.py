"""`everstep run`: begin a run, go on with one that stopped, or take over from a supervisor that died."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from cluster import events
from cluster.addresses import own_address
from cluster.evaluations import Evaluations
from cluster.fencing import FenceWatcher
from cluster.history import HistoryFile, history_path
from cluster.jobstate import RESTARTING_ACTIONS, JobState
from cluster.journal import Journal, read_events
from cluster.keys import make_or_read_keys, make_transfer_key
from cluster.lease import LeaseKeeper
from cluster.lemons import Standing, standings
from cluster.planning import planned
from cluster.remembering import Remembering, remembered
from cluster.returning import remind
from cluster.rundir import Endpoint, RunDir, write_atomically
from cluster.scheduler import Scheduler, open_scheduler
from cluster.state import replay
from cluster.supervisor import Supervisor
from cluster.unfinished import find_unfinished
from cluster.watchers import Watcher, Watchers
from cluster.wire import SupervisorSocket
from configs.load import ConfigError, Problem, describe_changes, load_job, resolve_toml
from configs.schema import JobConfig
from configs.shrinking import words_about_sizes
from trainer.exits import ExitCode
from trainer.paths import transfer_key_path

_EVALUATION_POLL_S = 0.05

logger = logging.getLogger("everstep.run")


def run_job(
    config: JobConfig,
    watcher: Watcher,
    newest_snapshot: Callable[[Path], int],
    raise_fence: Callable[[Path, int], None],
    open_scheduler: Callable[[JobConfig, RunDir, Mapping[str, str]], Scheduler] = open_scheduler,
) -> ExitCode:
    """Run the job in this process until it is done or must stop.

    newest_snapshot: step of the newest snapshot below a run directory that verifies, -1 if there is none. raise_fence:
    nobody who knows only generations before this one may commit a snapshot below a run directory any more.

    Raises:
        ConfigError: if the run exists and the configuration would make it another run.
        RunInUseError: if another supervisor has it.
    """
    run_dir = RunDir.of(config)
    run_dir.create()
    lock = run_dir.lock()
    try:
        watchers = Watchers(FenceWatcher(partial(raise_fence, run_dir.path)), watcher)
        return _run_locked(config, run_dir, watchers, newest_snapshot, open_scheduler(config, run_dir, os.environ))
    finally:
        os.close(lock)


def _run_locked(
    config: JobConfig,
    run_dir: RunDir,
    watcher: Watcher,
    newest_snapshot: Callable[[Path], int],
    scheduler: Scheduler,
) -> ExitCode:
    state = replay(read_events(run_dir.events))
    handles = {name: node.handle for name, node in state.nodes.items() if node.handle}
    fit = {name: handle for name, handle in handles.items() if name not in state.evicted}
    taking_over = state.exit_code is None and any(scheduler.alive(handle) for handle in fit.values())
    _accept_config(config, run_dir, taking_over)
    for node, handle in handles.items():
        # Without a take-over nobody may be left; with one, an evicted node that its supervisor did not get to kill.
        if scheduler.alive(handle) and not (taking_over and node in fit):
            scheduler.kill(node, handle)
    evaluations = Evaluations(config, run_dir)
    evaluations.open()
    if not taking_over:
        scheduler.close()
        if newest_snapshot(run_dir.path) >= config.training.steps:
            _finish_evaluations(evaluations, Journal(run_dir.events), watcher)
            return ExitCode.DONE
    history = HistoryFile(history_path(config, run_dir.path.parent))
    memory = Remembering(watcher, history, config.run.name, here=config.cluster.backend == "local")
    memory.open()
    host = own_address(config.cluster, socket.gethostname())
    with _listening(run_dir, host) as ears, _leased(run_dir, host) as keeper:
        told = Watchers(memory, keeper, evaluations)
        supervisor = Supervisor(
            config, run_dir, scheduler, ears, Journal(run_dir.events), state, fit if taking_over else {}, told,
            evaluations,
        )  # fmt: skip
        with _signals(supervisor):
            if taking_over:
                memory.adopt(list(fit), time.time())
            _begin(supervisor, config, run_dir, state, scheduler, history, taking_over)
            code = supervisor.run()
        scheduler.close()
        return code


def _finish_evaluations(evaluations: Evaluations, journal: Journal, watcher: Watcher) -> None:
    """What the last supervisor of a run that is done left to do."""
    try:
        while evaluations.lingers(ExitCode.DONE, 0):
            evaluations.on_tick()
            for fact in evaluations.take_facts():
                event = events.WorkersReported(t_wall_s=time.time(), t_mono_s=time.monotonic(), fact=fact)
                journal.append(event)
                watcher.on_event(event)
            time.sleep(_EVALUATION_POLL_S)
    finally:
        evaluations.lingers(ExitCode.REQUEUE, 0)


def _begin(
    supervisor: Supervisor,
    config: JobConfig,
    run_dir: RunDir,
    state: JobState,
    scheduler: Scheduler,
    history: HistoryFile,
    taking_over: bool,
) -> None:
    if taking_over:
        supervisor.emit(events.SupervisorTookOver, supervisor_pid=os.getpid())
        _adopt(supervisor, state, run_dir)
    else:
        supervisor.emit(
            events.RunStarted,
            run=config.run.name,
            attempt=state.attempt + 1,
            supervisor_pid=os.getpid(),
            target_steps=config.training.steps,
            nodes=config.cluster.nodes,
            sizes=words_about_sizes(config),
        )
        past = history.read()
        if past.skipped:
            logger.warning("%s: %d lines could not be read and are skipped", history.path, past.skipped)
        known = standings(past.entries, time.time(), config.cluster.burn_in_hours)
        _start_agents(supervisor, config, scheduler, known)


def _accept_config(config: JobConfig, run_dir: RunDir, taking_over: bool) -> None:
    """Keep the run what it was: refuse changes that would make it another run, and write the others down."""
    text = resolve_toml(config)
    if run_dir.config.exists():
        changes = describe_changes(load_job(run_dir.config), config)
        refused = [change for change in changes if not change.allowed]
        if refused:
            raise ConfigError(
                [Problem(c.key, c.new, f"run {config.run.name!r} has {c.old!r}: {c.why}") for c in refused]
            )
        if changes and taking_over:
            raise ConfigError(
                [
                    Problem(c.key, c.new, f"the run is under way with {c.old!r}; stop it first (Ctrl-C, SIGTERM)")
                    for c in changes
                ]
            )
    write_atomically(run_dir.config, text.encode())


def _start_agents(supervisor: Supervisor, config: JobConfig, scheduler: Scheduler, known: Sequence[Standing]) -> None:
    """Start as many nodes as are wanted, without those that this run evicted or that earlier runs say to leave out."""
    wanted = config.cluster.nodes + config.cluster.spares
    again = _readmitted(supervisor, remembered(supervisor.state.evicted, known))

    def usable(found: Sequence[str]) -> int:
        past = remembered(found, known)
        out = {name for name, standing in past.items() if standing.place is events.Place.OUT}
        return sum(name not in out and (name in again or name not in supervisor.state.evicted) for name in found)

    all_names = scheduler.node_names(
        wanted + len(supervisor.state.evicted) + len(known), usable, lambda: supervisor.interrupts > 0
    )
    past = remembered(all_names, known)
    for name, reason in _readmitted(supervisor, past).items():
        supervisor.emit(events.NodeReadmitted, node=name, reason=reason)
    evicted = supervisor.state.evicted
    out = {name for name, standing in past.items() if standing.place is events.Place.OUT}
    names = [name for name in all_names if name not in evicted and name not in out][:wanted]
    for name in all_names[: all_names.index(names[-1]) + 1 if len(names) == wanted else None]:
        standing = past.get(name)
        if standing is not None and name not in evicted and (standing.failures or name in out):
            remind(supervisor, name, standing)
    for name in names:
        supervisor.handles[name] = scheduler.start(name)
        supervisor.emit(events.AgentStarted, node=name, handle=supervisor.handles[name])


def _readmitted(supervisor: Supervisor, past: Mapping[str, Standing]) -> Mapping[str, str]:
    """Nodes that this run evicted, and a person has readmitted since, and why."""
    evicted_s = {
        each.node: each.t_wall_s
        for each in read_events(supervisor.run_dir.events)
        if isinstance(each, events.NodeEvicted)
    }
    return {
        name: past[name].reason
        for name in supervisor.state.evicted
        if name in past and past[name].readmitted_wall_s > evicted_s.get(name, float("inf"))
    }


def _adopt(supervisor: Supervisor, state: JobState, run_dir: RunDir) -> None:
    """Take up the newest planned generation, and what the last supervisor did not come to."""
    found = read_events(run_dir.events)
    _adopt_plan(supervisor, state, found)
    supervisor.deciding.take_up(find_unfinished(found))


def _adopt_plan(supervisor: Supervisor, state: JobState, found: list[events.AnyEvent]) -> None:
    """Without a plan the agents are still waiting for their first."""
    plans = [event for event in found if isinstance(event, events.GenerationPlanned)]
    if not state.generation or not plans or not state.order:
        return
    last = plans[-1]
    later = found[found.index(last) :]
    decided = any(isinstance(e, events.ActionTaken) and e.action in RESTARTING_ACTIONS for e in later)
    supervisor.adopt(
        planned(last),
        last.gather,
        state.order,
        decided,
    )


@contextlib.contextmanager
def _listening(run_dir: RunDir, host: str) -> Iterator[SupervisorSocket]:
    ears = SupervisorSocket(make_or_read_keys(run_dir.keys), host)
    make_transfer_key(transfer_key_path(run_dir.path))
    port = ears.bind()
    run_dir.write_endpoint(Endpoint(host=ears.host, port=port, pid=os.getpid()))
    try:
        yield ears
    finally:
        ears.close()
        run_dir.endpoint.unlink(missing_ok=True)


@contextlib.contextmanager
def _leased(run_dir: RunDir, host: str) -> Iterator[LeaseKeeper]:
    keeper = LeaseKeeper(run_dir.lease, host)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()


@contextlib.contextmanager
def _signals(supervisor: Supervisor) -> Iterator[None]:
    before: Mapping[signal.Signals, object] = {
        number: signal.signal(number, lambda n, _frame: supervisor.interrupt(n))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
