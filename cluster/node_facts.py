"""Reads a node's state from where the kernel shows it. Root folders are arguments, so that a copy of them can be read.

What is not there (no EDAC, no InfiniBand, no PSI) is left out of the facts, never guessed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from health.node import DiskFacts, Load, MemoryController, MemoryFacts, Place, Port, PortKind

_PROBE_BYTES = 4096
_GREEDY_CORES = 0.1
_TOP = 3
_ETHERNET_ERRORS = ("rx_crc_errors", "rx_frame_errors", "rx_fifo_errors", "tx_errors", "tx_carrier_errors")


def read_disk(place: Place, path: Path) -> DiskFacts:
    """Write a small file with fsync, remove it, and ask how much room there is. Blocks as long as the disk does.

    A folder that does not exist yet is looked at where its first ancestor that does exists; `path` stays what was
    asked for.
    """
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    error, write_s = "", -1.0
    begun_s = time.perf_counter()
    try:
        _write(folder / f".everstep-probe-{os.getpid()}")
        write_s = time.perf_counter() - begun_s
    except OSError as problem:
        error = errno.errorcode.get(problem.errno or 0, "unknown")
    try:
        room = os.statvfs(folder)
    except OSError as problem:
        name = errno.errorcode.get(problem.errno or 0, "unknown")
        return DiskFacts(place=place, path=str(path), error=error or name)
    return DiskFacts(
        place=place,
        path=str(path),
        free_bytes=room.f_bavail * room.f_frsize,
        total_bytes=room.f_blocks * room.f_frsize,
        read_only=bool(room.f_flag & os.ST_RDONLY),
        write_s=write_s,
        error=error,
    )


def _write(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, bytes(_PROBE_BYTES)) != _PROBE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):  # the write's own error says more
            path.unlink()


def read_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> MemoryFacts | None:
    """The machine's memory, or the cgroup's where that is less."""
    fields = {}
    for line in _lines(proc / "meminfo"):
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024 if rest.split() else 0
    if "MemTotal" not in fields:
        return None
    total, available = fields["MemTotal"], fields.get("MemAvailable", 0)
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None and limit < total:
        total, available = limit, min(available, max(0, limit - used) + _reclaimable(cgroup))
    return MemoryFacts(
        total_bytes=total,
        available_bytes=available,
        swap_used_bytes=fields.get("SwapTotal", 0) - fields.get("SwapFree", 0),
        stalled_pct=_stalled_pct(proc / "pressure" / "memory"),
    )


def _reclaimable(cgroup: Path) -> int:
    found = [line.split() for line in _lines(cgroup / "memory.stat")]
    return sum(int(words[1]) for words in found if words[:1] in (["inactive_file"], ["active_file"]))


def _stalled_pct(path: Path) -> float:
    for line in _lines(path):
        if line.startswith("full "):
            return float(line.split("avg10=")[1].split()[0])
    return -1.0


def read_controllers(edac: Path = Path("/sys/devices/system/edac/mc")) -> tuple[MemoryController, ...]:
    """What EDAC counted on each memory controller; () where there is no EDAC."""
    found = []
    for folder in _folders(edac):
        corrected, uncorrected = _number(folder / "ce_count"), _number(folder / "ue_count")
        if corrected is not None and uncorrected is not None:
            found.append(MemoryController(device=folder.name, corrected=corrected, uncorrected=uncorrected))
    return tuple(found)


def read_ports(
    net: Path = Path("/sys/class/net"), infiniband: Path = Path("/sys/class/infiniband")
) -> tuple[Port, ...]:
    """Physical network interfaces and InfiniBand ports. Bridges, tunnels and the like have no `device` and no say."""
    ethernet = [_ethernet(folder) for folder in _folders(net) if (folder / "device").exists()]
    fabric = [_infiniband(card.name, port) for card in _folders(infiniband) for port in _folders(card / "ports")]
    return (*ethernet, *fabric)


def _ethernet(folder: Path) -> Port:
    counts = [_number(folder / "statistics" / name) or 0 for name in _ETHERNET_ERRORS]
    speed = _number(folder / "speed")
    return Port(
        device=folder.name,
        kind=PortKind.ETHERNET,
        # Drivers that do not know say "unknown": only "down" is down.
        up=_text(folder / "operstate") not in ("down", "lowerlayerdown", "notpresent"),
        gbit_per_s=speed / 1000 if speed is not None and speed > 0 else -1.0,
        downs=_number(folder / "carrier_down_count") or 0,
        errors=sum(counts),
    )


def _infiniband(card: str, folder: Path) -> Port:
    counters = folder / "counters"
    rate = _text(folder / "rate").split()
    return Port(
        device=f"{card}/{folder.name}",
        kind=PortKind.INFINIBAND,
        up="ACTIVE" in _text(folder / "state"),
        gbit_per_s=float(rate[0]) if rate and rate[0].replace(".", "", 1).isdigit() else -1.0,
        downs=_number(counters / "link_downed") or 0,
        errors=_number(counters / "symbol_error") or 0,
        recoveries=_number(counters / "link_error_recovery") or 0,
    )


class LoadMeter:
    """Processor time between two readings, split into the run's and everybody else's."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._before: dict[tuple[int, int], int] = {}
        self._read_s = 0.0

    def read(self, run_dir: str, session: int) -> Load | None:
        """None the first time. The run's are the processes of `session` and of sessions begun for run_dir."""
        now_s = time.monotonic()
        seconds, self._read_s = now_s - self._read_s, now_s
        ours = {session}
        taken: dict[tuple[int, int], int] = {}
        names: dict[tuple[int, int], tuple[int, str]] = {}
        for pid, name, their_session, started, used in _processes(self._proc):
            key = (pid, started)
            taken[key], names[key] = used, (their_session, name)
            if pid == their_session and run_dir in _cmdline(self._proc / str(pid)):
                ours.add(pid)
        before, self._before = self._before, taken
        if not before or seconds <= 0:
            return None
        # A process that was not there before began since, so all it used it used since.
        cores = {key: (used - before.get(key, 0)) / self._ticks / seconds for key, used in taken.items()}
        foreign = {key: each for key, each in cores.items() if names[key][0] not in ours}
        greedy = sorted(foreign, key=lambda key: -foreign[key])[:_TOP]
        words = [f"{names[k][1]} ({k[0]}) {foreign[k]:.1f}" for k in greedy if foreign[k] >= _GREEDY_CORES]
        return Load(cores=os.cpu_count() or 1, foreign_cores=sum(foreign.values()), top=tuple(words))


def _processes(proc: Path) -> Iterator[tuple[int, str, int, int, int]]:
    """(pid, name, session, start tick, ticks used) of every process."""
    for folder in proc.iterdir():
        if folder.name.isdigit():
            text = _text(folder / "stat")
            if not text:
                continue
            fields = text.rpartition(")")[2].split()
            name = text.partition("(")[2].rpartition(")")[0]
            yield int(folder.name), name, int(fields[3]), int(fields[19]), int(fields[11]) + int(fields[12])


def _cmdline(folder: Path) -> Collection[str]:
    return _text(folder / "cmdline").split("\0")


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.removeprefix("-").isdigit() else None


def _text(path: Path) -> str:
    """ "" for what is not there, or may not or cannot be read: a port without carrier refuses its speed."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
