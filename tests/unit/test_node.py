"""A node as its agent has it: what its workers had to say, and how they ended, is told right."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from checkpointing.segment import segment_name
from cluster.keys import make_transfer_key
from cluster.messages import Assignment
from cluster.node import Node
from cluster.rundir import RunDir
from configs.load import load_job
from tests.files import few_files
from trainer.events import Fact, FactKind, Phase, WorkerError, append_line
from trainer.paths import error_path, facts_path, rank_log, segments_dir, transfer_key_path


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """An agent's node, without workers."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    make_transfer_key(transfer_key_path(run_dir.path))
    node = Node(run_dir, load_job("demo", ("--checkpoint.ram_dir", str(tmp_path / "ram"))), "node0", "127.0.0.1")
    node.open()
    yield node
    node.close()


def test_what_the_next_agent_of_the_node_has_made_stays(node: Node) -> None:
    """Promise: an agent that was given up, and hears of it late, frees nothing of its successor's."""
    former = Node(node.run_dir, node.config, "node0", "127.0.0.1")
    former.open()
    node_of_now = Node(node.run_dir, node.config, "node0", "127.0.0.1")
    node_of_now.open()
    slot = segments_dir(node.ram_dir) / segment_name(0, 0)
    slot.write_bytes(b"")
    former.close()
    assert slot.exists()
    node_of_now.close()
    assert not node.ram_dir.exists()


def test_facts_come_before_readiness(node: Node) -> None:
    """Promise: workers that were killed right after they distrusted a snapshot are not given the same one again."""
    fact = Fact(kind=FactKind.SNAPSHOT_DISTRUSTED, node="node0", rank=0, generation=1, step=9, t_wall_s=1.0)
    append_line(facts_path(node.ram_dir, 0), fact)
    node.take_inventory()
    assert [numbered.fact for numbered in node.state.report().facts] == [fact]


def test_a_line_that_is_no_fact_and_a_file_that_cannot_be_read_lose_no_other(node: Node) -> None:
    """Promise: what one worker writes, or a moment without files left, keeps nobody's facts from being told."""
    first = Fact(kind=FactKind.FIRST_STEP, node="node0", rank=0, generation=1, step=9, t_wall_s=1.0)
    second = msgspec.structs.replace(first, step=10)
    append_line(facts_path(node.ram_dir, 0), first)
    with facts_path(node.ram_dir, 0).open("a") as file:
        file.write("\x00 torn\n")
    append_line(facts_path(node.ram_dir, 0), second)
    append_line(facts_path(node.ram_dir, 1), first)
    with few_files():
        node.forward_facts()
    assert node.state.report().facts == ()
    node.forward_facts()
    assert [numbered.fact for numbered in node.state.report().facts] == [first, second, first]


def test_a_worker_is_judged_by_its_own_words(node: Node) -> None:
    """Promise: what the last generation's worker wrote into the same log says nothing about this one's end."""
    log = rank_log(node.run_dir.path, "node0", 0)
    log.write_text("CUDA error: uncorrectable ECC error encountered\n")
    plan = Assignment(
        generation=2, place=0, nodes=2, ranks_per_node=2, store_host="127.0.0.1", store_port=1, ram_step=-1
    )  # fmt: skip
    node.worker_argument(plan)
    assert node.worker_exit(0, None, signal.SIGSEGV).log_tail == ()
    with log.open("a") as file:
        file.write("Fatal Python error: Segmentation fault\n")
    end = node.worker_exit(0, None, signal.SIGSEGV)
    assert end.log_tail == ("Fatal Python error: Segmentation fault",)
    assert (end.oom_kill, end.oom_scope) == (False, "")
    assert end.ram_free_bytes > 0


def test_an_error_is_dated_when_it_was_raised(node: Node) -> None:
    """Promise: of two workers that are found dead together, the one that failed first can be told."""
    error = WorkerError(
        rank=1, step=3, phase=Phase.DATA, type="IndexError", message="5", traceback="...", exit_code=1
    )  # fmt: skip
    path = error_path(node.ram_dir, 1)
    path.write_bytes(msgspec.json.encode(error))
    os.utime(path, (1000.0, 1000.0))
    end = node.worker_exit(1, 1, None)
    assert (end.error, end.t_wall_s) == (error, 1000.0)
    assert node.worker_exit(0, 1, None).t_wall_s > 1e9
