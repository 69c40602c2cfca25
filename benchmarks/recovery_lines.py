"""What the peer of the recovery benchmark writes down, read by the benchmark. No torch here."""

from __future__ import annotations

from pathlib import Path

import msgspec

from trainer.events import append_line


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag="begun"):
    """A rank is about to compute its first step; wall times at which each phase of its start ended."""

    attempt: int
    rank: int
    pid: int
    process_s: float
    imported_s: float
    joined_s: float
    built_s: float
    loaded_s: float
    loaded_step: int


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """A step is in the weights."""

    attempt: int
    step: int
    t_wall_s: float


Line = Begun | Finished


def append(path: Path, line: Line) -> None:
    """Write a line."""
    append_line(path, line)


class Reader:
    """Reads a growing file of lines, each once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._offset = 0
        self._decoder = msgspec.json.Decoder(Line)

    def read(self) -> list[Line]:
        """All lines there are by now."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            self.lines.extend(self._decoder.decode(line) for line in whole.splitlines())
        return self.lines
