"""What DCGM and AMD's tools print is understood, and tools that fail or hang are only a word in the log."""

from __future__ import annotations

import json
import queue
import time
from pathlib import Path

import pytest

from cluster.gpu_amd import amd_reader, parse_amd_smi, parse_rocm_smi
from cluster.gpu_tools import DcgmWatch, ToolError, diagnose, run_tool
from cluster.gpus import GpuWatch, Place
from configs.schema import HealthConfig
from health.dcgm import DcgmIncident, DcgmJudge, read_diagnosis, read_health
from health.gpu_facts import Carrier
from health.verdict import Cause, Certainty, Verdict

HEALTHY = {"body": {"Overall Health": {"value": "Healthy"}}, "header": ["Health Monitor Report"]}
SICK = {
    "body": {
        "GPU": {
            "children": {
                "1": {
                    "children": {
                        "Errors": {
                            "children": {
                                "Memory system": {"overflow": ["A DBE occurred", "on GPU 1"], "value": "Failure"},
                                "PCIe system": {"overflow": ["8 replays a minute"], "value": "Warning"},
                            }
                        }
                    },
                    "value": "Failure",
                }
            }
        },
        "Overall Health": {"value": "Failure"},
    },
    "header": ["Health Monitor Report"],
}
DIAGNOSIS = {
    "DCGM Diagnostic": {
        "test_categories": [
            {
                "category": "Deployment",
                "tests": [
                    {"name": "software", "results": [{"status": "Pass", "entity_id": 0}]},
                    {
                        "name": "memory",
                        "results": [
                            {"status": "Pass", "entity_id": 0},
                            {"status": "Fail", "entity_id": 1, "warnings": [{"warning": "a row failed"}]},
                        ],
                    },
                ],
            }
        ]
    },
    "entity_groups": [{"entity_group": "GPU"}],
}
AMD = [
    {
        "gpu": 0,
        "temperature": {"edge": "N/A", "hotspot": {"value": 71, "unit": "C"}},
        "ecc": {"total_correctable_count": 3, "total_uncorrectable_count": 1, "total_deferred_count": 0},
        "pcie": {"width": 16, "replay_count": 2},
        "throttle": {"prochot_violation_status": "NOT ACTIVE", "socket_thermal_violation_status": "ACTIVE"},
    },
    {"gpu": 1, "temperature": "N/A", "ecc": {"total_correctable_count": "N/A"}, "pcie": "N/A", "throttle": "N/A"},
]


def tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of this name first in PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_dcgms_health_is_read() -> None:
    """Promise: each unhealthy system of each GPU is an incident with DCGM's words."""
    assert read_health(json.dumps(HEALTHY)) == ()
    assert read_health(json.dumps(SICK)) == (
        DcgmIncident(1, "Memory system", "Failure", "A DBE occurred on GPU 1"),
        DcgmIncident(1, "PCIe system", "Warning", "8 replays a minute"),
    )
    with pytest.raises(ValueError, match="Please enable watches"):
        read_health("Error: Health watches not enabled. Please enable watches. \n")


def test_dcgms_word_is_said_once() -> None:
    """Promise: a failure is likely, a warning a hint; both are said once while they last, whatever the message says."""
    judge = DcgmJudge("node1")
    carrier = {1: Carrier(rank=9, step=3, generation=1)}
    first = judge.judge(read_health(json.dumps(SICK)), carrier.__getitem__)
    assert [(each.cause, each.certainty, each.device, each.rank) for each in first] == [
        (Cause.GPU_FAULT, Certainty.LIKELY, "gpu1", 9),
        (Cause.GPU_DEGRADED, Certainty.HINT, "gpu1", 9),
    ]
    assert judge.judge([DcgmIncident(1, "Memory system", "Failure", "other words")], carrier.__getitem__) == []
    assert judge.judge([], carrier.__getitem__) == []
    assert len(judge.judge(read_health(json.dumps(SICK)), carrier.__getitem__)) == 2


