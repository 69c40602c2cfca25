"""Where alerts go: a webhook, a command. Each call may take as long as its time-out; threads are `cluster.alerts`'."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from cluster.alert_words import Alert

_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 30.0
_LONGEST_TEXT = 3000
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class NotSentError(Exception):
    """Why an alert could not be sent, in words that hold no secret."""


class Sink(Protocol):
    """Somewhere to send alerts to. name: for the log."""

    name: str

    def send(self, alert: Alert, ending: threading.Event) -> None:
        """Send one, in this thread. ending: no more pauses from now on. Raises NotSentError."""


class SecretUrl:
    """A webhook's URL. Its text is not in its repr, and so in no log or traceback."""

    def __init__(self, url: str, source: str) -> None:
        """source: where it came from, for messages. Raises ValueError if it is no URL that can be used."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable():
            raise ValueError(f"{source} holds no URL; put one line in it that begins with https://")
        if " " in url:
            raise ValueError(f"{source}: the URL has a space in it; take the space out")
        self.url = url

    def __repr__(self) -> str:
        return "SecretUrl(<hidden>)"


def read_webhook_file(path: Path) -> SecretUrl:
    """The URL in a file that only its owner may read.

    Raises:
        ValueError: if others may read it, or it holds no URL.
        OSError: if it cannot be read.
    """
    if path.stat().st_mode & 0o077:
        raise ValueError(f"alerts.webhook_file: {path} holds a secret and others may read it; run: chmod 600 {path}")
    return SecretUrl(path.read_text(errors="replace").strip(), f"alerts.webhook_file: {path}")


class Webhook:
    """Slack-shaped: POST of {"text": ...}. Redirections are not followed: the URL alone says where alerts may go."""

    name = "webhook"

    def __init__(self, url: SecretUrl, timeout_s: float, retries: int, backoff_s: float = _BACKOFF_S) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self._opener = urllib.request.build_opener(_NoRedirect)

    def send(self, alert: Alert, ending: threading.Event) -> None:
        """POST it, again after growing random pauses where that may help."""
        body = msgspec.json.encode({"text": slack_text(alert.text)})
        for attempt in range(self.retries + 1):
            why, hopeful = self._post(body)
            if not why:
                return
            if not hopeful or attempt == self.retries:
                raise NotSentError(f"{why} (attempt {attempt + 1})")
            ending.wait(self._pause_s(attempt))

    def _pause_s(self, attempt: int) -> float:
        return random.uniform(0.5, 1.0) * min(_LONGEST_BACKOFF_S, self.backoff_s * 2**attempt)

    def _post(self, body: bytes) -> tuple[str, bool]:
        """Why it failed ("": it did not), and whether another attempt may help. The words must not hold the URL."""
        request = urllib.request.Request(
            self.url.url, body, {"Content-Type": "application/json; charset=utf-8", "User-Agent": "everstep"}
        )
        try:
            with self._opener.open(request, timeout=self.timeout_s) as answer:
                answer.read(1024)
            return "", False
        except urllib.error.HTTPError as error:
            error.close()
            return f"the server answered {error.code}", error.code in _TRY_AGAIN
        except urllib.error.URLError as error:
            reason = error.reason
            return reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else "no connection", True
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            return f"no answer ({type(error).__name__})", True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """None: the answer is an error like any other."""


class CommandHook:
    """A program that is run for each alert, with the alert as JSON on its standard input."""

    name = "command"

    def __init__(self, argv: Sequence[str], timeout_s: float, environment: Mapping[str, str]) -> None:
        self.argv = tuple(argv)
        self.timeout_s = timeout_s
        self.environment = dict(environment)

    def send(self, alert: Alert, ending: threading.Event) -> None:
        """Run it; what it started and left running is ended with it when the time is over."""
        try:
            process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=self.environment,
            )
        except OSError as error:
            raise NotSentError(f"{self.argv[0]} cannot be run ({error.strerror})") from error
        try:
            _, said = process.communicate(msgspec.json.encode(alert) + b"\n", self.timeout_s)
        except subprocess.TimeoutExpired:
            # Not reaped yet, so that the number is still its own, and its group's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _close(process)
            raise NotSentError(f"{self.argv[0]} did not end within {self.timeout_s:g} s") from None
        if process.returncode != 0:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            words = f": {last[0][:200]}" if last else ""
            raise NotSentError(f"{self.argv[0]} ended with {process.returncode}{words}")


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def slack_text(text: str) -> str:
    """Text that is shown as it is: without its three special characters nobody is called and no link is made up."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped if len(escaped) <= _LONGEST_TEXT else escaped[: _LONGEST_TEXT - 3] + "..."
