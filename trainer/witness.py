"""A thread in each worker that can still speak when the main thread hangs: on request it writes what torch's flight
recorder knows, and all threads' stacks. It sleeps in the kernel until asked, and costs a step nothing.

Where the process is stopped, or its interpreter's lock is never released, there is no answer, and that says something
too. Of the latter faulthandler still writes stacks, in a signal handler of C. It is only for that case: it walks the
frames of threads that may run meanwhile, and would now and then crash a process that is well.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from types import FrameType

import msgspec

from trainer.flight import FlightFile, GroupRanks, PeerOp, flight_path, request_path, stacks_path

# What torch calls its dumps: of NCCL's collectives, and of all other backends'.
_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_REQUESTS_BYTES = 4096
_FRAMES = 100


class Witness:
    """One rank's witness. `open` starts it, before torch.distributed is initialised."""

    def __init__(self, ram_dir: Path, local_rank: int, rank: int) -> None:
        self.ram_dir = ram_dir
        self.local_rank = local_rank
        self.rank = rank
        self.peer_ops: Callable[[], tuple[PeerOp, ...]] = tuple

    def open(self, entries: int, environment: MutableMapping[str, str]) -> None:
        """Switch the flight recorder on for `entries` collectives (0: leave it as it is), and listen.

        environment: the process' own; torch reads the recorder's size from there with the first process group.
        """
        if entries:
            environment.setdefault("TORCH_FR_BUFFER_SIZE", str(entries))
        stacks = os.open(stacks_path(self.ram_dir, self.local_rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)
        pipe = request_path(self.ram_dir, self.local_rank)
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe, 0o600)
        # Opened for both ways, a read waits for the next request and never sees an end.
        requests = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)
        threading.Thread(target=self._serve, args=(requests,), name="witness", daemon=True).start()

    def _serve(self, requests: int) -> None:
        for number in _numbers(requests):
            try:
                file = self.tell(number)
            except Exception as error:  # noqa: BLE001  the border of the thread: whoever asked must learn it
                file = FlightFile(request=number, rank=self.rank, groups=(), problem=f"{type(error).__name__}: {error}")
            self.answer(file)

    def answer(self, file: FlightFile) -> None:
        """Write the answer to a request; a reader sees a whole one or none."""
        path = flight_path(self.ram_dir, self.local_rank)
        partial = path.with_suffix(".tmp")
        partial.write_bytes(msgspec.json.encode(file))
        partial.replace(path)

    def tell(self, number: int) -> FlightFile:
        """What this process knows of its process groups now."""
        import torch._C._distributed_c10d as recorder

        dumps = [getattr(recorder, name)(True, False) for name in _DUMPS if hasattr(recorder, name)]
        problem = "" if dumps else "this version of torch cannot say what its flight recorder holds"
        return FlightFile(
            request=number,
            rank=self.rank,
            groups=tuple(_groups()),
            peer_ops=self.peer_ops(),
            stacks=_stacks(),
            dumps=tuple(msgspec.Raw(each.encode() if isinstance(each, str) else each) for each in dumps),
            problem=problem,
        )


def log_peers(witness: Witness, limit: int) -> None:
    """Log sends and receipts where torch does not: call it where gloo carries them."""
    from trainer.peerlog import PeerLog

    log = PeerLog(limit)
    log.install()
    witness.peer_ops = log.ops


def _numbers(requests: int) -> Iterator[int]:
    """The newest number of whatever waits in the pipe; what is no number is dropped."""
    while True:
        for line in reversed(os.read(requests, _REQUESTS_BYTES).split()):
            if line.isdigit():
                yield int(line)
                break


def _stacks() -> str:
    """Of all threads but this one, in the format of faulthandler."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    blocks = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines = [f'  File "{at.filename}", line {at.lineno} in {at.name}' for at in _walk(frame)]
            blocks.append("\n".join([f'Thread "{names.get(ident, ident)}" (most recent call first):', *lines]))
    return "\n\n".join(blocks) + "\n"


def _walk(frame: FrameType) -> list[traceback.FrameSummary]:
    """The frames of a stack, innermost first; no source is read."""
    found = [
        traceback.FrameSummary(at.f_code.co_filename, line, at.f_code.co_name, lookup_line=False)
        for at, line in traceback.walk_stack(frame)
    ]
    return found[:_FRAMES]


def _groups() -> Iterator[GroupRanks]:
    """All process groups of this process, of whom torch's dump names only some."""
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d

    for group, ranks in list(c10d._world.pg_group_ranks.items()):
        if isinstance(group, dist.ProcessGroup):
            yield GroupRanks(group.group_name, group.group_desc, tuple(sorted(ranks, key=lambda rank: ranks[rank])))
