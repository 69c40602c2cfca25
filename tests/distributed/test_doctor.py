"""Promise: `everstep doctor` says of any machine whether it is fit to be a node, with 0 or 94, alone and as JSON."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil
import pytest

from health.examination import Examination, Grade
from tests.chaos.faults import SmallDisk

pytestmark = pytest.mark.distributed

SHIM = Path(__file__).parents[1] / "shims" / "sick_node"


def doctor(
    home: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "doctor", "--memory-mib", "4", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=240)


def test_a_sound_machine_is_fit(tmp_path: Path) -> None:
    """A table for a person; nothing is left behind, no process and no file."""
    before = {child.pid for child in psutil.process_iter()}
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("matmul bfloat16", "run_dir", "loopback", "all-reduce over 2 ranks, gloo", "torch", "fit ("):
        assert words in done.stdout
    ours = [p for p in psutil.process_iter(["cmdline"]) if "cluster.node_probe" in (p.info["cmdline"] or [])]
    assert [process for process in ours if process.pid not in before and process.cwd() == str(tmp_path)] == []
    assert list(tmp_path.iterdir()) == []


def test_a_sick_machine_is_not(tmp_path: Path) -> None:
    """One wrong element, a full disk, too few GPUs: 94, and the JSON has all with their reasons."""
    sick = {"PYTHONPATH": str(SHIM), "EVERSTEP_TEST_SICK": "here:matmul", "EVERSTEP_TEST_NODE": "here"}
    with SmallDisk(tmp_path / "full", 64 << 10) as disk:
        disk.fill()
        done = doctor(tmp_path, "--json", "--gpus", "4096", "--node-dir", str(disk.path), environment=sick)
    assert done.returncode == 94, done.stdout + done.stderr
    examination = msgspec.json.decode(done.stdout, type=Examination)
    failed = {
        (check.name.split()[0], check.device): check.detail for check in examination.checks if check.grade is Grade.FAIL
    }
    assert set(failed) == {("matmul", "cpu"), ("disk", "node_dir"), ("gpus", "")}
    assert "is full" in failed["disk", "node_dir"]
    assert "the first at [1, 2]" in failed["matmul", "cpu"]


def test_a_run_that_nobody_runs_has_no_fleet(tmp_path: Path) -> None:
    """A wrong name is answered in a line."""
    asked = doctor(tmp_path, "--fleet", "nobody")
    assert asked.returncode == 2
    assert "no run 'nobody'" in asked.stderr
