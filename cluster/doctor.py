"""Examines the node it runs on: versions, disks, memory, ports, devices by known answers, and the way to itself.

Facts come from children that may hang (`cluster.node_probe`, `parallelism.selftest`), grades from
`health.examination`. Composes parts of other packages; none of them loads torch here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import platform
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from checkpointing.copies import CopyStore
from checkpointing.transfer_auth import KEY_BYTES
from checkpointing.transfer_probe import PROBE_REF, make_probe, measure
from checkpointing.transfer_server import TransferServer
from health.examination import Check, Examination, Figure, Grade, Machine, Version, node_checks
from health.node import NodeFacts
from parallelism.selftest import CPU, SelfTest, Settings, child

GRACE_S = 10.0
_POLL_S = 0.2
_LOOPBACK_S = 0.05
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class SelfTestError(Exception):
    """The known-answer tests gave no result; the message is one line."""


def forked_selftest(settings: Settings, give_up: Callable[[], bool]) -> SelfTest | None:
    """Run the tests in a child of the fork server, which has torch loaded. None: give_up said so.

    Raises:
        SelfTestError: if the child died or took longer than it may.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs, settings))
    deadline_s = time.monotonic() + settings.timeout_s + GRACE_S
    process.start()
    theirs.close()
    try:
        while not ours.poll(_POLL_S):
            if give_up():
                return None
            if time.monotonic() > deadline_s:
                raise SelfTestError(f"no answer within {settings.timeout_s + GRACE_S:g} s")
        return msgspec.json.decode(ours.recv_bytes(), type=SelfTest)
    except EOFError:
        process.join(GRACE_S)
        raise SelfTestError(f"the process that ran the tests died ({process.exitcode})") from None
    finally:
        process.kill()
        process.join(GRACE_S)
        ours.close()


def spawned_selftest(settings: Settings) -> SelfTest:
    """Run the tests in a process of its own, which loads torch first.

    Raises:
        SelfTestError: if it died or took longer than it may.
    """
    command = [sys.executable, "-m", "parallelism.selftest", msgspec.json.encode(settings).decode()]
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=settings.timeout_s + 3 * GRACE_S)
    except subprocess.TimeoutExpired as error:
        raise SelfTestError(f"no answer within {error.timeout:g} s") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise SelfTestError(words[-1] if words else f"the tests ended with {done.returncode}")
    return msgspec.json.decode(done.stdout, type=SelfTest)


def examine(
    node: str,
    read_node: Callable[[], NodeFacts],
    run_selftest: Callable[[], SelfTest | None],
    more: Callable[[SelfTest | None], Sequence[Check]],
) -> Examination:
    """All of it. more: further checks, as the GPUs' and the network's, given what the known-answer tests found."""
    begun_s = time.monotonic()
    try:
        tests, problem = run_selftest(), ""
    except SelfTestError as error:
        tests, problem = None, str(error)
    checks = [*node_checks(read_node()), *more(tests)]
    if problem:
        checks.append(Check(name="selftest", grade=Grade.FAIL, detail=problem))
    if tests is not None:
        checks += selftest_checks(tests)
    versions = (*installed_versions(), *(Version(each.name, each.text) for each in (tests.versions if tests else ())))
    checks += [Check(name="version", device=each.name, grade=Grade.PASS, value=each.text) for each in versions]
    machine = Machine(versions=versions, figures=tuple(_figures(tests)))
    return Examination(
        node=node, t_wall_s=time.time(), seconds=time.monotonic() - begun_s, checks=tuple(checks), machine=machine
    )


def selftest_checks(tests: SelfTest) -> Iterator[Check]:
    """Results of known-answer tests, as checks."""
    for result in tests.results:
        value = f"{result.value:,.2f} {result.unit}" if result.value else ""
        yield Check(
            name=result.test,
            device=result.device,
            grade=Grade.PASS if result.ok else Grade.FAIL,
            value=", ".join(part for part in (value, result.detail) if part and result.ok),
            detail="" if result.ok else result.detail,
        )


def _figures(tests: SelfTest | None) -> Iterator[Figure]:
    for result in tests.results if tests else ():
        if result.value:
            yield Figure(
                name=result.test, device=result.device, model=result.model, value=result.value, unit=result.unit
            )


def installed_versions() -> tuple[Version, ...]:
    """Python, the packages that decide what is computed, the kernel and the driver; what is not there is left out."""
    found = [Version("python", platform.python_version()), Version("kernel", platform.release())]
    for package in ("torch", "torchao", "transformer-engine", "everstep"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(Version(package, importlib.metadata.version(package)))
    with contextlib.suppress(OSError):
        if match := re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _NVIDIA_DRIVER.read_text()):
            found.append(Version("driver", match[1]))
    return tuple(found)


def gpu_count_check(tests: SelfTest | None, ranks: int, least: int = 0) -> list[Check]:
    """Whether there is a GPU for each rank, if there are any, and at least `least`; and whether a driver is loaded that
    torch finds no GPU behind."""
    gpus = {result.device for result in tests.results if result.device != CPU} if tests else set()
    value = f"{len(gpus)} GPUs"
    if len(gpus) < least or (gpus and len(gpus) < ranks):
        detail = f"{value}, at least {least} are wanted" if len(gpus) < least else f"{value} for {ranks} ranks"
        return [Check(name="gpus", grade=Grade.FAIL, value=value, detail=detail)]
    if not gpus and _NVIDIA_DRIVER.exists():
        detail = "the driver is loaded, but torch finds no GPU: is it torch's CPU build, or did all GPUs fail?"
        return [Check(name="gpus", grade=Grade.FAIL, value=value, detail=detail)]
    return [Check(name="gpus", grade=Grade.PASS, value=value if gpus else "none; computing is done on the CPU")]


def loopback_check(address: str, key: bytes) -> Check:
    """The way from this node to its own transfer server: the network stack, the key, the memory it copies through."""
    found = measure(address, key, _LOOPBACK_S, GRACE_S)
    if found.problem:
        return Check(name="loopback", device=address, grade=Grade.FAIL, detail=found.problem)
    value = f"{found.mb_per_s:,.0f} MB/s, {found.latency_s * 1e3:.1f} ms"
    return Check(name="loopback", device=address, grade=Grade.PASS, value=value)


def own_loopback() -> Check:
    """The same where no server runs: with one that is made for it."""
    key = secrets.token_bytes(KEY_BYTES)
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        probe, copies = make_probe(), CopyStore(Path(folder) / "copies")
        server = TransferServer("127.0.0.1", key, lambda ref: probe if ref == PROBE_REF else None, copies)
        try:
            return loopback_check(f"127.0.0.1:{server.start()}", key)
        finally:
            server.close()
            copies.close()
