"""Crashes that really happen, in whole jobs: each is given its cause and its rank, and training goes on."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from cluster.alert_words import Alert
from cluster.events import VerdictGiven
from health.blame import Blame, blame
from health.verdict import Cause, Verdict
from tests.cgroups import MemoryGroup
from tests.chaos import faults
from tests.chaos.conftest import MakeJob
from tests.chaos.jobs import Job
from tests.chaos.plants import Plant, plant

pytestmark = pytest.mark.chaos


def verdicts(job: Job) -> list[Verdict]:
    """The root of every incident so far."""
    return [event.verdict for event in job.events() if isinstance(event, VerdictGiven) and event.incident]


def test_a_crash_is_charged_to_its_cause_and_its_rank(make_job: MakeJob, tmp_path: Path) -> None:
    """Promise: of four ranks that fail together the one that began it is named, whether it raised or just fell over;
    and who is not looking is told.
    """
    told = tmp_path / "told"
    command = f'["{sys.executable}", "-c", "import sys; open({str(told)!r}, \'a\').write(sys.stdin.read())"]'
    job = make_job("crashing", ("--training.steps", "8", "--alerts.command", command))
    plant(
        job,
        Plant(rank=3, step=3, deed="raise", text="IndexError: index 512 is out of bounds"),
        Plant(rank=1, step=5, deed="segfault", generation=2),
    )
    assert job.start().finish() == 0, job.said()
    raised, fell = verdicts(job)
    assert (raised.cause, raised.rank, raised.node, raised.step) == (Cause.USER_ERROR, 3, "node1", 3)
    assert raised.evidence[1] == "IndexError: index 512 is out of bounds"
    assert (fell.cause, fell.rank, fell.node, fell.fingerprint) == (Cause.WORKER_CRASH, 1, "node0", "SIGSEGV")
    assert (blame(raised), blame(fell)) == (Blame.USER, Blame.SOFTWARE)
    assert job.actions() == ["restart", "restart"]
    alerts = [msgspec.json.decode(line, type=Alert) for line in told.read_text().splitlines()]
    assert [alert.title for alert in alerts] == [
        "user error rank 3 on node1: restart", "worker crash rank 1 on node0: restart", "is done",
    ]  # fmt: skip


WATCHDOG = "Process group watchdog thread terminated with exception: CUDA error: an illegal memory access"
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
LAUNCH = "RuntimeError: CUDA error: unspecified launch failure"
# The first needs a spare; the others make do without one.
CRASHES = [
    ("raise", ECC, Cause.CUDA_ERROR, "gpu: uncorrectable ECC error", Blame.HARDWARE),
    ("kill", "", Cause.WORKER_KILLED, "SIGKILL", Blame.UNKNOWN),
    ("abort", "std::terminate", Cause.WORKER_CRASH, "SIGABRT", Blame.SOFTWARE),
    ("bus error", "", Cause.WORKER_CRASH, "SIGBUS", Blame.UNKNOWN),
    ("exit", "7", Cause.WORKER_CRASH, "exit code 7", Blame.SOFTWARE),
    ("abort", WATCHDOG, Cause.CUDA_ERROR, "gpu: illegal memory access", Blame.SOFTWARE),
    ("raise", LAUNCH, Cause.CUDA_ERROR, "gpu: unspecified launch failure", Blame.UNKNOWN),
    ("raise", "MemoryError: no more", Cause.OUT_OF_MEMORY, "MemoryError: no more", Blame.USER),
]


@pytest.mark.long
def test_every_kind_of_crash_is_told_from_the_others(make_job: MakeJob, dice: random.Random) -> None:
    """Promise: one after the other in one job, each on a rank by chance: cause, rank and blame are right each time."""
    job = make_job("all-crashes", ("--training.steps", str(3 * len(CRASHES) + 3), "--cluster.spares", "2"))
    ranks = [dice.randrange(4) for _ in CRASHES]
    plant(
        job,
        *[
            Plant(rank=rank, step=3 * (at + 1), deed=deed, generation=at + 1, text=text)
            for at, (rank, (deed, text, *_)) in enumerate(zip(ranks, CRASHES, strict=True))
        ],
    )
    assert job.start().finish() == 0, job.said()
    found = [(each.cause, each.rank, each.fingerprint, blame(each)) for each in verdicts(job)]
    assert found == [(cause, rank, mark, who) for rank, (_, _, cause, mark, who) in zip(ranks, CRASHES, strict=True)]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_at_any_instant(make_job: MakeJob, dice: random.Random, number: signal.Signals) -> None:
    """Promise: wherever in its step a rank is hit, in the middle of a collective too, it is the one that is named."""
    job = make_job(f"instant-{number.name}", ("--training.steps", "8")).start()
    job.wait_for_step(3)
    faults.wait_a_part_of_a_step(job, dice)
    rank = dice.randrange(4)
    faults.crash_worker(job.run_dir, f"node{rank // 2}", rank, number)
    assert job.finish() == 0, job.said()
    assert [(each.rank, each.fingerprint) for each in verdicts(job)] == [(rank, number.name)]


@pytest.mark.long
def test_a_real_oom_kill_is_told_from_any_other_kill(make_job: MakeJob) -> None:
    """Promise: the kernel's killer is known by its own count, in a group below the job's; a kill after it is none."""
    with MemoryGroup("everstep-test-rank", 64 << 20) as group:
        job = make_job("eaten", ("--training.steps", "8"))
        plant(
            job,
            Plant(rank=2, step=3, deed="eat", text=str(group.path)),
            Plant(rank=0, step=5, deed="kill", generation=2),
        )
        assert job.start().finish() == 0, job.said()
    eaten, killed = verdicts(job)
    assert (eaten.cause, eaten.rank) == (Cause.OUT_OF_MEMORY, 2)
    assert eaten.evidence[1] == f"the kernel's out-of-memory killer ended it (counted in cgroup {group.path})"
    assert (killed.cause, killed.rank) == (Cause.WORKER_KILLED, 0)
