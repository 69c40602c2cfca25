"""What the supervisor tells a pod, and what the pod says of itself: two small files a pod in the run directory.

Pods are made by the Job controller, not by us; an agent is a child of its pod's entry (`cluster.kube_pod`). The
scheduler writes `pods/<pod>.json`, the entry answers in `pods/<pod>.state.json`. Both are replaced whole, never
appended to. A pod's name has a random end, so that what stands there for one is never taken for another's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from cluster.rundir import GARBLED, safe_name, write_atomically

Action = Literal["start", "stop"]

_POD_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_LONGEST_POD_NAME = 253
_DOMAIN = re.compile(r"[A-Za-z0-9._/:-]{0,253}")
_STATE = ".state.json"
_T = TypeVar("_T")

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Code = Annotated[int, msgspec.Meta(ge=0, le=255)]


class PodOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a pod shall do.

    serial grows with each order to a pod; an order counts once. `start`: run this agent; one that ran is ended first.
    `stop`: end it and all its workers now (SIGKILL), and give back what they held; the pod stays. domain: the agent's
    failure domain, or "".
    """

    agent_name: str
    serial: _Count
    action: Action
    domain: str = ""

    def __post_init__(self) -> None:
        safe_name(self.agent_name, "agent_name")
        if not _DOMAIN.fullmatch(self.domain):
            raise ValueError(f"domain {self.domain!r}: use letters, digits and './_:-'")


class PodState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a pod stands; written when something changed.

    serial: the newest order that was carried out, 0 for none yet. running: the agent's process exists; pid is its, in
    the pod's own namespace. exit_code: how the last agent ended, as a shell says it (128 + number for a signal); None
    if none has. leaving: the entry is ending, and so is the pod. t_wall_s is the pod's clock: for people only.
    """

    serial: _Count
    running: bool
    pid: int | None = None
    exit_code: _Code | None = None
    pod_uid: str = ""
    node_name: str = ""
    leaving: bool = False
    t_wall_s: float = 0.0


class Ended(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The run is over, and what was submitted for it ends: pods read this and leave with its exit code.

    submission: made from the job's key, which is new with each submission (`cluster.kube_key`): what an earlier one
    left behind ends nobody.
    """

    submission: str
    exit_code: _Code


def checked_pod(name: str) -> str:
    """The name, if it can be a pod's.

    Raises:
        ValueError: if Kubernetes would not have given it.
    """
    if len(name) > _LONGEST_POD_NAME or not _POD_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a pod; they are lower-case letters, digits, '-' and '.'")
    return name


def pods_folder(run_dir: Path) -> Path:
    """Where the files of a run's pods are."""
    return run_dir / "pods"


def order_path(run_dir: Path, pod: str) -> Path:
    """What this pod shall do. ValueError for what is no pod's name."""
    return pods_folder(run_dir) / f"{checked_pod(pod)}.json"


def state_path(run_dir: Path, pod: str) -> Path:
    """How this pod stands. ValueError for what is no pod's name."""
    return pods_folder(run_dir) / f"{checked_pod(pod)}{_STATE}"


def write_order(run_dir: Path, pod: str, order: PodOrder) -> None:
    """Tell a pod what to do. OSError if the run directory cannot be written."""
    path = order_path(run_dir, pod)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(order))


def read_order(run_dir: Path, pod: str) -> PodOrder | None:
    """What a pod was told last; None if nothing yet.

    Raises:
        ValueError: if the file is damaged.
        OSError: if the run directory cannot be read.
    """
    return _read(order_path(run_dir, pod), PodOrder)


def write_state(run_dir: Path, pod: str, state: PodState) -> None:
    """Say how this pod stands. OSError if the run directory cannot be written."""
    path = state_path(run_dir, pod)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(state))


def read_state(run_dir: Path, pod: str) -> PodState | None:
    """How a pod stood last; None if it has not said.

    Raises:
        ValueError: if the file is damaged.
        OSError: if the run directory cannot be read.
    """
    return _read(state_path(run_dir, pod), PodState)


def write_ended(run_dir: Path, ended: Ended) -> None:
    """Tell all pods of a submission to leave. OSError if the run directory cannot be written."""
    path = _ended_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(ended))


def read_ended(run_dir: Path, submission: str) -> Ended | None:
    """How this submission ended; None while it goes on.

    Raises:
        ValueError: if the file is damaged.
        OSError: if the run directory cannot be read.
    """
    found = _read(_ended_path(run_dir), Ended)
    return found if found is not None and found.submission == submission else None


def _ended_path(run_dir: Path) -> Path:
    return pods_folder(run_dir) / "_ended.json"  # no pod's name begins so


def _read(path: Path, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except GARBLED as error:
        raise ValueError(f"{path} is damaged: {error}") from error
