"""What a person is told: the step line, the summary, the report and the incident's folder."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster.incidents import safe_name, write_cost, write_incident
from cluster.ledger import IncidentCost, account
from cluster.render import render
from cluster.report import RunSummary, headlines, incident_lines, markdown, summary, surviving, write_report
from cluster.stepline import eta_s, format_duration, format_step_line
from cluster.telemetry import metric_row
from cluster.timeline import TimeCause
from health.verdict import Cause, Verdict
from tests.unit import stories
from tests.unit.stories import Story, job, verdict
from trainer.events import FactKind, StepRecord


def broken_run() -> Story:
    story = Story()
    story.start(4.0)
    story.train([(1.0, 0.0, 0.0)] * 10)
    story.events.append(stories.fact(FactKind.SNAPSHOT_COMMITTED, 1, 10, story.now_s))
    story.fail(resume_at=8, in_flight_s=0.5, notice_s=2.0, decide_s=0.25, restart_s=3.0)
    story.train([(2.0, 0.0, 0.0)] * 12)
    story.stop(0, 1.0)
    return story


@pytest.fixture
def report() -> RunSummary:
    story = broken_run()
    return summary(job(), story.events, story.steps)


def test_the_step_line_is_the_documented_one() -> None:
    record = StepRecord(
        step=120, steps=2000, generation=1, t_wall_s=0.0, step_s=1.0, data_s=0.0, stall_s=0.0, loss_avg=3.41214,
        loss_max=4.0, grad_norm=0.8149, lr=1e-3, tokens_seen=1, tokens_per_sec_per_gpu=7012.4, tflops_per_gpu=360.12,
        mfu_pct=36.41, memory_gib=40.11, memory_pct=50.12,
    )  # fmt: skip
    assert format_step_line(record, 0.9912, 7380.0) == (
        "step: 120/2000  loss: 3.4121  grad_norm: 0.81  memory: 40.1GiB(50.1%)  tps: 7,012  tflops: 360.1  "
        "mfu: 36.4%  ettr: 0.991  eta: 2h03m"
    )


def test_a_validation_loss_is_shown_where_it_was_measured() -> None:
    """Behind the training loss in the step line, and under its own name in the metrics; absent on all other steps."""
    plain = stories.record(3, 1, 10.0, 1.0, 0.0, 0.0)
    measured = msgspec.structs.replace(plain, validation_loss=4.56789, validation_s=2.5)
    assert "  loss: 4.9700  val_loss: 4.5679  grad_norm: 1.00  " in format_step_line(measured, None, None)
    assert "val_loss" not in format_step_line(plain, None, None)
    added = metric_row(measured, None).items() - metric_row(plain, None).items()
    assert dict(added) == {"validation/loss_avg": 4.56789, "time/validation_s": 2.5}


def test_the_step_line_guesses_nothing() -> None:
    record = msgspec.structs.replace(
        stories.record(3, 1, 10.0, 1.0, 0.0, 0.0), loss_avg=None, grad_norm=None, skipped=True
    )
    assert format_step_line(record, None, None) == (
        "step: 3/100  loss: n/a  grad_norm: n/a  memory: n/a  tps: 512  tflops: n/a  mfu: n/a  ettr: n/a  eta: n/a"
        "  (update skipped)"
    )
    on_cpu = msgspec.structs.replace(record, memory_gib=1.25)
    assert "memory: 1.2GiB(n/a)" in format_step_line(on_cpu, None, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12s"), (3.14, "3.1s"), (9.99, "10s"), (59.7, "1m00s"), (725, "12m05s"), (3599.8, "1h00m"),
     (7380, "2h03m"), (86_399, "1d00h"), (273_600, "3d04h")],
)  # fmt: skip
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_eta_counts_on_failures_as_they_were() -> None:
    recent = [stories.record(step, 1, float(step), 2.0, 0.0, 0.0) for step in (58, 59, 60)]
    assert eta_s(recent, 1.0) == 80.0
    assert eta_s(recent, 0.5) == 160.0
    assert eta_s([], 1.0) is None


def test_the_summary_says_what_failed_and_what_it_cost(report: RunSummary) -> None:
    assert (report.outcome, report.exit_code, report.step, report.target_steps) == ("done", 0, 20, 100)
    assert (report.loss_first, report.loss_last) == (5.0 - 0.01, 5.0 - 0.2)
    assert report.newest_snapshot == 10
    (incident,) = report.incidents
    assert (incident.cause, incident.node, incident.rank, incident.step) == (Cause.USER_ERROR, "node0", 0, 11)
    assert (incident.evidence, incident.action, incident.recovered) == ("where; 1", "restart", True)
    assert incident.cost.lost_steps == 2
    assert incident.cost.recovery_s == pytest.approx(3.25, abs=1e-3)
    assert report.tokens_per_sec == pytest.approx(512 / 2.0 * 4), "the median is of the steps that survived"


def test_a_step_computed_twice_counts_once_and_later_ones_not_at_all() -> None:
    steps = [stories.record(step, 1, float(step), 1.0, 0, 0) for step in (1, 2, 3, 4)]
    steps += [stories.record(3, 2, 9.0, 1.0, 0, 0)]
    assert [(each.step, each.generation) for each in surviving(steps)] == [(1, 1), (2, 1), (3, 2)]


def test_the_report_lies_in_the_run_directory_in_both_forms(report: RunSummary, tmp_path: Path) -> None:
    path = write_report(tmp_path, report)
    assert path == tmp_path / "report.md"
    again = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=RunSummary)
    assert again == report
    text = path.read_text()
    for words in (
        "# story: done",
        "user_error, node0 rank 0, in step 11",
        "2 finished steps computed again",
        "| productive |",
    ):
        assert words in text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_the_terminal_shows_the_same(report: RunSummary) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    for words in ("story: done", "20/100", "incident 1: user_error, node0 rank 0", "noticed after 2.0s", "productive"):
        assert words in text


def test_an_incident_that_did_not_touch_training_has_no_cost_line(report: RunSummary) -> None:
    (incident,) = report.incidents
    nothing = msgspec.structs.replace(incident, action="nothing", reason="a spare was lost")
    assert incident_lines(nothing) == [incident.evidence, "nothing: a spare was lost"]
    assert "no finished steps computed again" in dict(headlines(summary(job(), [], [])))["restarts"]


def test_a_run_that_only_began_can_be_shown() -> None:
    """Status right after the start: nothing is known, nothing fails."""
    story = summary(job(), [stories.started(1, stories.EPOCH_S)], [], stories.EPOCH_S + 3)
    assert (story.outcome, story.loss_first, story.tokens_per_sec, story.newest_snapshot) == (
        "running",
        None,
        None,
        None,
    )
    assert story.goodput.badput_s[TimeCause.STARTUP] == 3.0
    assert "n/a" in markdown(story)
    empty = summary(job(), [], [])
    assert empty.goodput.ettr is None
    assert markdown(empty)
    Console(file=io.StringIO()).print(render(empty))


@given(st.text(max_size=300))
def test_evidence_cannot_climb_out_of_its_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe
    assert len(safe) <= 120
    assert "/" not in safe
    assert not safe.startswith(".")
    assert safe.isascii()


def test_an_incident_is_written_again_by_the_next_supervisor(tmp_path: Path) -> None:
    root, other = verdict(), verdict(node="node1")
    files = {"../../etc/passwd": b"x", "rank 1.log": b"one", "rank/1.log": b"two", "verdict.json": b"not the verdict"}
    for _ in range(2):
        folder = write_incident(tmp_path, 3, root, [root, other], files)
    assert folder == tmp_path / "incidents" / "3"
    assert msgspec.json.decode((folder / "verdict.json").read_bytes(), type=Verdict) == root
    assert msgspec.json.decode((folder / "verdicts.json").read_bytes(), type=list[Verdict]) == [root, other]
    assert {each.read_bytes() for each in folder.iterdir()} >= {b"x", b"one", b"two", b"not the verdict"}
    assert len(list(folder.iterdir())) == 6
    story = broken_run()
    (cost,) = account(story.events, story.steps, None).incidents
    path = write_cost(tmp_path, cost)
    assert path == tmp_path / "incidents" / "1" / "cost.json"
    assert msgspec.json.decode(path.read_bytes(), type=IncidentCost) == cost
