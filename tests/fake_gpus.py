"""GPUs that are not there: a libnvidia-ml.so.1 of our own, built with gcc, whose state a test changes as it is read."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SOURCE = Path(__file__).parent / "shims" / "fake_nvml.c"


class FakeGpus:
    """Eight healthy GPUs for whoever has `environment`; each node of a job has its own. folder: where to keep them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        library = folder / "libnvidia-ml.so.1"
        command = ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True)

    def environment(self) -> dict[str, str]:
        """For the processes that shall see them."""
        return {"LD_LIBRARY_PATH": str(self.folder), "EVERSTEP_TEST_GPUS": str(self.folder)}

    def add(self, *nodes: str) -> None:
        """Give these nodes GPUs of their own; others share those of `gpus`."""
        for node in nodes:
            (self.folder / f"{node}.state").touch()

    def set(self, node: str, gpu: int | str, key: str, value: int | str) -> None:
        """From now on this value is read; gpu `*` means all. The keys are in the source."""
        with (self.folder / f"{node}.state").open("a") as file:
            file.write(f"{gpu} {key} {value}\n")

    def xid(self, node: str, gpu: int, number: int) -> None:
        """The driver reports an XID."""
        with (self.folder / f"{node}.events").open("a") as file:
            file.write(f"{gpu} {number}\n")

    def heal(self, node: str) -> None:
        """All values are as at the beginning, and nothing hangs."""
        (self.folder / f"{node}.state").write_text("")
