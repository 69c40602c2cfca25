"""The command line: quick where it only looks, and errors that a person can act on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import dispatch
from trainer.events import Beat, Fact, FactKind, HeartbeatFile, LineFile, Phase


def everstep(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_looking_loads_no_torch(tmp_path: Path) -> None:
    """Promise: `everstep status` answers in a blink, also where torch takes seconds to load."""
    code = (
        "import sys; from cluster.cli import dispatch; dispatch(['status', 'none']); "
        "heavy = {'torch', 'torchtitan', 'megatron', 'wandb', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "demo", "--training.stepz", "3"], ["training.stepz", "training.steps"]),
        (["run", "demo", "--training.steps", "many"], ["training.steps", "many", "whole number"]),
        (["run", "demo", "--parallelism.tp", "3"], ["parallelism"]),
        (["run", "nothing.toml"], ["nothing.toml"]),
        (["status", "nothing"], ["nothing", "--dir"]),
        (["logs", "nothing", "--rank", "0"], ["nothing"]),
        (["checkpoint", "verify", "nothing"], ["nothing"]),
        (["status", "x", "--training.steps", "3"], ["unknown option", "--training.steps"]),
    ],
)
def test_mistakes_are_named_with_their_mend_and_no_traceback(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    done = everstep(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr


def test_a_run_without_data_says_how_to_make_it(tmp_path: Path) -> None:
    done = everstep("run", "demo", cwd=tmp_path)
    assert done.returncode == 2
    assert "everstep data prepare" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_config_prints_what_loads_back(capsys: pytest.CaptureFixture[str]) -> None:
    from configs.load import load_job, parse_job

    assert dispatch(["config", "demo", "--training.steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert parse_job(printed, "printed") == load_job("demo", ["--training.steps", "7"])


def test_a_heartbeat_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    slots = HeartbeatFile(tmp_path / "beats", 2).open()
    assert slots.read(1) is None
    beat = Beat(7, Phase.VOTE, 1.5, 0.25, 3)
    slots.write(1, beat)
    assert slots.read(1) == beat
    assert slots.read(0) is None
    slots.close()
    data = bytearray((tmp_path / "beats").read_bytes())
    data[64] |= 1  # a writer died in the middle
    (tmp_path / "beats").write_bytes(data)
    torn = HeartbeatFile(tmp_path / "beats", 2).open()
    assert torn.read(1) is None
    torn.write(1, beat)
    assert torn.read(1) == beat
    torn.close()


def test_lines_wait_for_room_in_order(tmp_path: Path) -> None:
    def fact(step: int) -> Fact:
        return Fact(kind=FactKind.LOADED, node="n", rank=0, generation=1, step=step, t_wall_s=0.0)

    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    lines = LineFile(path)
    assert lines.keep(fact(1)) is not None
    assert lines.keep(fact(2)) is not None
    path.unlink()
    assert lines.keep(fact(3)) is None
    assert [line.count('"step":') for line in path.read_text().splitlines()] == [1, 1, 1]
    assert [f'"step":{n}' in line for n, line in enumerate(path.read_text().splitlines(), 1)] == [True] * 3
