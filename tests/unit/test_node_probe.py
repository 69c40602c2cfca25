"""Promise: a node is read as the kernel shows it, and what hangs does not hang the agent."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.node_facts import LoadMeter, read_controllers, read_disk, read_memory, read_ports
from cluster.node_probe import Folder, NodeProbe, NodeWatch
from configs.schema import HealthConfig
from health.node import HUNG, NodeJudge, Place, PortKind
from health.verdict import Cause, Certainty, Verdict
from tests.files import few_files


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_ports_are_read(tmp_path: Path) -> None:
    """Physical interfaces and InfiniBand ports with their counts; bridges and tunnels are left out."""
    statistics = {"rx_crc_errors": "3", "rx_frame_errors": "0", "rx_fifo_errors": "2", "tx_errors": "1"}
    net = write(
        tmp_path / "net",
        {
            "eth0/operstate": "up", "eth0/speed": "100000", "eth0/carrier_down_count": "4", "eth0/device/vendor": "0x1",
            **{f"eth0/statistics/{name}": text for name, text in statistics.items()},
            "eth1/operstate": "down", "eth1/speed": "-1", "eth1/device/vendor": "0x1",
            "docker0/operstate": "down",
        },
    )  # fmt: skip
    card = "mlx5_0/ports/1"
    infiniband = write(
        tmp_path / "infiniband",
        {
            f"{card}/state": "4: ACTIVE", f"{card}/rate": "400 Gb/sec (4X NDR)",
            f"{card}/counters/link_downed": "2", f"{card}/counters/symbol_error": "70",
            f"{card}/counters/link_error_recovery": "1",
        },
    )  # fmt: skip
    eth0, eth1, fabric = read_ports(net, infiniband)
    assert (eth0.device, eth0.up, eth0.gbit_per_s, eth0.downs, eth0.errors) == ("eth0", True, 100.0, 4, 6)
    assert (eth1.device, eth1.up, eth1.gbit_per_s) == ("eth1", False, -1.0)
    assert (fabric.device, fabric.kind, fabric.up) == ("mlx5_0/1", PortKind.INFINIBAND, True)
    assert (fabric.gbit_per_s, fabric.downs, fabric.errors, fabric.recoveries) == (400.0, 2, 70, 1)
    assert read_ports(tmp_path / "none", tmp_path / "none") == ()


def test_memory_is_read(tmp_path: Path) -> None:
    """The machine's, or the cgroup's where it is less; EDAC's counts where there are any."""
    meminfo = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\nSwapTotal: 50 kB\nSwapFree: 20 kB"
    pressure = "some avg10=9.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=4.25 avg60=0.00 avg300=0.00 total=1"
    proc = write(tmp_path / "proc", {"meminfo": meminfo, "pressure/memory": pressure})
    whole = read_memory(proc, tmp_path / "none")
    assert whole is not None
    assert (whole.total_bytes, whole.available_bytes) == (1000 * 1024, 400 * 1024)
    assert (whole.swap_used_bytes, whole.stalled_pct) == (30 * 1024, 4.25)
    limits = {"memory.max": "500000", "memory.current": "480000", "memory.stat": "anon 9\ninactive_file 1000\nx 7"}
    part = read_memory(proc, write(tmp_path / "cgroup", limits))
    assert part is not None
    assert (part.total_bytes, part.available_bytes) == (500000, 21000)
    edac = write(tmp_path / "mc", {"mc0/ce_count": "12", "mc0/ue_count": "0", "power/x": "1"})
    assert [(each.device, each.corrected, each.uncorrected) for each in read_controllers(edac)] == [("mc0", 12, 0)]


def test_this_machine_can_be_read() -> None:
    """The real /proc and /sys make sense."""
    memory = read_memory()
    assert memory is not None
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert all(port.device for port in read_ports())


def test_a_disk_is_really_written(tmp_path: Path, small_disk: Path) -> None:
    """A full file system is found by writing to it, and nothing stays behind; what is not there yet is its parent."""
    well = read_disk(Place.NODE, tmp_path / "not" / "there")
    assert (well.error, well.read_only, well.path) == ("", False, str(tmp_path / "not" / "there"))
    assert well.write_s > 0
    assert well.free_bytes > 0
    (small_disk / "ballast").write_bytes(bytes(98 << 10))
    with (small_disk / "rest").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1024)):
            pass
    full = read_disk(Place.RAM, small_disk)
    assert (full.error, full.free_bytes) == ("ENOSPC", 0)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    closed = read_disk(Place.RAM, small_disk)
    assert (closed.error, closed.read_only) == ("EROFS", True)
    assert not list(tmp_path.glob(".everstep*")) + list(small_disk.glob(".everstep*"))


