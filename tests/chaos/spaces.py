"""Network namespaces for the nodes of a test, tied together by a bridge in one more; each can be cut off."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

INTERFACE = "eth0"
_NET = "10.79.0"


class Spaces:
    """A namespace a name, each with an `eth0` of its own. OSError or CalledProcessError where the kernel has none."""

    def __init__(self, names: Sequence[str]) -> None:
        self.prefix = f"evp{os.getpid()}-"
        self.names = tuple(names)

    def __enter__(self) -> Spaces:
        try:
            self._open()
        except (OSError, subprocess.CalledProcessError):
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, name: str) -> tuple[str, ...]:
        """A command that becomes the one behind it, there. Not `ip netns exec`, which hides cgroups."""
        return ("nsenter", f"--net=/run/netns/{self.prefix}{name}")

    def cut(self, name: str) -> None:
        """Pull the cable."""
        self._in_hub("ip", "link", "set", f"v-{name}", "down")

    def heal(self, name: str) -> None:
        """Put it back."""
        self._in_hub("ip", "link", "set", f"v-{name}", "up")

    def close(self) -> None:
        """Remove them all; processes that are still in one are the test's to end."""
        for name in (*self.names, "hub"):
            if Path(f"/run/netns/{self.prefix}{name}").exists():
                with contextlib.suppress(subprocess.CalledProcessError):
                    _run("ip", "netns", "del", f"{self.prefix}{name}")

    def _open(self) -> None:
        _run("ip", "netns", "add", f"{self.prefix}hub")
        self._in_hub("ip", "link", "add", "bridge", "type", "bridge")
        self._in_hub("ip", "link", "set", "bridge", "up")
        for number, name in enumerate(self.names, 10):
            space = f"{self.prefix}{name}"
            _run("ip", "netns", "add", space)
            self._in_hub("ip", "link", "add", f"v-{name}", "type", "veth", "peer", "name", INTERFACE, "netns", space)
            self._in_hub("ip", "link", "set", f"v-{name}", "master", "bridge", "up")
            for words in (f"addr add {_NET}.{number}/24 dev {INTERFACE}", f"link set {INTERFACE} up", "link set lo up"):
                _run(*self.enter(name), "ip", *words.split())

    def _in_hub(self, *words: str) -> None:
        _run(*self.enter("hub"), *words)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=30)
