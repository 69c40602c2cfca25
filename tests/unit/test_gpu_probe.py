"""The unmodified pynvml, in the probe's own process, against GPUs that a test breaks while they are read."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gpu_devices import split_visible, visible_indices
from cluster.gpus import GpuWatch, Place
from configs.schema import HealthConfig
from health.verdict import Cause, Certainty, Severity, Verdict
from tests.fake_gpus import FakeGpus
from tests.files import few_files

pytest.importorskip("pynvml")
HEALTH = HealthConfig(gpu_interval_s=0.1, gpu_timeout_s=1.0, gpu_throttle_samples=4, dcgm_interval_s=0)


class Eye:
    """A `GpuWatch` of a node of four ranks, the first of which is rank 8, and what it has said."""

    def __init__(self, gpus: FakeGpus, visible: tuple[str, ...] | None = None) -> None:
        self.gpus = gpus
        self.said: queue.Queue[Verdict] = queue.Queue()
        self.watch = GpuWatch("node1", HEALTH, 4, visible, lambda: Place(8, 40, 2), self.said.put)

    def next(self, timeout_s: float = 20.0) -> Verdict:
        """The next verdict."""
        return self.said.get(timeout=timeout_s)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> FakeGpus:
    """The library, built once."""
    return FakeGpus(tmp_path_factory.mktemp("gpus"))


@pytest.fixture
def gpus(library: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    """Healthy GPUs of node1."""
    for name, value in library.environment().items():
        monkeypatch.setenv(name, value)
    library.add("node1")
    library.heal("node1")
    return library


@pytest.fixture
def eye(gpus: FakeGpus, caplog: pytest.LogCaptureFixture) -> Iterator[Eye]:
    """A watch at work, which has read its GPUs."""
    caplog.set_level("INFO", "everstep.gpus")
    eye = Eye(gpus)
    eye.watch.start()
    _until(lambda: "gpu3 read last" in caplog.text)
    yield eye
    eye.watch.stop()


def _until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_the_log_says_what_is_watched(eye: Eye, caplog: pytest.LogCaptureFixture) -> None:
    """Promise: the driver, the GPUs that the ranks use (four of eight) and their first readings are in the log."""
    text = "\n".join(record.getMessage() for record in caplog.get_records("setup"))
    assert "GPUs are watched: gpu0 (Fake H100), gpu1" in text
    assert "driver 580.00.fake" in text
    assert "55 C, 450.0 W, 1980 MHz, 97% busy, 0 corrected, 0 uncorrected ECC errors" in text
    assert "18 NVLinks up" in text
    assert "gpu4" not in text
    assert eye.said.empty()


@pytest.mark.parametrize(
    ("key", "value", "fingerprint"),
    [
        ("lost", 1, "gpu lost"),
        ("reset_required", 1, "gpu lost"),
        ("recovery", 1, "gpu recovery gpu_reset"),
        ("uncorrected", 2, "ecc uncorrected"),
        ("uncorrected_ever", 2, "ecc uncorrected"),
        ("remap_failed", 1, "remap failed"),
        ("remap_pending", 1, "remap pending"),
        ("links_up", 17, "nvlink down"),
        ("link_errors", 5000, "nvlink errors"),
        ("pcie_replays", 500, "pcie replays"),
        ("pcie_width", 8, "pcie width"),
        ("pcie_gen", 3, "pcie generation"),
        ("reasons", 0x40, "throttled"),
        ("corrected", 5000, "ecc corrected"),
        ("unknown_error", 1, "unreadable"),
    ],
)
def test_every_value_is_read(eye: Eye, key: str, value: int, fingerprint: str) -> None:
    """Promise: each signal goes from the driver's library to a verdict on the rank whose GPU it is."""
    eye.gpus.set("node1", 2, key, value)
    verdict = eye.next()
    assert (verdict.fingerprint, verdict.device) == (fingerprint, "gpu2")
    assert (verdict.node, verdict.rank, verdict.step) == ("node1", 10, 40)


def test_an_xid_is_told_at_once_also_of_a_lost_gpu(eye: Eye) -> None:
    """Promise: XIDs do not wait for the next reading, and the driver need not know the GPU any more."""
    began_s = time.monotonic()
    eye.gpus.xid("node1", 1, 79)
    verdict = eye.next()
    noticed_s = time.monotonic() - began_s
    assert (verdict.fingerprint, verdict.rank, verdict.certainty) == ("xid 79", 9, Certainty.PROOF)
    assert noticed_s < 5.0
    eye.gpus.set("node1", 1, "lost", 1)
    assert eye.next().fingerprint == "gpu lost"
    eye.gpus.xid("node1", 0, 48)
    assert eye.next().device == "gpu0", "the others' XIDs are heard beside a lost GPU"


