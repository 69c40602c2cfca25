"""The agent's background thread that sends committed snapshots of the run directory to the bucket.

What to send is derived each time from what lies here and there, so an agent that restarts, or a job that changed its
ranks, simply goes on. An outage is one event when it begins and one when all has been caught up with; training never
hears of it.
"""

from __future__ import annotations

import enum
import os
import random
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from checkpointing import disk
from checkpointing.layout import MANIFEST_NAME, Manifest, SnapshotDamagedError, decode_document
from checkpointing.ratelimit import RateLimit
from checkpointing.s3 import Bucket, S3Error
from checkpointing.s3_due import Backoff, Served, due_snapshots
from checkpointing.s3_retention import keep_house
from configs.schema import S3Config

_NICENESS = 10
_MAX_WAIT_S = 5.0
_MB = 1e6
_Age = tuple[int, int]  # (generation, step)


class UploadEventKind(enum.StrEnum):
    """What happened to uploads."""

    COMMITTED = "committed"
    BEHIND = "behind"
    CAUGHT_UP = "caught_up"
    FAILED = "failed"


class UploadEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened: for the journal. detail: one line for a person. step, generation: -1 if of no snapshot.

    seconds: of a commit, since its upload began; of catching up, how long the bucket had been behind.
    """

    kind: UploadEventKind
    step: int
    generation: int
    seconds: float
    detail: str
    size_bytes: int = 0


class Uploader:
    """Feeds the bucket from one node. All methods may be called from any thread; `report` is called in its own.

    The run directory is looked at every poll_interval_s: other nodes write it too. backoff: pauses during an outage.
    """

    def __init__(
        self,
        bucket: Bucket,
        run_dir: Path,
        settings: S3Config,
        report: Callable[[UploadEvent], None],
        poll_interval_s: float = 0.5,
        backoff: Backoff | None = None,
    ) -> None:
        self.bucket = bucket
        self.run_dir = run_dir
        self.settings = settings
        self.report = report
        self.poll_interval_s = poll_interval_s
        self._backoff = backoff or Backoff()
        self._limit = RateLimit(settings.max_mb_per_s * _MB)
        self._served: Served | None = None
        self._stopping = False
        self._wanted = threading.Event()
        self._idle = threading.Condition()
        self._rounds = 0
        self._pending = False
        self._catalogue = _Catalogue(run_dir)
        self._job: _Job | None = None
        self._behind_since: float | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="s3-uploader", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def serve(self, ranks: Collection[int], generation: int, world_size: int, last_step: int) -> None:
        """What this node uploads from now on: its ranks' shards; the node with rank 0 also commits and keeps house.

        last_step: training's last one, sent whether or not interval_steps divides it.
        """
        served = Served(ranks=frozenset(ranks), generation=generation, world_size=world_size, last_step=last_step)
        with self._idle:
            self._served = served
            self._pending = True  # until a round has looked
        self._wanted.set()

    def pending(self) -> bool:
        """Whether something was still to be sent, or to be committed by this node, when it last looked."""
        return self._pending

    def flush(self, timeout_s: float) -> bool:
        """Wait until this node has nothing left to send or commit; False if that took longer or the thread died."""
        deadline = time.monotonic() + timeout_s
        with self._idle:
            target = self._rounds + 2  # a round may be under way that looked before this call
            self._wanted.set()
            while self._rounds < target or self._pending:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._thread.is_alive():
                    return False
                if self._rounds < target:
                    self._wanted.set()
                self._idle.wait(min(left_s, self.poll_interval_s))
        return True

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End the thread and what it is sending; False if a request holds it longer than that."""
        self._stopping = True
        self._limit.close()
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # its pools' threads inherit it
        while not self._stopping:
            self._wanted.clear()
            pause_s = self._round_or_words()
            with self._idle:
                self._rounds += 1
                self._idle.notify_all()
            if pause_s > 0:
                self._wanted.wait(pause_s)

    def _round_or_words(self) -> float:
        """One round; whatever goes wrong becomes an event. Returns how long to wait before the next, in seconds."""
        served = self._served
        if served is None:
            return self.poll_interval_s
        if self._job is None or self._job.served != served:
            self._job = _Job(served)
        try:
            more = self._round(self._job)
        except S3Error as error:
            if self._stopping or self._outdated(served):
                return 0.0  # it was interrupted, or is another node's now
            return self._fell_behind(str(error), self._job)
        except Exception as error:  # noqa: BLE001  the thread must outlive it, and it is reported
            return self._fell_behind(f"uploading failed unexpectedly: {type(error).__name__}: {error}", self._job)
        self._failures = 0
        with self._idle:
            if not self._outdated(served):
                self._pending = bool(self._job.left)
        if not self._pending and self._behind_since is not None:
            seconds = time.monotonic() - self._behind_since
            self._behind_since = None
            detail = f"S3: the bucket has caught up after {seconds:.0f} s"
            step, generation = self._job.last_done[1], self._job.last_done[0]
            self._say(UploadEventKind.CAUGHT_UP, step, generation, seconds, detail)
        return 0.0 if more else self._job.wait_s(self.poll_interval_s)

    def _outdated(self, served: Served) -> bool:
        return self._served != served

    def _fell_behind(self, why: str, job: _Job) -> float:
        self._failures += 1
        self._pending = True
        job.tidied = False  # what could not be aborted now is aborted then
        if self._behind_since is None:
            self._behind_since = time.monotonic()
            generation, step = max(job.left, default=(-1, -1))
            detail = f"the bucket is behind, training goes on: {why}"
            self._say(UploadEventKind.BEHIND, step, generation, 0.0, detail)
        return self._backoff.pause_s(self._failures, random.random())

    def _round(self, job: _Job) -> bool:
        """Send or commit what can be now; True if there may be more to do at once. S3Error."""
        served = job.served
        local = self._catalogue.manifests()
        wanted = [
            manifest
            for manifest in local
            if served.wants(manifest, self.settings.interval_steps) and _age(manifest) not in job.settled
        ]
        job.left = {_age(manifest) for manifest in wanted}
        if not job.tidied:
            shards = {shard.rank for manifest in local for shard in manifest.shards if served.owns(shard.rank)}
            self.bucket.abort_leftovers(served.ranks | shards, older_than_s=0.0)
            job.tidied = True
        if wanted:
            due = due_snapshots(wanted, self.bucket.committed(), self.settings)
            job.settled |= job.left - {_age(manifest) for manifest in due}
            job.left -= job.settled
            if self._send_newest(job, due):
                return True
            if served.commits and self._commit(job, due):
                job.house_due = True
        if job.house_due:
            keep_house(self.bucket, job.left)
            job.house_due = False
        return False

    def _send_newest(self, job: _Job, due: list[Manifest]) -> bool:
        """Send this node's shards of the newest snapshot that still lacks them. True if there was one: look again, as
        a newer one may have come meanwhile."""
        unsent = next((manifest for manifest in due if _age(manifest) not in job.sent), None)
        if unsent is None:
            return False
        job.began.setdefault(_age(unsent), time.monotonic())
        try:
            for shard in job.served.shards(unsent):
                path = disk.step_dir(self.run_dir, unsent.step) / shard.file
                self.bucket.upload(path, unsent.step, shard.file, self._limit, self._stop_for(job), shard.checksum)
        except (OSError, SnapshotDamagedError) as error:
            if _age(unsent) in {_age(manifest) for manifest in self._catalogue.manifests()}:  # else removed meanwhile
                self._give_up(job, unsent, f"step {unsent.step} cannot be sent to S3: {error}")
            return True
        job.sent.add(_age(unsent))
        if not job.served.commits:
            job.settled.add(_age(unsent))
        job.last_done = max(job.last_done, _age(unsent))
        return True

    def _commit(self, job: _Job, due: list[Manifest]) -> bool:
        """Commit every snapshot whose shards have all arrived; True if there was one."""
        any_committed = False
        for manifest in due:
            try:
                path = disk.step_dir(self.run_dir, manifest.step) / MANIFEST_NAME
                data = path.read_bytes()
                if decode_document(data, Manifest, str(path)) != manifest:
                    continue
            except (OSError, SnapshotDamagedError):
                continue  # removed or replaced meanwhile: the next round sees what is there then
            refusal = self.bucket.refusal(manifest, data)
            if refusal is None:
                any_committed = True
                self._committed(job, manifest)
            elif refusal.final:
                self._give_up(job, manifest, refusal.why)
        return any_committed

    def _committed(self, job: _Job, manifest: Manifest) -> None:
        job.settled.add(_age(manifest))
        job.left.discard(_age(manifest))
        job.last_done = max(job.last_done, _age(manifest))
        job.rounds_waited = 0
        size_bytes = sum(shard.size_bytes for shard in manifest.shards)
        seconds = time.monotonic() - job.began.get(_age(manifest), time.monotonic())
        detail = f"S3: step {manifest.step}: {len(manifest.shards)} shards committed"
        self._say(UploadEventKind.COMMITTED, manifest.step, manifest.generation, seconds, detail, size_bytes)

    def _give_up(self, job: _Job, manifest: Manifest, why: str) -> None:
        job.settled.add(_age(manifest))
        job.left.discard(_age(manifest))
        self._say(UploadEventKind.FAILED, manifest.step, manifest.generation, 0.0, why)

    def _stop_for(self, job: _Job) -> Callable[[], bool]:
        """Uploads end with the thread, and when their shard may have become another node's."""

        def stop() -> bool:
            now = self._served
            return (
                self._stopping
                or now is None
                or (now.ranks, now.world_size)
                != (
                    job.served.ranks,
                    job.served.world_size,
                )
            )

        return stop

    def _say(
        self, kind: UploadEventKind, step: int, generation: int, seconds: float, detail: str, size_bytes: int = 0
    ) -> None:
        self.report(
            UploadEvent(
                kind=kind, step=step, generation=generation, seconds=seconds, detail=detail, size_bytes=size_bytes
            )
        )


