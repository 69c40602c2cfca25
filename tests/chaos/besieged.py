"""The faults themselves: each is drawn by the dice, done to a job under siege, and waited out."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpointing import disk
from tests.chaos.bucket import OUTAGES, sensors
from tests.chaos.damage import (
    damage_file,
    damage_segment,
    good_snapshots,
    noticed_in_run,
    noticed_on_node,
    paused,
    shard_files,
    snapshot_files,
)
from tests.chaos.instants import Slot
from tests.chaos.siege import Siege
from tests.chaos.storage import FailingDisk, Volume
from trainer.events import Phase

_TARGETS = (*["worker"] * 6, *["node"] * 2, *["supervisor"] * 2, "supervisor and worker", "both nodes", "everything")
_MEMORY_LOST = ("both nodes", "both nodes", "everything")
_HOW = ("flipped", "flipped", "truncated", "removed")
_PARTS = ("body", "body", "header", "control block")


@dataclass(frozen=True)
class Disks:
    """What a job's snapshots are written to. node_root: this run's folder on the nodes' own disk."""

    run: Volume
    node: Volume
    node_root: Path
    failing: FailingDisk


class Besieger:
    """Does faults to one job."""

    def __init__(self, siege: Siege, disks: Disks) -> None:
        self.siege = siege
        self.disks = disks
        self.dice: random.Random = siege.dice

    def fault(self) -> None:
        """One random fault, until the run has recovered from it, and all that must hold has been checked."""
        siege = self.siege
        siege.remember_good()
        mark = siege.mark()
        kinds = (self.kill, self.kill_twice, self.damage, self.damage_memory, self.outage, self.bucket_outage)
        self.dice.choices(kinds, weights=(4, 2, 3, 3, 3, 2))[0]()
        siege.await_copies(mark)
        siege.check()

    # Kills --------------------------------------------------------------------------------------------------------

    def kill(self, target: str | None = None) -> None:
        """Kill somebody at a random instant of what goes on with snapshots."""
        siege = self.siege
        strike = siege.aim(target or self.dice.choice(_TARGETS))
        instants = siege.instants
        looks: dict[str, Callable[[], bool] | None] = {
            "staging": instants.staging,
            "replicating": instants.replicating,
            "handing over to the disk": instants.persisting,
            "writing a shard": instants.writing,
            "committing": instants.committing,
            "reading back": instants.verifying,
            "pruning": instants.pruning,
            "anything": None,
        }
        instant = self.dice.choice([*looks, *sensors()])
        mark = siege.mark()
        if instant in looks:
            siege.tell(siege.strike(strike, instant, looks[instant]))
        else:
            with siege.bucket.seen(instant) as look:
                siege.tell(siege.strike(strike, instant, look))
        siege.await_step(mark, strike.restarts)
        siege.await_supervisor()

    def kill_twice(self) -> None:
        """Kill somebody, and somebody else while the run comes back from that."""
        siege, instants = self.siege, self.siege.instants
        first = siege.aim(self.dice.choice([*["worker"] * 3, *["node"] * 2, "both nodes", "everything"]))
        mark = siege.mark()
        siege.tell(siege.strike(first, "anything", None))
        first_done = siege.generation()
        looks: dict[str, Callable[[], bool]] = {
            "planning": lambda: siege.generation() > mark.generation,
            "gathering": instants.gathering,
            "building": lambda: instants.in_phase(Phase.BUILDING, first_done),
            "loading": lambda: instants.in_phase(Phase.LOADING, first_done),
        }
        instant = self.dice.choice(list(looks))
        siege.wait(looks[instant], instant, timeout_s=60.0) if instant != "gathering" else None
        second = siege.aim(self.dice.choice(["worker", "worker", "node", "supervisor"]))
        siege.tell(siege.strike(second, instant, looks[instant]))
        siege.await_step(mark, True)
        siege.await_supervisor()

    # Damage -------------------------------------------------------------------------------------------------------

    def damage(self) -> None:
        """Damage something that lies on a disk or in the bucket, and most of the time have it needed."""
        siege = self.siege
        places: Sequence[Callable[[], str]] = (
            self._damage_run, self._damage_run, self._damage_node_disk,
            self._damage_bucket, self._lose_run,
        )  # fmt: skip
        mark = siege.mark()
        strike = siege.aim(self.dice.choice(_MEMORY_LOST if self.dice.random() < 0.6 else _TARGETS))
        words = ""
        while not words and not siege.done:
            words = self.dice.choice(places)()
            siege.tend()
        siege.tell(words)
        if siege.floor == (-1, -1) and self.dice.random() < 0.5:
            self._begin_bucket_outage()
        struck = self.dice.random() < 0.7
        if struck:
            threading.Event().wait(self.dice.choice([0.0, 0.3]) * self.dice.random())
            strike.act()
            siege.tell(f"  then {strike.name} killed")
        siege.await_step(mark, struck and strike.restarts)
        siege.lift()
        siege.await_supervisor()

    def damage_memory(self) -> None:
        """A bit of what would be loaded: a rank's newest snapshot in memory, or its newest copy on a peer. All workers
        stand still while it is damaged, and never move again: it is still the newest when all go on from it."""
        siege = self.siege
        members = siege.members()
        ranks = {rank: members[rank // 2] for rank in range(2 * len(members))}
        pids = [siege.process_of(node, rank) for rank, node in ranks.items()]
        victim = self.dice.choice(sorted(ranks))
        of_copy = self.dice.random() < 0.5
        strike = siege.aim_at_node(ranks[victim]) if of_copy else siege.aim(self.dice.choice(["worker"] * 3 + ["node"]))
        mark = siege.mark()
        words = ""
        with contextlib.suppress(ProcessLookupError), contextlib.ExitStack() as stack:
            for pid in pids:
                stack.enter_context(paused(pid))
            threading.Event().wait(self.dice.choice([0.0, 0.05, 0.2]))  # the newest copies may be on their way
            found = siege.instants.copies() if of_copy else siege.instants.slots()
            words = self._flip([slot for slot in found if slot.whole and slot.whole.rank == victim])
            strike.act()
        siege.tell(f"{words or 'nothing'}; then {strike.name} killed")
        siege.await_step(mark, strike.restarts)
        siege.await_supervisor()

    def _flip(self, slots: Sequence[Slot]) -> str:
        """A bit of the newest of them, or now and then of an older one."""
        newest_first = sorted(slots, key=lambda slot: slot.whole.age if slot.whole else (-1, -1), reverse=True)
        if not newest_first:
            return ""
        slot = newest_first[0] if self.dice.random() < 0.8 else self.dice.choice(newest_first)
        assert slot.whole is not None
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), paused(self.siege.agent_of(slot.node)):
            return damage_segment(slot, slot.whole, self.dice.choice(_PARTS), self.dice)
        return ""

    def _damage_run(self) -> str:
        """A shard or the manifest of a snapshot in the run directory; another good one stays."""
        siege = self.siege
        good = good_snapshots(siege.job.run_dir)
        if len(good) < 2:
            return ""
        step = self.dice.choice(sorted(good))
        try:
            path = self.dice.choice(snapshot_files(siege.job.run_dir, step, self.dice.choice(["manifest", "shards"])))
        except ValueError:
            return ""  # retention was faster
        done = damage_file(path, self.dice.choice(_HOW), self.dice, noticed_in_run(siege.job.run_dir, path))
        if done is None:
            return ""
        siege.damages.append(done)
        siege.destroyed.add(good[step])
        siege.lower_floor()
        return f"{done.what} in the run directory"

    def _damage_node_disk(self) -> str:
        """A shard or its sidecar on a node's own disk."""
        node_dir = self.disks.node_root / self.dice.choice(self.siege.members())
        files = shard_files(node_dir)
        if not files:
            return ""
        path = self.dice.choice(files)
        done = damage_file(path, self.dice.choice(_HOW), self.dice, noticed_on_node(node_dir, path))
        if done is None:
            return ""
        self.siege.damages.append(done)
        return f"{done.what} on a node's disk"

    def _damage_bucket(self) -> str:
        """An object of a snapshot in the bucket; another good one stays."""
        siege = self.siege
        done = siege.bucket.damage()
        if done is None:
            return ""
        good = [age for age in siege.bucket.good() if age != done[1]]
        siege.bucket_floor = min(siege.bucket_floor, max(good, default=(-1, -1)))
        return done[0]

    def _lose_run(self) -> str:
        """All snapshots of the run directory, where the bucket has one."""
        siege = self.siege
        if siege.bucket.newest_good((0, 0)) < (0, 0):
            return ""
        for step in disk.all_steps(siege.job.run_dir):
            shutil.rmtree(disk.step_dir(siege.job.run_dir, step), ignore_errors=True)
        siege.floor = (-1, -1)
        return "all snapshots of the run directory removed"

    # Outages ------------------------------------------------------------------------------------------------------

    def outage(self) -> None:
        """A disk is full, fails or takes nothing for some steps; sometimes somebody is killed meanwhile."""
        siege = self.siege
        volume, where = self.dice.choice([(self.disks.run, "the run directory"), (self.disks.node, "the nodes' disk")])
        kind = self.dice.choice(["full", "read-only", "write", "fsync", "read", "any"])
        mark = siege.mark()
        before = siege.floor
        if not self._begin_outage(kind, volume):
            return
        siege.tell(f"{where}: {kind}")
        length = self.dice.randint(1, 5)
        if self.dice.random() < 0.4 and kind not in ("read", "any"):
            threading.Event().wait(self.dice.random())
            strike = siege.aim(self.dice.choice(["worker", "node", "supervisor"]))
            siege.tell(f"  {siege.strike(strike, 'anything', None)}")
            siege.await_step(mark, strike.restarts)
        siege.wait(lambda: siege.mark().step >= mark.step + length, f"{length} steps more")
        siege.lift()
        siege.tell("  all is well again")
        siege.wait(
            lambda: max(disk.committed_ages(siege.job.run_dir), default=(-1, -1)) > before, "a snapshot after it"
        )
        siege.await_supervisor()

    def bucket_outage(self) -> None:
        """S3 answers with errors, slowly, in parts, or not at all; sometimes somebody is killed meanwhile."""
        siege = self.siege
        mark = siege.mark()
        before = siege.bucket_floor
        self._begin_bucket_outage()
        length = self.dice.randint(2, 8)
        if self.dice.random() < 0.4:
            strike = siege.aim(self.dice.choice(["worker", "worker", "node", "supervisor"]))
            siege.tell(f"  {siege.strike(strike, 'anything', None)}")
            siege.await_step(mark, strike.restarts)
        siege.wait(lambda: siege.mark().step >= mark.step + length, f"{length} steps more")
        siege.lift()
        siege.tell("  S3 is well again")
        siege.wait(
            lambda: max(siege.bucket.committed(), default=(-1, -1)) > before, "a snapshot in the bucket after it"
        )
        siege.await_supervisor()

    def _begin_bucket_outage(self) -> None:
        siege = self.siege

        def lift() -> None:
            siege.lift, siege.unreadable = lambda: None, False
            siege.bucket.heal()

        siege.lift, siege.unreadable = lift, True
        how = self.dice.choice(OUTAGES)
        siege.bucket.fail(how)
        siege.tell(f"S3: {how}")

    def _begin_outage(self, kind: str, volume: Volume) -> bool:
        siege = self.siege

        def lift() -> None:
            siege.lift, siege.unreadable = lambda: None, False
            self.disks.failing.heal()
            volume.heal()

        siege.lift = lift
        if kind == "full":
            volume.fill()
            with contextlib.suppress(OSError):
                (volume.path / "ballast").open("r+b").truncate(self.dice.randrange(volume.size_bytes // 2))
            return True
        if kind == "read-only":
            if not volume.read_only():
                lift()
                return False
            return True
        operations = ("read", "write", "fsync") if kind == "any" else (kind,)
        siege.unreadable = "read" in operations
        self.disks.failing.fail(volume.path, operations, self.dice.choice([30, 100]))
        return True