def test_a_node_without_files_left_is_accused_and_its_gpus_are_watched_again(gpus: FakeGpus) -> None:
    """Promise: a probe that cannot be started ends no watch; it is a hint, of the cause that the node's own probe names
    too, so that both are one witness."""
    eye = Eye(gpus)
    with few_files():
        eye.watch.start()
        verdict = eye.next()
    assert (verdict.cause, verdict.certainty) == (Cause.NODE_DEGRADED, Certainty.HINT)
    assert "Too many open files" in verdict.evidence[0]
    gpus.set("node1", 2, "remap_failed", 1)
    assert eye.next().device == "gpu2"
    eye.watch.stop()


def test_a_call_that_never_returns_is_named_and_killed(eye: Eye) -> None:
    """Promise: the verdict names the call and the GPU; the second one weighs more; other GPUs are watched meanwhile;
    and when the driver is itself again, so is the watch."""
    eye.gpus.set("node1", 2, "hang", "nvmlDeviceGetPowerUsage")
    first = eye.next()
    assert (first.cause, first.certainty, first.device) == (Cause.GPU_FAULT, Certainty.HINT, "gpu2")
    assert "nvmlDeviceGetPowerUsage" in first.evidence[0]
    assert eye.next().certainty is Certainty.LIKELY
    eye.gpus.heal("node1")
    eye.gpus.set("node1", 3, "remap_failed", 1)
    assert eye.next().fingerprint == "remap failed"


def test_a_driver_that_goes_is_noticed(eye: Eye) -> None:
    """Promise: a driver that answered before and cannot be opened any more is the node's fault."""
    eye.gpus.set("node1", "*", "driver_down", 1)
    eye.gpus.set("node1", 0, "hang", "nvmlDeviceGetPowerUsage")
    hang, gone = eye.next(), eye.next()
    assert hang.fingerprint == "nvml hangs"
    assert (gone.fingerprint, gone.severity, gone.certainty) == ("gpu driver gone", Severity.NODE, Certainty.LIKELY)


def test_a_gpu_that_vanishes_from_the_list_is_the_one_accused(eye: Eye) -> None:
    """Promise: a driver opened anew may leave a dead GPU out and number the others anew; the right one is accused, and
    the others keep their ranks."""
    eye.gpus.set("node1", "*", "left_out", 1)
    eye.gpus.set("node1", 0, "hang", "nvmlDeviceGetPowerUsage")
    assert eye.next().fingerprint == "nvml hangs"
    eye.gpus.set("node1", 0, "hang", "nothing")
    lost = eye.next()
    assert (lost.fingerprint, lost.device, lost.rank) == ("gpu lost", "gpu1", 9)
    eye.gpus.set("node1", 2, "remap_failed", 1)
    failed = eye.next()
    assert (failed.fingerprint, failed.device, failed.rank) == ("remap failed", "gpu2", 10)


@pytest.mark.parametrize("missing", ["driver", "library", "visible"])
def test_without_gpus_there_is_a_clear_word_and_no_verdict(
    gpus: FakeGpus, missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: no driver, no library, or no GPU for the ranks: the log says so and nobody is accused."""
    caplog.set_level("INFO", "everstep.gpus")
    if missing == "driver":
        gpus.set("node1", "*", "driver_down", 1)
    if missing == "library":
        monkeypatch.delenv("LD_LIBRARY_PATH")
    eye = Eye(gpus, visible=() if missing == "visible" else None)
    eye.watch.start()
    words = {"driver": "Driver Not Loaded", "library": "Not Found", "visible": "none of 8 GPUs is visible"}
    _until(lambda: "GPUs are not watched" in caplog.text or "GPUs are watched" in caplog.text)
    if missing != "library" or "Not Found" in caplog.text:  # a machine with a real driver has the real library
        assert words[missing] in caplog.text
    eye.watch.stop()
    assert eye.said.empty()


UUIDS = {index: f"GPU-{index:08x}-aa" for index in range(8)}


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", []),
        ("-1", []),
        ("3, 1", [3, 1]),
        ("3,9,1", [3]),
        ("2,2", []),
        ("GPU-00000005,0", [5, 0]),
        ("GPU-0000000", []),
        ("MIG-GPU-00000004-aa/1/0", [4]),
        ("MIG-1c2d", []),
    ],
)
def test_cudas_rules_for_visible_devices(value: str | None, indices: list[int]) -> None:
    """Promise: local ranks are matched with GPUs as CUDA does it."""
    assert visible_indices(split_visible(value), UUIDS) == indices


@given(st.permutations(range(8)), st.integers(0, 8), st.booleans())
def test_any_order_of_visible_devices_is_kept(order: list[int], count: int, by_uuid: bool) -> None:
    """Promise: local rank i has the i-th entry, by number or by UUID."""
    entries = [UUIDS[index] if by_uuid else str(index) for index in order[:count]]
    assert visible_indices(split_visible(",".join(entries)), UUIDS) == order[:count]
