"""One rank, from its start arguments to its exit code. A composition root; importing it costs nothing.

Forked by the node's fork server, which has PRELOAD loaded. Everything a rank has to say about its end goes into its
error file, where the agent finds it; the exit code says who should act (`trainer.exits`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import msgspec

from configs.load import load_job
from configs.precision import lowered_to
from configs.shrinking import effective
from configs.timeouts import derive
from trainer.events import Fact, FactKind, Heart, HeartbeatFile, Oddity, Phase, WorkerError, WorkerStart, append_line
from trainer.exits import ExitCode
from trainer.paths import config_path, error_path, facts_path, heartbeat_path, rank_log
from trainer.witness import Witness, log_peers

PRELOAD = ("parallelism.preload", "trainer.preload")

_PR_SET_PDEATHSIG = 1


class DoNotRestartError(Exception):
    """A failure that a restart would only repeat, and that a person must look at."""


class RankContext:
    """What a rank knows about itself before any tensor exists."""

    def __init__(self, start: WorkerStart, rank: int, local_rank: int, world_size: int, heart: Heart) -> None:
        self.start = start
        self.rank = rank
        self.local_rank = local_rank
        self.world_size = world_size
        self.heart = heart
        self.run_dir = Path(start.run_dir)
        self.ram_dir = Path(start.ram_dir)
        self.leave_requested = False

    def note(
        self, kind: FactKind, detail: str = "", seconds: float = 0.0, step: int | None = None,
        generation: int | None = None, oddity: Oddity | None = None, batches: int = 0, blamed: int = -1,
        mended: bool = False,
    ) -> None:  # fmt: skip
        """Tell the agent a fact; it reaches the journal. step, generation: of what it is about, if not of now."""
        fact = Fact(
            kind=kind,
            node=self.start.node,
            rank=self.rank,
            generation=self.start.generation if generation is None else generation,
            step=self.heart.step if step is None else step,
            t_wall_s=time.time(),
            detail=detail,
            seconds=seconds,
            oddity=oddity,
            batches=batches,
            blamed=blamed,
            mended=mended,
        )
        append_line(facts_path(self.ram_dir, self.local_rank), fact)

    def request_leave(self, *_: object) -> None:
        """Signal handler: finish the step, save, and leave together with all other ranks."""
        self.leave_requested = True


def worker_main(start_json: str) -> None:
    """Entry point of a rank under torch elastic. Returns when the rank ended well; exits the process otherwise."""
    started_s = time.monotonic()
    _die_with_parent()
    start = msgspec.json.decode(start_json, type=WorkerStart)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    _redirect_output(rank_log(Path(start.run_dir), start.node, rank))
    slots = HeartbeatFile(heartbeat_path(Path(start.ram_dir)), int(os.environ["LOCAL_WORLD_SIZE"])).open()
    heart = Heart(slots, local_rank, start.generation)
    context = RankContext(start, rank, local_rank, int(os.environ["WORLD_SIZE"]), heart)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, context.request_leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heart.beat(Phase.STARTING, step=0)
    try:
        _run(context, started_s)
    except BaseException as error:  # noqa: BLE001  the border of the process: whatever it is, the agent must learn it
        _report(context, error)
    heart.beat(Phase.FINISHED)


def _run(context: RankContext, started_s: float) -> None:
    import torch
    import torch.distributed as dist

    from trainer.build import build_rank
    from trainer.loop import train

    configured = effective(load_job(config_path(context.run_dir)), context.start.layout)
    config = lowered_to(configured, context.start.recipe)
    timeouts = derive(config)
    witness = Witness(context.ram_dir, context.local_rank, context.rank)
    witness.open(config.health.flight_record_entries, os.environ)
    store = dist.PrefixStore(
        "workers",
        dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=timeouts.store_s),
        ),
    )
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        log_peers(witness, config.health.flight_record_entries)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=context.rank,
        world_size=context.world_size,
        # Hangs are noticed from outside, long before this.
        timeout=timedelta(seconds=timeouts.collective_s),
    )
    with contextlib.ExitStack() as stack:
        train(build_rank(context, config, stack, started_s))
        # Nobody leaves while another still needs it: a peer that is gone looks like a failure.
        dist.barrier()
    dist.destroy_process_group()


def _report(context: RankContext, error: BaseException) -> None:
    code = _exit_code(context, error)
    text = traceback.format_exc()
    record = WorkerError(
        rank=context.rank,
        step=context.heart.step,
        phase=context.heart.phase,
        type=type(error).__name__,
        message=str(error),
        traceback=text,
        exit_code=code,
    )
    sys.stderr.write(text)
    sys.stderr.flush()
    path = error_path(context.ram_dir, context.local_rank)
    tmp = path.with_suffix(".tmp")
    tmp.write_bytes(msgspec.json.encode(record))
    tmp.replace(path)
    # Not sys.exit: threads of a broken process group may never end.
    os._exit(code)


def _exit_code(context: RankContext, error: BaseException) -> int:
    if isinstance(error, DoNotRestartError):
        return ExitCode.DO_NOT_RESTART
    if isinstance(error, ValueError) and context.heart.phase in (Phase.STARTING, Phase.BUILDING):
        return ExitCode.BAD_INPUT
    return ExitCode.FAILED


def _die_with_parent() -> None:
    """Have the kernel kill this process when the fork server dies, which dies when the agent does."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(ExitCode.FAILED)


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
