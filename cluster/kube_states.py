"""How pods say they stand, read in a thread: the shared volume may be slow, and the supervisor's loop must not be."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from cluster.kube_orders import PodState, pods_folder, read_state

_LOOK_EVERY_S = 0.5
_FILES_A_SECOND = 2000
_END = ".state.json"

logger = logging.getLogger("everstep.kubernetes")


class PodStates:
    """The newest word of every pod. Files that did not change are not read again."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._states: Mapping[str, PodState] = {}
        self._marks: dict[str, tuple[int, int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pod-states", daemon=True)

    def start(self) -> None:
        """Look once, here, and go on in the thread. OSError if the run directory cannot be read."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def of(self, pod: str) -> PodState | None:
        """What this pod said last; None if it has not."""
        return self._states.get(pod)

    def up(self) -> Mapping[str, str]:
        """The uid of each pod whose entry is there, by the pod's name."""
        return {name: state.pod_uid for name, state in self._states.items() if not state.leaving}

    def look(self) -> None:
        """Read what is new. OSError if the run directory cannot be read."""
        folder = pods_folder(self.run_dir)
        if not folder.is_dir():
            return
        states, marks = dict[str, PodState](), dict[str, tuple[int, int, int]]()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_END)
                if name == entry.name or name.startswith("."):
                    continue
                status = entry.stat()
                mark = (status.st_ino, status.st_mtime_ns, status.st_size)
                known = self._states.get(name) if self._marks.get(name) == mark else self._read(name)
                if known is not None:
                    states[name], marks[name] = known, mark
        self._states, self._marks = states, marks

    def _read(self, name: str) -> PodState | None:
        try:
            return read_state(self.run_dir, name)
        except ValueError as error:
            logger.warning("a pod's word is left out: %s", error)
            return None

    def _run(self) -> None:
        failing = False
        while not self._stop.wait(max(_LOOK_EVERY_S, len(self._marks) / _FILES_A_SECOND)):
            try:
                self.look()
                failing = False
            except OSError as error:
                if not failing:
                    logger.warning("how the pods stand is not known now: %s", error)
                failing = True
            except Exception:
                if not failing:
                    logger.exception("how the pods stand is not known now")
                failing = True
