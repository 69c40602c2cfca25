"""Promise: a node that failed in one run is the last choice of the next, and what was done can be explained."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.events import GenerationPlanned, NodeRemembered, Place
from tests.chaos import faults
from tests.chaos.conftest import MakeJob

pytestmark = pytest.mark.chaos


def everstep(home: Path, *words: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "cluster.cli", *words]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_node_that_failed_is_the_last_spare_of_the_next_run(make_job: MakeJob, home: Path) -> None:
    """Promise: the history outlives the run; members are clean nodes, the other stands by, and `nodes`, `explain` and
    `policy replay` tell the truth about all of it."""
    history = home / "runs" / "site.jsonl"
    few = ("--training.steps", "6", "--cluster.node_history", str(history))
    layout = ("--parallelism.tp", "1", "--cluster.ranks_per_node", "1")
    first = make_job("remembers", (*few, *layout)).start()
    first.wait_for_step(3)
    faults.kill_node(first.run_dir, "node0")
    assert first.finish() == 0, first.said()
    assert first.actions() == ["replace"]

    told = everstep(home, "explain", "1", "--run", "remembers")
    for words in ("node_lost, node0", "not taken: a restart on the same nodes, as node0 is gone", "spares: node2"):
        assert words in told
    assert "back at work" in told
    assert "today it would be" not in told
    assert everstep(home, "policy", "replay", str(first.run_dir)).endswith("1 decision, 0 would be different\n")
    strict = home / "strict.toml"
    strict.write_text((first.run_dir / "config.toml").read_text().replace("max_restarts = 100", "max_restarts = 0"))
    told = everstep(home, "policy", "replay", str(first.run_dir / "events.jsonl"), "--config", str(strict))
    assert "was:   replace" in told
    assert "would: stop" in told
    assert "1 would be different" in told

    label = f"{socket.gethostname()}/node0"
    told = everstep(home, "nodes", "--history", str(history))
    assert [line.split()[:2] for line in told.splitlines() if label in line] == [[label, "spare"]]
    assert "evicted in run remembers" in told
    told = everstep(home, "nodes", "remembers")
    assert [line.split()[:2] for line in told.splitlines() if " node0 " in line] == [["node0", "evicted"]]

    everstep(home, "drain", f"{socket.gethostname()}/node1", "--reason", "loud fan", "--history", str(history))
    second = make_job("knows", (*few, *layout, "--training.steps", "2")).start()
    assert second.finish() == 0, second.said()
    plans = [event for event in second.events() if isinstance(event, GenerationPlanned)]
    assert plans[0].nodes == ("node2", "node3"), "node0 only stands by, node1 is left out"
    places = {event.node: event.place for event in second.events() if isinstance(event, NodeRemembered)}
    assert places == {"node0": Place.SPARE, "node1": Place.OUT}
    told = everstep(home, "nodes", "knows")
    rows = {line.split()[0]: line for line in told.splitlines() if line.strip().startswith("node")}
    assert "spare 1" in rows["node0"]
    assert "evicted in run remembers" in rows["node0"]
    assert "left out" in rows["node1"]
    assert "loud fan" in rows["node1"]