def test_dcgms_diagnosis_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: only failures are told, with the test's name and the GPU; without DCGM there is no diagnosis."""
    assert read_diagnosis(json.dumps(DIAGNOSIS)) == ("DCGM's test memory fails on gpu1: a row failed",)
    tool(tmp_path, "dcgmi", f"cat <<'END'\nSuccessfully ran.\n{json.dumps(DIAGNOSIS)}\nEND\nexit 226", monkeypatch)
    assert diagnose(1) == ("DCGM's test memory fails on gpu1: a row failed",)
    monkeypatch.setenv("PATH", "")
    assert diagnose(1) is None


def test_dcgm_is_asked_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: where dcgmi is installed its verdict arrives; an answer that is none does not end the asking."""
    answer = tmp_path / "answer"
    answer.write_text("Error: unable to establish a connection\n")
    tool(tmp_path, "dcgmi", f"cat {answer}", monkeypatch)
    said: queue.Queue[Verdict] = queue.Queue()
    watch = DcgmWatch("node1", 0.05, 10.0, lambda index: Carrier(index + 8, 3, 1), said.put)
    watch.start()
    with pytest.raises(queue.Empty):
        said.get(timeout=0.5)
    whole = tmp_path / "whole"
    whole.write_text(json.dumps(SICK))
    whole.replace(answer)
    assert said.get(timeout=20).fingerprint == "dcgm memory system"
    watch.stop()


def test_a_tool_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a tool that does not end costs its time-out, one that is missing is an error with its name."""
    tool(tmp_path, "stuck", "exec sleep 60", monkeypatch)
    began_s = time.monotonic()
    with pytest.raises(ToolError, match="stuck now took over"):
        run_tool(("stuck", "now"), 0.3)
    assert time.monotonic() - began_s < 20
    with pytest.raises(ToolError, match="absent"):
        run_tool(("absent",), 0.3)


@pytest.mark.parametrize("wrapped", [False, True])
def test_amd_smi_is_read(wrapped: bool) -> None:
    """Promise: ECC, temperature, throttling and replays of AMD GPUs are read; what a card does not offer is unknown."""
    first, second = parse_amd_smi(json.dumps({"gpu_data": AMD} if wrapped else AMD), 5.0)
    assert (first.index, first.temperature_c, first.corrected, first.uncorrected) == (0, 71, 3, 1)
    assert (first.reasons, first.pcie_replays) == (0x40, 2)
    assert (second.index, second.temperature_c, second.uncorrected, second.reasons) == (1, None, None, None)
    with pytest.raises(ValueError):
        parse_amd_smi("ERROR: no GPUs", 5.0)


def test_rocm_smi_is_read() -> None:
    """Promise: where only the older tool is there, the hottest temperature is known."""
    text = json.dumps({"card1": {"Temperature (Sensor junction) (C)": "45.0"}, "system": {"Driver version": "6"}})
    (sample,) = parse_rocm_smi(text, 5.0)
    assert (sample.index, sample.temperature_c) == (1, 45)


def test_amd_gpus_are_watched_where_there_is_no_nvidia(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: uncorrected errors of an AMD GPU become a verdict on its rank."""
    pytest.importorskip("pynvml")
    caplog.set_level("INFO", "everstep.gpus")
    answer = tmp_path / "answer"
    cool = {**AMD[0], "throttle": "N/A"}
    answer.write_text(json.dumps([cool, AMD[1]]))
    tool(tmp_path, "amd-smi", f"cat {answer}", monkeypatch)
    assert amd_reader() is not None
    said: queue.Queue[Verdict] = queue.Queue()
    health = HealthConfig(gpu_interval_s=0.05, dcgm_interval_s=0)
    watch = GpuWatch("node1", health, 1, ("0",), lambda: Place(8, 40, 2), said.put, tool_interval_s=0.05)
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")  # no library: also where there is a real one
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    watch.start()
    with pytest.raises(queue.Empty):
        said.get(timeout=2)
    whole = tmp_path / "whole"
    whole.write_text(json.dumps([{**cool, "ecc": {"total_uncorrectable_count": "4"}}]))
    whole.replace(answer)
    verdict = said.get(timeout=20)
    watch.stop()
    assert (verdict.fingerprint, verdict.rank, verdict.device) == ("ecc uncorrected", 8, "gpu0")
    assert "AMD GPUs are watched" in caplog.text
