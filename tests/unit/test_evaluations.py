"""Promise: every due snapshot is evaluated, whatever becomes of it in the run, and failures are only told."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from cluster import evaluate, evaluations, events
from cluster.alert_words import AlertWriter
from cluster.evaluations import HELD, LOG, MODEL, RESULT, Evaluations, Result, Task, read_result
from cluster.rundir import RunDir
from configs.schema import AlertsConfig, EvaluationConfig, JobConfig
from configs.tomltext import resolve_toml
from tests.unit import stories
from trainer.events import Fact, FactKind
from trainer.exits import ExitCode

LAST = 100


def job(script: str, timeout_s: float = 30.0, program: str = "/bin/sh") -> JobConfig:
    evaluation = EvaluationConfig(command=(program, "-c", script), interval_steps=40, timeout_s=timeout_s)
    return msgspec.structs.replace(stories.job(), evaluation=evaluation)


def opened(run_dir: RunDir, config: JobConfig) -> Evaluations:
    run_dir.config.write_text(resolve_toml(config))
    found = Evaluations(config, run_dir)
    found.open()
    return found


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with some snapshots, each of one file."""
    found = RunDir(tmp_path / "run")
    found.create()
    for step in (10, 40, 80, LAST):
        folder = found.path / "checkpoints" / f"step-{step}"
        folder.mkdir()
        (folder / "shard").write_text(f"weights of {step}")
    return found


def folder_of(run_dir: RunDir, step: int, generation: int = 1) -> Path:
    return run_dir.path / "evaluations" / f"step-{step}-g{generation}"


def committed(found: Evaluations, *steps: int, generation: int = 1) -> None:
    for step in steps:
        found.on_event(stories.fact(FactKind.SNAPSHOT_COMMITTED, generation, step, 1.0))


def facts(found: Evaluations, count: int) -> list[Fact]:
    """The next so many facts."""
    told: list[Fact] = []
    deadline_s = time.monotonic() + 60
    while len(told) < count:
        assert time.monotonic() < deadline_s, told
        found.on_tick()
        told += found.take_facts()
        time.sleep(0.005)
    return told


def held(found: Evaluations, run_dir: RunDir, step: int) -> Path:
    """Wait until the snapshot is held."""
    committed(found, step)
    folder = folder_of(run_dir, step)
    deadline_s = time.monotonic() + 60
    while not (folder / "task.json").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    return folder


# One evaluation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that copies the only file of a snapshot."""

    def export(folder: Path, task: Task) -> list[str]:
        model, shard = folder / MODEL, folder / HELD / f"step-{task.step}" / "shard"
        return ["/bin/sh", "-c", f"mkdir {model} && cp {shard} {model}/weights"]

    monkeypatch.setattr(evaluate, "export_command", export)


def evaluated(run_dir: RunDir, config: JobConfig, step: int = 40) -> Result:
    """Hold a snapshot, lose the run's own, and evaluate."""
    folder = held(opened(run_dir, config), run_dir, step)
    shutil.rmtree(run_dir.path / "checkpoints" / f"step-{step}")
    evaluate.evaluate(folder)
    result = read_result(folder)
    assert result is not None
    assert {path.name for path in folder.iterdir()} == {"task.json", RESULT, LOG, "config.toml", "lock"}
    return result


@pytest.mark.usefixtures("plain_export")
def test_the_command_gets_a_model_that_retention_cannot_take_away(run_dir: RunDir) -> None:
    """The last line that it says is kept, and all of it is in the log; model and held snapshot are gone afterwards."""
    script = "echo first; echo $EVERSTEP_RUN $EVERSTEP_STEP: $(cat $EVERSTEP_MODEL/weights)"
    result = evaluated(run_dir, job(script))
    assert (result.ok, result.step, result.detail) == (True, 40, "story 40: weights of 40")
    assert (folder_of(run_dir, 40) / LOG).read_text() == "first\nstory 40: weights of 40\n"


