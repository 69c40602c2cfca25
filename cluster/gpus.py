"""The agent's eye on its GPUs: keeps a probe running (`cluster.gpu_probe`), and accuses what `health.gpu` finds.

The agent itself never calls a driver. A probe that hangs is killed and started anew, and that is a finding too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from cluster.gpu_amd import amd_reader
from cluster.gpu_child import ProbeProcess
from cluster.gpu_devices import visible_indices
from cluster.gpu_messages import Absent, Hello, ProbeStart, Waiting
from cluster.gpu_tools import DcgmWatch, ToolError
from configs.schema import HealthConfig
from health.gpu import GpuJudge, readings_line
from health.gpu_facts import Carrier, GpuSample, XidEvent
from health.gpu_signals import GpuLimits
from health.verdict import Verdict

_POLL_S = 0.25
_BACKOFF_S = (0.5, 2.0, 10.0, 60.0)
_SILENT_TIMEOUTS = 2.0
_UNSTARTED = 3

logger = logging.getLogger("everstep.gpus")


class Place(msgspec.Struct, frozen=True):
    """Where the node stands now: its first rank (-1: none, a spare), its ranks' step, its workers' generation."""

    first_rank: int = -1
    step: int = -1
    generation: int = 0


class GpuWatch:
    """Watches the GPUs that the node's ranks use, in a thread.

    visible: the entries of CUDA_VISIBLE_DEVICES, None if it is not set. accuse is called in the thread.
    Where NVML cannot be used, AMD's tools are asked, and where there are none, the log says that nothing is watched.
    tool_interval_s: command-line tools are not started more often.
    """

    def __init__(
        self,
        node: str,
        health: HealthConfig,
        ranks: int,
        visible: Sequence[str] | None,
        place: Callable[[], Place],
        accuse: Callable[[Verdict], None],
        tool_interval_s: float = 10.0,
    ) -> None:
        self._node = node
        self._tool_interval_s = tool_interval_s
        self._start = ProbeStart(
            interval_s=health.gpu_interval_s,
            timeout_s=health.gpu_timeout_s,
            ranks=ranks,
            visible=None if visible is None else tuple(visible),
        )
        repeat_s = health.evidence_window_hours * 3600
        self._judge = GpuJudge(node, GpuLimits(throttle_samples=health.gpu_throttle_samples, repeat_s=repeat_s))
        self._place = place
        self._accuse = accuse
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)
        self._dcgm = DcgmWatch(node, health.dcgm_interval_s, health.gpu_timeout_s, self.carrier, accuse)
        self._local_ranks: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self._first_numbers: dict[int, int] = {}
        self._described: set[int] = set()

    def start(self) -> None:
        """Begin, unless the configuration says never."""
        if self._start.interval_s > 0:
            self._thread.start()
        self._dcgm.start()

    def stop(self) -> None:
        """End the probe, and wait until it is gone."""
        self._stop.set()
        self._dcgm.stop()
        if self._thread.is_alive():
            self._thread.join(_POLL_S + _SILENT_TIMEOUTS * 2)

    def _run(self) -> None:
        failures = unstarted = 0
        while not self._stop.is_set():
            began_s = time.monotonic()
            try:
                absent, unstarted = self._follow_one_probe(), 0
            except OSError as error:
                # A node that is out of processes, memory or files is ill, and its GPUs must not go unwatched for that.
                absent, unstarted = None, unstarted + 1
                logger.warning("the GPU probe cannot be run: %s", error)
                if unstarted >= _UNSTARTED:
                    self._tell(self._judge.unwatched(str(error), unstarted, self.carrier(-1)))
            if absent is not None and not self._local_ranks:
                self._ask_amd(absent)
                return
            if absent is not None:
                self._tell(self._judge.driver_gone(absent, self.carrier(-1)))
            # One that worked for long begins anew with the shortest wait.
            failures = 1 if time.monotonic() - began_s > 2 * _BACKOFF_S[-1] else failures + 1
            # What a probe costs is paid when it runs; one that does not even start is tried again soon.
            longest = _UNSTARTED - 1 if unstarted else len(_BACKOFF_S)
            self._stop.wait(_BACKOFF_S[min(failures, longest) - 1])

    def _follow_one_probe(self) -> str | None:
        """Run one probe until it ends or has to be killed; returns why there is nothing to probe, if it says so."""
        probe = ProbeProcess(self._node, self._start)
        bound_s = self._start.interval_s + _SILENT_TIMEOUTS * self._start.timeout_s
        silent_s = 0.0
        try:
            while not self._stop.is_set():
                asked_s = time.monotonic()
                lines = probe.lines(_POLL_S)
                if lines is None:
                    logger.warning("the GPU probe (pid %d) ended by itself and is started again", probe.pid)
                    return None
                # An agent that was itself stopped must not count that time against the probe.
                silent_s = 0.0 if lines else silent_s + min(time.monotonic() - asked_s, 2 * _POLL_S)
                for line in lines:
                    if isinstance(line, Absent):
                        return line.reason
                    if isinstance(line, Waiting):
                        self._hangs(probe, line)
                        return None
                    self._take(line)
                if silent_s > bound_s:
                    self._tell(self._judge.silent(silent_s, probe.state(), self.carrier(-1)))
                    return None
        except ValueError as error:
            logger.warning("the GPU probe (pid %d) said what is no line of a probe: %s", probe.pid, error)
        finally:
            probe.close()
        return None

    def _ask_amd(self, absent: str) -> None:
        """Read AMD GPUs until the end, where there are any. A tool takes a while to start: it is not called often."""
        reader = amd_reader()
        if reader is None:
            logger.info("GPUs are not watched: %s; and neither amd-smi nor rocm-smi is here", absent)
            return
        logger.info("AMD GPUs are watched: ECC, temperature, throttling (NVIDIA: %s)", absent)
        complaint = ""
        while not self._stop.wait(max(self._start.interval_s, self._tool_interval_s)):
            try:
                samples = reader(self._start.timeout_s)
            except (ToolError, OSError, ValueError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    logger.warning("AMD GPUs cannot be read: %s", complaint)
                continue
            wanted = visible_indices(self._start.visible, {each.index: "" for each in samples})[: self._start.ranks]
            self._local_ranks = {index: rank for rank, index in enumerate(wanted)}
            for sample in samples:
                if sample.index in self._local_ranks:
                    self._take(sample)

    def _take(self, line: Hello | GpuSample | XidEvent) -> None:
        if isinstance(line, Hello):
            self._greet(line)
            return
        index = self._numbers.get(line.uuid, line.index)
        if index not in self._local_ranks:
            return
        line = msgspec.structs.replace(line, index=index)
        if isinstance(line, GpuSample):
            self._tell(self._judge.sample(line, self.carrier(index)))
            self._describe(line)
        else:
            logger.warning("XID %d on gpu%d", line.xid, index)
            self._tell(self._judge.xid(line, self.carrier(index)))

    def _greet(self, hello: Hello) -> None:
        """A probe has found the GPUs. A lost one may be missing in the driver's later lists, and shift the numbers of
        the others: a GPU keeps the number, and the rank, that it had in the first one."""
        names = ", ".join(f"gpu{each.index} ({each.name or 'no name'})" for each in hello.devices)
        events = "" if hello.events else "; it tells no XIDs"
        logger.info("GPUs are watched: %s; driver %s%s", names, hello.driver, events)
        if not self._local_ranks:
            self._local_ranks = {each.index: each.local_rank for each in hello.devices}
            self._numbers = {each.uuid: each.index for each in hello.devices if each.uuid}
            return
        self._first_numbers = {each.index: self._numbers.get(each.uuid, each.index) for each in hello.devices}
        now = {each.uuid for each in hello.devices}
        if "" in now:  # a lost GPU that is listed is told by its reading
            return
        for index in sorted(index for uuid, index in self._numbers.items() if uuid not in now):
            self._tell(self._judge.missing(index, self.carrier(index)))

    def _describe(self, sample: GpuSample) -> None:
        """The first reading of each GPU goes to the log."""
        if sample.index not in self._described and not sample.lost:
            self._described.add(sample.index)
            logger.info("gpu%d %s", sample.index, readings_line(sample))

    def _hangs(self, probe: ProbeProcess, waiting: Waiting) -> None:
        survives = not probe.kill()
        index, now_s = self._first_numbers.get(waiting.index, waiting.index), time.monotonic()
        self._tell(self._judge.stuck(now_s, index, waiting.call, waiting.for_s, survives, self.carrier(index)))

    def carrier(self, index: int) -> Carrier:
        """Whom this GPU serves now."""
        place = self._place()
        local_rank = self._local_ranks.get(index)
        known = local_rank is not None and place.first_rank >= 0
        rank = place.first_rank + local_rank if known and local_rank is not None else -1
        return Carrier(rank=rank, step=place.step, generation=place.generation)

    def _tell(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            logger.warning("%s: %s", verdict.cause.value, verdict.evidence[0])
            self._accuse(verdict)
