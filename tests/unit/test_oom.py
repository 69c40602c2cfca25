"""OOM kills are read from the counters of the group that a worker really is in, whatever the machine's layout."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.oom import Mounts, OomWatch, find_mounts, memory_group
from tests.cgroups import MemoryGroup

EATER = "import sys; sys.stdin.readline(); sys.stdout.write(str(len(bytearray(300 << 20))))"
V1 = "32 31 0:29 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2 = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


def eater() -> subprocess.Popen[bytes]:
    """A process that takes 300 MiB as soon as it is told to."""
    return subprocess.Popen([sys.executable, "-c", EATER], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def feed(process: subprocess.Popen[bytes]) -> int:
    """Have it eat; how it ended."""
    process.communicate(b"\n", timeout=60)
    return process.returncode


def test_a_real_oom_kill_in_a_group_below_is_seen_and_belongs_to_its_generation() -> None:
    """Promise: a kill in a group of the job's own is found untold, and the next generation is clean."""
    watch = OomWatch()
    watch.begin()
    with MemoryGroup("everstep-test-below", 64 << 20) as group:
        process = eater()
        group.add(process.pid)
        assert watch.scope() == ""
        assert feed(process) == -signal.SIGKILL
        assert watch.scope() == f"cgroup {group.path}"
        watch.begin()
        assert watch.scope() == ""
        kill = eater()
        kill.kill()
        assert feed(kill) == -signal.SIGKILL
        assert watch.scope() == ""


def test_a_kill_that_the_workers_survived_long_ago_explains_no_later_end() -> None:
    """Promise: a loader's child that ran out of memory in the first hour does not make a SIGKILL of the tenth one."""
    watch = OomWatch(recent_s=0.05)
    watch.begin()
    with MemoryGroup("everstep-test-early", 64 << 20) as group:
        process = eater()
        group.add(process.pid)
        assert feed(process) == -signal.SIGKILL
        assert watch.scope() == f"cgroup {group.path}"
        for _ in range(2):
            threading.Event().wait(0.06)
            watch.follow([])
        assert watch.scope() == ""
        again = eater()
        group.add(again.pid)
        assert feed(again) == -signal.SIGKILL
        assert watch.scope() == f"cgroup {group.path}"


def test_a_worker_is_followed_into_its_group() -> None:
    """Promise: a kill is seen too where the worker's group is not below the agent's."""
    watch = OomWatch()
    watch.begin()
    with MemoryGroup("everstep-test-beside", 64 << 20, beside=True) as group:
        process = eater()
        group.add(process.pid)
        watch.follow([process.pid])
        assert feed(process) == -signal.SIGKILL
        assert watch.scope() == f"cgroup {group.path}"


def test_processes_that_are_gone_are_no_trouble() -> None:
    """Promise: a worker may end while its group is looked up."""
    watch = OomWatch()
    watch.begin()
    process = subprocess.Popen(["true"])
    process.wait()
    watch.follow([process.pid])
    assert watch.scope() == ""


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "folder"),
    [
        (f"{V1}\n{V2}", "5:cpu:/\n4:memory:/job/7\n0::/other", "/sys/fs/cgroup/memory/job/7"),
        (V2, "0::/system.slice/job", "/sys/fs/cgroup/unified/system.slice/job"),
        (V2, "0::/", "/sys/fs/cgroup/unified"),
        ("1 2 0:3 /kube/pod1 /sys/fs/cgroup ro - cgroup2 cgroup rw", "0::/kube/pod1", "/sys/fs/cgroup"),
        ("1 2 0:3 /kube/pod1 /sys/fs/cgroup ro - cgroup2 cgroup rw", "0::/kube/pod1/a", "/sys/fs/cgroup/a"),
        ("1 2 0:3 /docker/1 /sys/fs/cgroup/memory ro - cgroup c rw,memory", "4:memory:/", "/sys/fs/cgroup/memory"),
        ("1 2 0:3 / /sys/fs/a\\040b rw - cgroup2 cgroup rw", "0::/x", "/sys/fs/a b/x"),
        (V2, "0::/../../elsewhere", None),
        (V1, "3:cpu:/job", None),
        (V2, "", None),
    ],
)
def test_the_group_is_found_in_every_layout(mountinfo: str, cgroup: str, folder: str | None) -> None:
    """Promise: both versions, side by side too, inside containers with and without a namespace, odd paths."""
    mounts = find_mounts(mountinfo)
    assert mounts is not None
    assert memory_group(cgroup, mounts) == (Path(folder) if folder else None)


def test_without_a_memory_controller_there_is_none() -> None:
    """Promise: then the machine's own count has to do."""
    assert find_mounts("23 1 0:21 / /proc rw - proc proc rw\n33 31 0:30 / /cpu rw - cgroup cgroup rw,cpu") is None


@given(st.text(max_size=80), st.text(max_size=80), st.booleans())
def test_any_text_can_be_read(mountinfo: str, cgroup: str, v1: bool) -> None:
    """Promise: a strange kernel breaks no agent, and no folder above the mount is ever looked at."""
    find_mounts(mountinfo)
    folder = memory_group(cgroup, Mounts(v1, {"/": "/sys/fs/cgroup"}))
    assert folder is None or (folder.is_relative_to("/sys/fs/cgroup") and ".." not in folder.parts)
