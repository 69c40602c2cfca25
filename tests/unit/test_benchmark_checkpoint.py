"""Promises of the snapshot benchmark: what it reports follows from what it measured, and it says what it could not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint_gpu
from benchmarks.checkpoint_report import AIMS, Case, aim_notes, all_ratios, all_series, judge
from benchmarks.checkpoint_sides import SIDES, SideResult
from benchmarks.checkpoint_state import shapes


def case(stall_s: float) -> Case:
    limit = SideResult({"memcpy_s": [0.1, 0.3, 0.2], "write_s": [2.0]}, 0.0, 0.0, "")
    ours = SideResult({"stall_s": [stall_s], "durable_s": [2.2], "restore_ram_s": [0.5]}, 4e9, 0.0, "")
    peer = SideResult({"stall_s": [2.0], "durable_s": [4.0]}, 2e9, 0.0, "")
    return Case("1 GB, 2 ranks", {"limit": limit, "everstep": ours, "dcp.save": peer})


@pytest.mark.parametrize(("stall_s", "met"), [(0.24, True), (0.25, False)])
def test_an_aim_is_met_up_to_its_bound_and_not_beyond(stall_s: float, met: bool) -> None:
    """Median over median in one unit, although stalls are told in ms and restores in s."""
    cases = [case(stall_s)]
    judged = {each.aim.key: each for each in judge(cases, all_ratios(cases))}
    assert judged["stall_s"].value == pytest.approx(stall_s / 0.2)
    assert judged["stall_s"].met is met
    assert judged["restore_ram_s"].value == pytest.approx(2.5)
    assert judged["durable_s"].met
    assert "overlapped_stall_s" not in judged, "what was not measured is not judged"
    (words,) = (note for note in aim_notes(judged.values()) if AIMS[3].name in note)
    assert words.endswith("missed: 2.50 at 1 GB, 2 ranks")


def test_only_what_was_measured_is_reported() -> None:
    """A side that did not run, and a figure that it does not have, leave no series and no ratio."""
    found = {(each.side, each.name) for each in all_series([case(0.2)])}
    assert {side for side, _ in found} == {"limit", "everstep", "dcp.save"}
    assert ("dcp.save", "1 GB, 2 ranks: restore from a cold disk") not in found
    assert ("dcp.save", "1 GB, 2 ranks: peak memory, restoring") not in found
    ratios = {each.name: each.value for each in all_ratios([case(0.2)])}
    assert ratios["stall, nothing overlaps, everstep of dcp.save, 1 GB, 2 ranks"] == pytest.approx(0.1)
    assert ratios["peak memory, saving, everstep of dcp.save, 1 GB, 2 ranks"] == pytest.approx(2.0)
    assert SIDES[0].name == "everstep"


@pytest.mark.parametrize("total_bytes", [100_000_000, 500_000_000, 6_000_000_000])
def test_the_state_has_the_size_that_is_said(total_bytes: int) -> None:
    """Within one of its matrices, and every tensor can be cut by 4 ranks."""
    found = shapes(total_bytes)
    size = sum(4 * torch.Size(shape).numel() for shape in found.values())
    assert total_bytes - 9_000_000 < size <= total_bytes
    assert all(shape[0] % 4 == 0 for shape in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_that_it_has_not_been_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line, exit 0, and no record that looks like a result."""
    record = tmp_path / "checkpoint_gpu.json"
    monkeypatch.setattr(checkpoint_gpu, "write_result", lambda result: record.touch())
    monkeypatch.setattr("sys.argv", ["checkpoint_gpu"])
    checkpoint_gpu.main()
    assert "needs a CUDA device and has found none" in capsys.readouterr().out
    assert not record.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_can_be_rehearsed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of it runs, on the CPU: what was staged is loaded back and compared."""
    monkeypatch.setattr("sys.argv", ["checkpoint_gpu", "--rehearse"])
    monkeypatch.setattr(checkpoint_gpu, "TINY", checkpoint_gpu.Model("rehearsal", 300_000))
    checkpoint_gpu.main()
    out = capsys.readouterr().out
    assert "loading back and comparing" in out
    assert "nothing is written" in out
