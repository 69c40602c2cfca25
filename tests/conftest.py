"""For all tests: hypothesis without a clock, and a real S3 server, started by the first test that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # boto3 is slow to import, and most tests do without
    from tests.faultproxy import FaultProxy
    from tests.s3server import S3Server


# What is tested is whether code is right; how long an example takes depends on who else is on the machine.
settings.register_profile("everstep", deadline=None)
settings.load_profile("everstep")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running server. It is everybody's: use a bucket of your own, and start it again if you stop it."""
    from tests.s3server import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The running server, with its credentials where boto3 looks for them."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return s3_server


@pytest.fixture
def s3_proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy of the test's own in front of the server."""
    from tests.faultproxy import FaultProxy

    with FaultProxy(s3.port) as proxy:
        yield proxy