def test_others_load_is_told_from_the_runs() -> None:
    """A process that burns in another session is foreign, in this session it is ours."""
    burn = ["python3", "-c", "while True: pass"]
    meter = LoadMeter()
    for foreign in (True, False):
        assert meter.read("/no/such/run", os.getsid(0)) is None or not foreign
        with subprocess.Popen(burn, start_new_session=foreign) as process:
            try:
                deadline_s = time.monotonic() + 30.0
                while sum(psutil.Process(process.pid).cpu_times()[:2]) < 0.3:
                    assert time.monotonic() < deadline_s
                    threading.Event().wait(0.05)
                load = meter.read("/no/such/run", os.getsid(0))
            finally:
                process.kill()
        assert load is not None
        assert (f"({process.pid})" in " ".join(load.top)) is foreign or load.foreign_cores > 0.5


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[NodeProbe]:
    folders = [Folder(Place.RUN, str(tmp_path)), Folder(Place.RAM, "/dev/shm")]
    made = NodeProbe(folders, str(tmp_path), silence_s=1.0)
    yield made
    made.close()


def test_the_child_reads_everything(probe: NodeProbe) -> None:
    """One child does many readings, and ends with the probe."""
    first, second = probe.read(), probe.read()
    assert [disk.place for disk in first.disks] == [Place.RUN, Place.RAM]
    assert first.memory is not None
    assert second.load is not None
    (child,) = children()
    probe.close()
    assert not child.is_running()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "cluster.node_probe" in child.cmdline()]


def test_a_child_that_is_killed_blames_no_disk(probe: NodeProbe) -> None:
    """The next reading has a new child."""
    probe.read()
    children()[0].kill()
    assert all(not disk.error for disk in probe.read().disks)
    assert len(probe.read().disks) == 2


def test_a_disk_that_hangs_is_named(tmp_path: Path, frozen_disk: Path) -> None:
    """A write that never returns is given up in time, blamed on its place alone, and not tried again while it lasts."""
    folders = [Folder(Place.RUN, str(tmp_path)), Folder(Place.NODE, str(frozen_disk))]
    probe = NodeProbe(folders, str(tmp_path), silence_s=1.0)
    subprocess.run(["fsfreeze", "-f", str(frozen_disk)], check=True)
    begun_s = time.monotonic()
    try:
        found = [probe.read() for _ in range(2)]
        assert time.monotonic() - begun_s < 20.0
        for facts in found:
            assert {disk.place: disk.error for disk in facts.disks} == {Place.RUN: "", Place.NODE: HUNG}
    finally:
        subprocess.run(["fsfreeze", "-u", str(frozen_disk)], check=True)
    deadline_s = time.monotonic() + 30.0
    while any(disk.error for disk in probe.read().disks):
        assert time.monotonic() < deadline_s, "it is well again when the disk is"
    probe.close()


@pytest.fixture
def frozen_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 16 MiB in a file, which can be frozen."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    image.write_bytes(bytes(16 << 20))
    for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as missing:
            pytest.skip(f"LOUD: no {missing.filename}: a hanging disk cannot be made here")
        if done.returncode != 0:
            pytest.skip(f"LOUD: no loop device may be mounted here ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_child_that_is_stopped_does_not_stop_the_agent(probe: NodeProbe) -> None:
    """SIGSTOP stands for any hang: the reading ends, late and empty, and the next one has a new child."""
    probe.read()
    (child,) = children()
    child.send_signal(signal.SIGSTOP)
    assert probe.read().disks == ()
    assert len(probe.read().disks) == 2
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_node_without_files_left_is_accused_and_goes_on_being_watched(tmp_path: Path) -> None:
    """Promise: what makes a node ill does not end the looking; it is a hint after a few readings, and no proof."""
    said: queue.Queue[Verdict] = queue.Queue()
    probe = NodeProbe([Folder(Place.RUN, str(tmp_path))], str(tmp_path))
    watch = NodeWatch(probe, NodeJudge("node1", HealthConfig()), 0.05, lambda: 3, said.put)
    with few_files():
        watch.start()
        verdict = said.get(timeout=30.0)
    assert (verdict.cause, verdict.fingerprint, verdict.certainty) == (
        Cause.NODE_DEGRADED, "node not watched", Certainty.HINT,
    )  # fmt: skip
    assert "Too many open files" in verdict.evidence[0]
    deadline_s = time.monotonic() + 30.0
    while watch.newest is None or not watch.newest.disks:
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.02)
    watch.stop()


def test_the_watch_accuses(small_disk: Path, tmp_path: Path) -> None:
    """From a real full disk to a verdict, within a few intervals."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said: list[Verdict] = []
    heard = threading.Event()

    def accuse(verdict: Verdict) -> None:
        said.append(verdict)
        heard.set()

    probe = NodeProbe([Folder(Place.NODE, str(small_disk))], str(tmp_path))
    watch = NodeWatch(probe, NodeJudge("node1", HealthConfig()), 0.05, lambda: 3, accuse)
    watch.start()
    assert heard.wait(30.0)
    watch.stop()
    assert [(each.cause, each.device, each.step) for each in said] == [(Cause.NODE_FAULT, "node_dir", 3)]
    assert watch.newest is not None
