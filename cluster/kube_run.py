"""The entry of the supervisor's pod: `python -m cluster.kube_run JOB_FILE KEY_FOLDER`.

It keeps `everstep run` going: waits until the last supervisor's hold on the run has ended, starts one that failed
again, and goes on after a requeue. When the run is over, it says so to all pods of this submission, and they end what
they run. That takes more than an exit code: a supervisor that cannot start, since a name is not found just now, says
nothing about the run, which may be training. The journal has the run's end, in its own words.

SIGTERM has two meanings. If all of the job is being deleted or suspended, the run saves and leaves. If only this pod
goes, with its node, training has no reason to stop: the supervisor ends at once, and the next pod's takes over.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import msgspec

from cluster.events import RunStarted, RunStopped
from cluster.journal import tail
from cluster.kube_calls import KubeApi, KubeError
from cluster.kube_client import KubeClient
from cluster.kube_echo import copied
from cluster.kube_key import link_keys, submission_of
from cluster.kube_names import Inside, inside
from cluster.kube_orders import Ended, pods_folder, read_ended, write_ended
from cluster.kube_orphans import reap_orphans
from cluster.kube_paths import workload_path
from cluster.kube_workloads import FOR_GOOD
from cluster.rundir import GARBLED, RunDir, safe_name, write_atomically
from configs.load import load_job
from trainer.exits import ExitCode

_TICK_S = 0.1
_LOCK_POLL_S = 1.0
_SAY_EVERY_S = 60.0
_REAP_S = 5.0
_REQUEUE_S = 30.0
_PAUSES_S = (5.0, 300.0)
_ATTEMPTS = 5
"""In this pod; then the Job makes another one, elsewhere perhaps."""
_STEADY_S = 600.0
"""A supervisor that lived so long does not count as one that cannot start."""

logger = logging.getLogger("everstep.pod")


class SupervisorEntry:
    """Keeps one run's supervisor going.

    all_ends: whether the whole job is going, asked once, on SIGTERM. prepare: done before each start, while nobody
    else has the run. pauses_s: after the first failure, and at most; it doubles in between.
    """

    def __init__(
        self,
        run_dir: RunDir,
        command: Sequence[str],
        submission: str,
        all_ends: Callable[[], bool],
        to: IO[bytes],
        requeue_s: float = _REQUEUE_S,
        pauses_s: tuple[float, float] = _PAUSES_S,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir = run_dir
        self.command = command
        self.submission = submission
        self.all_ends = all_ends
        self.to = to
        self.requeue_s = requeue_s
        self.pauses_s = pauses_s
        self.prepare = prepare
        # Set by a signal's handler, which may interrupt anything: no lock is in it.
        self._told = False

    def terminate(self) -> None:
        """This pod is being taken away."""
        self._told = True

    def run(self) -> int:
        """Until the run is over, or this pod must end; returns its exit code."""
        if (ended := read_ended(self.run_dir.path, self.submission)) is not None:
            logger.info("this submission has ended with %d; a new one needs a new key", ended.exit_code)
            return ended.exit_code
        has_begun(self.run_dir, self.submission)
        failures = 0
        while self._await_lock():
            began_s = time.monotonic()
            code, end = self._attempt()
            if end is not None and end != ExitCode.REQUEUE:
                return self._over(end)
            if self._told:
                break
            if ExitCode.REQUEUE in (code, end):
                logger.info("requeue: the run goes on from its newest snapshot in %.0f s", self.requeue_s)
                self._pause(self.requeue_s)
                failures = 0
                continue
            if not self._lock_is_free():
                continue  # another supervisor was quicker to take the run, which is why ours ended
            failures = 1 if time.monotonic() - began_s > _STEADY_S else failures + 1
            logger.warning("the supervisor ended with %d (%d in a row); training goes on without it", code, failures)
            if failures == _ATTEMPTS:
                return self._give_up(code)
            self._pause(min(self.pauses_s[0] * 2 ** (failures - 1), self.pauses_s[1]))
        return ExitCode.REQUEUE

    def _attempt(self) -> tuple[int, int | None]:
        """Run a supervisor until it ends. Its exit code, and with which one it has ended the run: None if it has not.

        The journal's word counts where there is one: after it, a supervisor may still fail at its report, say.
        """
        journal = self.run_dir.events
        offset = journal.stat().st_size if journal.exists() else 0
        code = self._run_once()
        stopped = [event for event in tail(journal, offset).records if isinstance(event, RunStopped)]
        if stopped:
            return code, stopped[-1].exit_code
        return code, ExitCode.DONE if code == ExitCode.DONE else None

    def _await_lock(self) -> bool:
        """Wait until no supervisor has the run; False if this pod must end before. A file server may need minutes to
        see that a host is gone."""
        say_s = time.monotonic()
        while not self._told:
            if self._lock_is_free(self.prepare):
                return True
            if time.monotonic() >= say_s:
                say_s = time.monotonic() + _SAY_EVERY_S
                logger.info("another supervisor holds the run still; waiting")
            self._pause(_LOCK_POLL_S)
        return False

    def _lock_is_free(self, then: Callable[[], None] = lambda: None) -> bool:
        """Whether nobody has the run; if so, do `then` while nobody can take it."""
        fd = os.open(self.run_dir.path / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            then()
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _run_once(self) -> int:
        """Run the supervisor until it ends; returns its exit code as a shell says it."""
        child = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert child.stdout is not None
        with child.stdout as source, copied(source, self.to, self.run_dir.path / "supervisor.log"):
            reap_s = time.monotonic()
            while child.poll() is None and not self._told:
                if time.monotonic() >= reap_s:
                    reap_s = time.monotonic() + _REAP_S
                    reap_orphans(child.pid)
                time.sleep(_TICK_S)
            if child.poll() is None:
                self._pass_on(child)
            code = child.wait()
        return 128 - code if code < 0 else code

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while not self._told and time.monotonic() < until_s:
            time.sleep(_TICK_S)

    def _pass_on(self, child: subprocess.Popen[bytes]) -> None:
        if self.all_ends():
            logger.info("the whole job is going: the run saves and leaves")
            child.send_signal(signal.SIGTERM)
        else:
            logger.info("only this pod is going: training goes on, and the next supervisor takes over")
            child.kill()

    def _give_up(self, code: int) -> int:
        """Nothing was heard of the run's end, so it may be training, and is left alone: the Job makes another pod. But
        where nothing has begun, input that is bad five times is bad, and nothing is lost by saying so."""
        if code == ExitCode.BAD_INPUT and not has_begun(self.run_dir, self.submission):
            return self._over(code)
        logger.error("%d supervisors in a row failed in this pod; it is for another one to try", _ATTEMPTS)
        return ExitCode.FAILED

    def _over(self, code: int) -> int:
        """The run has ended: every pod leaves with a code of which the failure policies know what it means."""
        said = code if code == ExitCode.DONE or code in FOR_GOOD else int(ExitCode.DO_NOT_RESTART)
        logger.info("the run is over: `everstep run` ended with %d, the job does with %d", code, said)
        write_ended(self.run_dir.path, Ended(submission=self.submission, exit_code=said))
        return said


def has_begun(run_dir: RunDir, submission: str) -> bool:
    """Whether the run was begun since this was first asked for this submission. OSError as the volume has it."""
    path = pods_folder(run_dir.path) / "_since.json"  # no pod's name begins so
    since = _read_since(path)
    if since is None or since.submission != submission:
        since = _Since(submission, run_dir.events.stat().st_size if run_dir.events.exists() else 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.encode(since))
    return any(isinstance(event, RunStarted) for event in tail(run_dir.events, since.offset).records)


class _Since(msgspec.Struct, frozen=True):
    """A submission, and where in the journal what it does begins."""

    submission: str
    offset: int


def _read_since(path: Path) -> _Since | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Since)
    except (FileNotFoundError, *GARBLED):
        return None


def whole_job_ends(here: Inside, api: KubeApi) -> bool:
    """Whether the workload is being deleted, is gone, or is suspended. If nobody can say, yes: saving loses nothing."""
    try:
        workload = api.call("GET", workload_path(here.kind, here.namespace, here.name))
    except KubeError as error:
        logger.warning("whether the whole job is going is not known (%s): the run saves and leaves", error)
        return True
    return bool(workload["metadata"].get("deletionTimestamp")) or bool(workload.get("spec", {}).get("suspend"))


def _asked_of_the_server(environ: Mapping[str, str]) -> Callable[[], bool]:
    here = inside(environ)

    def ask() -> bool:
        try:
            return whole_job_ends(here, KubeClient())
        except ValueError as error:
            logger.warning("whether the whole job is going cannot be asked (%s): the run saves and leaves", error)
            return True

    return ask


def _folder_of(job: Path) -> RunDir:
    """Where the run is, also if this version cannot read the rest of its configuration."""
    try:
        run = tomllib.loads(job.read_text())["run"]
        return RunDir(Path(run["dir"]).absolute() / safe_name(run["name"], "run.name"))
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{job}: run.dir and run.name cannot be read ({error!r}); submit again") from None


def main() -> int:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    job, key = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        submission, run_dir = submission_of(key), _folder_of(job)
        run_dir.create()
    except (ValueError, OSError) as error:
        return _said(error)
    try:
        load_job(job)
        all_ends = _asked_of_the_server(os.environ)
    except (ValueError, OSError) as error:
        code = _said(error)
        if code == ExitCode.BAD_INPUT and not has_begun(run_dir, submission):
            write_ended(run_dir.path, Ended(submission=submission, exit_code=code))
        return code
    command = [sys.executable, "-m", "cluster.cli", "run", str(job)]
    entry = SupervisorEntry(
        run_dir, command, submission, all_ends, sys.stdout.buffer, prepare=partial(link_keys, run_dir, key)
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: entry.terminate())
    return entry.run()


def _said(error: Exception) -> int:
    for line in str(error).splitlines():
        logger.error("%s", line)
    return ExitCode.BAD_INPUT if isinstance(error, ValueError) else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
