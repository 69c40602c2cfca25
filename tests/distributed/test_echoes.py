"""What gloo and torch's store really say when a peer was killed is read as that, and never as a cause."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import msgspec
import pytest

from health.crash import Standing, judge_exit, standing
from health.verdict import Cause
from parallelism.warm import PRELOAD_MODULES
from tests.distributed.echoes import COLLECTIVES, VICTIM, WORLD_SIZE, lose_a_peer
from trainer.events import WorkerError

pytestmark = pytest.mark.distributed


def test_whoever_loses_a_peer_says_so(tmp_path: Path) -> None:
    """Promise: in every collective, and at the store, the survivors of a killed rank are echoes, not roots."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD_MODULES))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    processes = [context.Process(target=lose_a_peer, args=(rank, port, tmp_path)) for rank in range(WORLD_SIZE)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(150)
        assert [process.exitcode for process in processes] == [-9, 0, 0]
    finally:
        for process in processes:
            process.kill()
    found = {}
    for path in sorted(tmp_path.glob("*.json")):
        error = msgspec.json.decode(path.read_bytes(), type=WorkerError)
        verdict = judge_exit("node0", error.rank, 1, None, error, error.message.splitlines(), False, 1)
        found[path.stem] = (verdict.cause, standing(verdict), error.type, error.message[:200])
    told = {name.rpartition("-")[0] for name in found}
    assert told == {*COLLECTIVES, "store", "late store"}
    assert VICTIM == 0
    wrong = {name: what for name, what in found.items() if what[:2] != (Cause.PEER_LOST, Standing.ECHO)}
    assert not wrong, wrong
