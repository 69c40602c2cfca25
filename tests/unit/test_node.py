"""A node as its agent has it: what its workers had to say is known before it is asked for the next plan."""

from __future__ import annotations

from pathlib import Path

from cluster.keys import make_transfer_key
from cluster.node import Node
from cluster.rundir import RunDir
from configs.load import load_job
from trainer.events import Fact, FactKind, append_line
from trainer.paths import facts_path, transfer_key_path


def test_facts_come_before_readiness(tmp_path: Path) -> None:
    """Promise: workers that were killed right after they distrusted a snapshot are not given the same one again."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    make_transfer_key(transfer_key_path(run_dir.path))
    node = Node(run_dir, load_job("demo", ("--checkpoint.ram_dir", str(tmp_path / "ram"))), "node0", "127.0.0.1")
    node.open()
    try:
        fact = Fact(kind=FactKind.SNAPSHOT_DISTRUSTED, node="node0", rank=0, generation=1, step=9, t_wall_s=1.0)
        append_line(facts_path(node.ram_dir, 0), fact)
        node.take_inventory()
        assert [numbered.fact for numbered in node.state.report().facts] == [fact]
    finally:
        node.close()
