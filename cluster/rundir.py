"""The run directory's layout, and the files in it that only the control plane reads."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from pathlib import Path

import msgspec

from configs.schema import JobConfig

GARBLED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not what they should be, nested without end among them."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Endpoint(msgspec.Struct, frozen=True):
    """Where the supervisor listens now."""

    host: str
    port: int
    pid: int


class RunInUseError(ValueError):
    """Another supervisor holds this run."""


def safe_name(name: str, what: str) -> str:
    """Return name if it can be one component of a path.

    Raises:
        ValueError: if it could climb out of its folder or confuse a shell.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r}: use letters, digits, '.', '_' and '-', and begin with a letter or digit")
    return name


class RunDir:
    """Paths below `runs/<name>/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, config: JobConfig) -> RunDir:
        """The folder of a job."""
        return cls(Path(config.run.dir).absolute() / safe_name(config.run.name, "run.name"))

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def endpoint(self) -> Path:
        return self.path / "supervisor.json"

    @property
    def lease(self) -> Path:
        """Renewed by the supervisor, see `cluster.lease`."""
        return self.path / "lease.json"

    @property
    def keys(self) -> Path:
        return self.path / "secrets" / "job.json"

    @property
    def network(self) -> Path:
        """The newest examination of the network."""
        return self.path / "network.json"

    @property
    def network_wish(self) -> Path:
        """Somebody's wish for one."""
        return self.path / "network-wanted.json"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_run_id"

    def logs(self, node: str) -> Path:
        """Folder of one node's logs."""
        return self.path / "logs" / safe_name(node, "node")

    def ram_root(self, ram_dir: str) -> Path:
        """The run's folder in shared memory; one sub-folder a node."""
        return Path(ram_dir) / self._owner()

    def semaphore_prefix(self, node: str = "") -> str:
        """How the names of a node's semaphores begin, without a node of all the run's: whoever finds one knows whose it
        is, and can remove what a kill left behind."""
        return f"{self._owner()}.{node}-" if node else f"{self._owner()}."

    def node_root(self, node_dir: str) -> Path:
        """The run's folder on a node's own disk; one sub-folder a node, since nodes may share a machine."""
        return Path(node_dir).absolute() / f"{self.path.name}-{self._digest()}"

    def _owner(self) -> str:
        return f"everstep-{os.getuid()}-{self._digest()}"

    def _digest(self) -> str:
        return hashlib.sha256(str(self.path).encode()).hexdigest()[:12]

    def create(self) -> None:
        """Make the folders that must exist before anything runs."""
        for folder in (self.path, self.path / "logs", self.path / "checkpoints", self.path / "incidents"):
            folder.mkdir(parents=True, exist_ok=True)

    def write_endpoint(self, endpoint: Endpoint) -> None:
        """Publish where the supervisor listens, atomically: agents may read at any moment."""
        write_atomically(self.endpoint, msgspec.json.encode(endpoint))

    def read_endpoint(self) -> Endpoint | None:
        """Where the supervisor listened last; None if that cannot be read."""
        try:
            return msgspec.json.decode(self.endpoint.read_bytes(), type=Endpoint)
        except (OSError, *GARBLED):
            return None

    def lock(self) -> int:
        """Take the run for this process; the kernel gives it back when the process ends, however it ends.

        Raises:
            RunInUseError: if a live supervisor has it.
        """
        fd = os.open(self.path / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            endpoint = self.read_endpoint()
            who = f" (process {endpoint.pid})" if endpoint else ""
            raise RunInUseError(
                f"run {self.path.name!r} is already being run{who}; `everstep status {self.path.name}` shows it"
            ) from None
        return fd


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a small file so that readers see the old or the new one, whole."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(fd)
    finally:
        os.close(fd)
    tmp.replace(path)


def find_run_folder(name_or_path: str, runs: str) -> Path:
    """The same as `find_run`, also for a run that was submitted and has not begun. Raises ValueError."""
    for path in (Path(runs) / name_or_path, Path(name_or_path)):
        if (path / "submission.json").exists():
            return path.absolute()
    return find_run(name_or_path, runs).path


def find_run(name_or_path: str, runs: str) -> RunDir:
    """The run of that name below `runs`, or the run directory at that path.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    for path in (Path(runs) / name_or_path, Path(name_or_path)):
        if (path / "config.toml").exists():
            return RunDir(path.absolute())
    have = sorted(path.parent.name for path in Path(runs).glob("*/config.toml"))
    raise ValueError(
        f"no run {name_or_path!r} in {runs}/; there are: {', '.join(have) or 'none'} (--dir looks elsewhere)"
    )


def supervisor_alive(run_dir: RunDir) -> bool:
    """Whether a supervisor holds the run now."""
    lock = run_dir.path / "supervisor.lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