class _Job:
    """What the thread remembers while it serves the same ranks: only to ask less, all of it could be found out again.

    settled: nothing more is to be done for these; sent: this node's shards are there; left: still to be done.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self.settled: set[_Age] = set()
        self.sent: set[_Age] = set()
        self.left: set[_Age] = set()
        self.began: dict[_Age, float] = {}
        self.last_done: _Age = (-1, -1)
        self.tidied = False
        self.house_due = False
        self.rounds_waited = 0

    def wait_s(self, poll_interval_s: float) -> float:
        """Until the next round, in seconds: longer and longer while others' shards are awaited."""
        if not self.left:
            self.rounds_waited = 0
            return poll_interval_s
        self.rounds_waited += 1
        return min(poll_interval_s * 1.5 ** min(self.rounds_waited, 20), max(_MAX_WAIT_S, poll_interval_s))


class _Catalogue:
    """Sound manifests of the run directory, read again only when they have changed."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._read: dict[int, tuple[tuple[int, int, int], Manifest | None]] = {}

    def manifests(self) -> list[Manifest]:
        """All of them, newest step first."""
        seen: dict[int, tuple[tuple[int, int, int], Manifest | None]] = {}
        for step in disk.all_steps(self.run_dir):
            try:
                status = (disk.step_dir(self.run_dir, step) / MANIFEST_NAME).stat()
            except OSError:
                continue
            signature = (status.st_mtime_ns, status.st_size, status.st_ino)
            known = self._read.get(step)
            seen[step] = known if known is not None and known[0] == signature else (signature, self._sound(step))
        self._read = seen
        return [manifest for _, manifest in seen.values() if manifest is not None]

    def _sound(self, step: int) -> Manifest | None:
        try:
            return disk.read_manifest(self.run_dir, step)
        except SnapshotDamagedError:
            return None


def _age(manifest: Manifest) -> _Age:
    return manifest.generation, manifest.step
