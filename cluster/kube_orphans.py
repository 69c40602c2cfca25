"""What the first process of a pod must do besides its work: wait for processes whose parents died."""

from __future__ import annotations

import contextlib
import os

import psutil


def reap_orphans(own: int | None, first: bool | None = None) -> None:
    """Wait for children that have ended. own: the child that somebody else waits for. first: whether orphans become
    ours; without it, whether this is the first process."""
    if not (os.getpid() == 1 if first is None else first):
        return
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid != own and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
