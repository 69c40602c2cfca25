"""The job's keys: one CURVE key pair for the supervisor and one for its agents, made once a run, 0600."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec
import zmq

from cluster.rundir import GARBLED, write_atomically


class KeyPair(msgspec.Struct, frozen=True):
    """A CURVE key pair in Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r}, secret=<hidden>)"


class JobKeys(msgspec.Struct, frozen=True):
    """Who may speak: the supervisor proves itself with `server`, every agent of the job with `client`."""

    server: KeyPair
    client: KeyPair


def make_or_read_keys(path: Path) -> JobKeys:
    """The run's keys; made on the first call."""
    if path.exists():
        return read_keys(path)
    _make_folder(path.parent)
    keys = new_keys()
    write_atomically(path, msgspec.json.encode(keys), mode=0o600)
    return keys


def new_keys() -> JobKeys:
    """Keys that nobody else has."""
    return JobKeys(server=_new_pair(), client=_new_pair())


def make_transfer_key(path: Path) -> None:
    """The secret with which agents move snapshots among each other; made on the first call, 0600."""
    if not path.exists():
        _make_folder(path.parent)
        write_atomically(path, secrets.token_bytes(32), mode=0o600)


def read_keys(path: Path) -> JobKeys:
    """Read the keys.

    Raises:
        ValueError: if the file is damaged or others may read it.
    """
    status = path.stat()
    if others_may_read(status.st_mode, status.st_uid, os.geteuid()):
        raise ValueError(f"{path} holds the job's keys and others may read it; run: chmod 600 {path}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobKeys)
    except GARBLED as error:
        raise ValueError(f"{path} is damaged ({error}); remove it while no job runs, and new keys are made") from None


def others_may_read(mode: int, owner: int, me: int) -> bool:
    """Whether a file is open to others than its owner and us. owner, me: ids of users.

    A Secret that is mounted in a pod is root's, and readable by the group of the pod's volumes alone: that is us.
    """
    mounted = owner == 0 and me != 0 and mode & 0o077 == 0o040
    return bool(mode & 0o077) and not mounted


def _make_folder(folder: Path) -> None:
    # A run that was on Kubernetes has a link here, to where its pods had their key (`cluster.kube_key`).
    if folder.is_symlink() and not folder.exists():
        folder.unlink()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public.decode(), secret=secret.decode())