@pytest.mark.usefixtures("plain_export")
@pytest.mark.parametrize(
    ("script", "program", "timeout_s", "why"),
    [
        ("echo no such task; exit 3", "/bin/sh", 30.0, "/bin/sh ended with 3: no such task; all of it is in"),
        ("sleep 600 & sleep 600", "/bin/sh", 0.3, "did not end: evaluation.timeout_s = 0.3 is over"),
        ("", "/bin/sh/nothing", 30.0, "cannot be run (Not a directory)"),
    ],
    ids=["fails", "hangs", "missing"],
)
def test_a_command_that_fails_leaves_its_reason(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, script: str, program: str, timeout_s: float, why: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    result = evaluated(run_dir, job(script, timeout_s, program))
    assert not result.ok
    assert why in result.detail


def test_an_export_that_fails_is_the_reason(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "export_command", lambda *_: ["/bin/sh", "-c", "echo shard damaged >&2; exit 2"])
    assert "the export ended with 2: shard damaged" in evaluated(run_dir, job("true")).detail


@pytest.mark.usefixtures("plain_export")
def test_what_is_done_is_not_done_again(run_dir: RunDir, tmp_path: Path) -> None:
    folder = held(opened(run_dir, job(f"echo x >> {tmp_path}/count")), run_dir, 40)
    evaluate.evaluate(folder)
    evaluate.evaluate(folder)
    assert (tmp_path / "count").read_text() == "x\n"


# Which, when, and what is told ------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the process; names of the folders, in order. Step 80's dies without a result."""
    names: list[str] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        names.append(folder.name)
        task = msgspec.json.decode((folder / "task.json").read_bytes(), type=Task)
        done = Result(step=task.step, generation=task.generation, ok=task.step != LAST, seconds=2.0, detail="acc 0.5")
        text = msgspec.json.encode(done).decode()
        script = "kill -9 $$" if task.step == 80 else f"echo '{text}' > {folder}/{RESULT}"
        return subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)

    monkeypatch.setattr(evaluations, "_start", start)
    return names


def test_due_snapshots_are_evaluated_in_turn_and_each_end_becomes_a_fact(run_dir: RunDir, started: list[str]) -> None:
    """Every interval and the last step, once however many nodes tell of it, and again in another generation."""
    found = opened(run_dir, job("true"))
    committed(found, 10, 40, 40)
    (done,) = facts(found, 1)
    assert (done.kind, done.step, done.generation, done.detail) == (FactKind.EVALUATED, 40, 1, "acc 0.5")
    committed(found, 40, 80)
    (died,) = facts(found, 1)
    assert (died.kind, died.step) == (FactKind.EVALUATION_FAILED, 80)
    assert "ended with -9 and no result" in died.detail
    committed(found, LAST)
    committed(found, 40, generation=2)
    ended = {(fact.kind, fact.step, fact.generation) for fact in facts(found, 2)}
    assert ended == {(FactKind.EVALUATION_FAILED, LAST, 1), (FactKind.EVALUATED, 40, 2)}
    assert sorted(started) == ["step-100-g1", "step-40-g1", "step-40-g2", "step-80-g1"]


def test_a_snapshot_that_is_gone_is_a_failure_that_is_told(run_dir: RunDir, started: list[str]) -> None:
    shutil.rmtree(run_dir.path / "checkpoints" / "step-40")
    found = opened(run_dir, job("true"))
    committed(found, 40)
    (told,) = facts(found, 1)
    assert told.kind is FactKind.EVALUATION_FAILED
    assert not started
    event = events.WorkersReported(t_wall_s=1.0, t_mono_s=1.0, fact=told)
    (alert,) = AlertWriter("run", AlertsConfig()).take(event)
    assert alert.title.startswith("the evaluation of step 40 failed: ")


def test_the_next_supervisor_takes_up_what_was_not_finished(run_dir: RunDir, started: list[str]) -> None:
    """And only that; the end of a job that is done waits for it, and no other end does."""
    first = opened(run_dir, job("true"))
    committed(first, 40)
    facts(first, 1)
    held(first, run_dir, LAST)
    second = opened(run_dir, job("true"))
    assert not second.lingers(ExitCode.REQUEUE, 0)
    assert not second.lingers(ExitCode.DONE, 1)
    assert second.lingers(ExitCode.DONE, 0)
    (told,) = facts(second, 1)
    assert told.step == LAST
    assert not second.lingers(ExitCode.DONE, 0)
    assert started == ["step-40-g1", "step-100-g1"]


def test_a_snapshot_that_no_supervisor_came_to_hold_is_evaluated(run_dir: RunDir, started: list[str]) -> None:
    """It died before the links, or before it heard of it. What is not committed, not due or unreadable stays."""
    for step, text in ((10, '{"body":{"generation":1}}'), (40, '{"body":{"generation":1}}'), (LAST, "{")):
        (run_dir.path / "checkpoints" / f"step-{step}" / "manifest.json").write_text(text)
    found = opened(run_dir, job("true"))
    (told,) = facts(found, 1)
    assert (told.kind, told.step) == (FactKind.EVALUATED, 40)
    assert not found.lingers(ExitCode.DONE, 0)
    assert started == ["step-40-g1"]


def test_a_program_that_is_not_there_is_refused_before_anything_starts(run_dir: RunDir) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.command: there is no program"):
        Evaluations(job("true", program="no-such-program"), run_dir)


def test_without_a_section_nothing_is_evaluated(run_dir: RunDir, started: list[str]) -> None:
    found = opened(run_dir, stories.job())
    committed(found, 40, LAST)
    found.on_tick()
    assert not found.lingers(ExitCode.DONE, 0)
    assert not started
    assert not (run_dir.path / "evaluations").exists()
