"""Alerts reach a real server and a real command, say the right thing, keep their secret, and stop nobody."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from cluster import events
from cluster.alert_sinks import CommandHook, NotSentError, SecretUrl, Webhook, read_webhook_file, slack_text
from cluster.alert_words import Alert, AlertWriter
from cluster.alerts import AlertWatcher, open_alerts
from configs.load import ConfigError, load_job, parse_job, resolve_toml
from configs.schema import AlertsConfig, JobConfig
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import Fact, FactKind

AT = {"t_wall_s": 1.0, "t_mono_s": 1.0}
SECRET = "T0123/B4567/very-secret"


class Server:
    """A real HTTP server that remembers bodies and answers with the codes it was given, then with 200."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.bodies: list[bytes] = []
        self.hold = threading.Event()
        self.hold.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.hold.wait(20)
                code = outer.codes.pop(0) if outer.codes else 200
                outer.bodies.append(body)
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", f"{outer.url}/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/services/{SECRET}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def texts(self) -> list[str]:
        """What was posted."""
        return [msgspec.json.decode(body)["text"] for body in self.bodies]

    def close(self) -> None:
        """End it."""
        self.hold.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    """One server a test."""
    server = Server()
    yield server
    server.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alert(text: str = "something happened") -> Alert:
    """Any alert."""
    return Alert(run="r", kind="verdict", severity=Severity.NODE, title="t", text=text, t_wall_s=1.0)


def verdict(incident: int = 3, severity: Severity = Severity.NODE, cause: Cause = Cause.CUDA_ERROR) -> events.AnyEvent:
    """A verdict on rank 12."""
    return events.VerdictGiven(
        **AT,
        generation=1,
        t_failed_wall_s=1.0,
        incident=incident,
        verdict=Verdict(
            node="node3", rank=12, cause=cause, severity=severity, step=512, fingerprint="x", device="gpu4",
            evidence=("first line", "second line"), certainty=Certainty.PROOF,
        ),
    )  # fmt: skip


def action(incident: int = 3, name: str = "replace", node: str = "node3") -> events.AnyEvent:
    """What was done."""
    return events.ActionTaken(**AT, incident=incident, action=name, reason="it is broken.", node=node, spare="node9")


def stopped(code: int = 1) -> events.AnyEvent:
    """The end."""
    return events.RunStopped(**AT, exit_code=code, reason="so it is", last_step=600)


def write(*happened: events.AnyEvent, **settings: object) -> list[Alert]:
    """All alerts about these events."""
    writer = AlertWriter("llama", AlertsConfig(**settings))  # type: ignore[arg-type]
    return [each for event in happened for each in writer.take(event)] + writer.flush()


# What is said ---------------------------------------------------------------------------------------------------------


def test_an_incident_is_one_alert_with_what_was_done() -> None:
    """Promise: who, where, why, whose fault, and what follows, in one message; its eviction is not told again."""
    evicted = events.NodeEvicted(**AT, node="node3", reason="it is broken.")
    (told,) = write(verdict(), action(), evicted)
    assert told.text.splitlines() == [
        "[llama] incident 3: cuda error rank 12 on node3 (gpu4) in step 512",
        "first line",
        "second line",
        "whose fault: certainly hardware: the GPU, its driver or its links; the node should be looked at",
        "done: replace: it is broken.",
    ]
    assert [type(event) for event in told.events] == [events.VerdictGiven, events.ActionTaken]
    assert told.title == "cuda error rank 12 on node3 (gpu4): replace"


def test_a_verdict_is_told_even_if_nothing_follows() -> None:
    """Promise: a verdict without an action, or with another incident's, is not lost."""
    assert [each.title for each in write(verdict())] == ["cuda error rank 12 on node3 (gpu4)"]
    assert [each.severity for each in write(verdict(3), verdict(4), action(4, "stop"))] == ["node", "job"]


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, ["verdict", "eviction", "end"]),
        ({"min_severity": "notice"}, ["verdict", "verdict", "eviction", "end"]),
        ({"min_severity": "job"}, ["eviction", "end"]),
        ({"events": ("end",)}, ["end"]),
        ({"events": ("begin", "snapshot")}, ["begin", "snapshot"]),
    ],
)
def test_only_what_was_asked_for_is_told(settings: dict[str, object], kinds: list[str]) -> None:
    """Promise: severity and kinds decide, and nothing else."""
    failed = Fact(
        kind=FactKind.SNAPSHOT_FAILED, node="node1", rank=0, generation=1, step=9, t_wall_s=1.0, detail="disk full"
    )  # fmt: skip
    told = write(
        events.RunStarted(**AT, run="llama", attempt=1, supervisor_pid=1, target_steps=9),
        verdict(0, Severity.NOTICE, Cause.SPIKE),
        action(0, "nothing"),
        verdict(1, Severity.WORKERS, Cause.WORKER_CRASH),
        action(1, "restart"),
        events.NodeEvicted(**AT, node="node7", reason="spare: no heartbeat"),
        events.WorkersReported(**AT, fact=failed),
        stopped(),
        **settings,
    )
    assert [each.kind for each in told] == kinds


def test_text_from_a_log_is_only_text() -> None:
    """Promise: whatever a worker printed calls nobody, makes no link, and has an end."""
    assert slack_text("<!channel> <https://x|y> & co") == "&lt;!channel&gt; &lt;https://x|y&gt; &amp; co"
    assert len(slack_text("x" * 100_000)) == 3000


# Sending --------------------------------------------------------------------------------------------------------------


def webhook(server: Server, **settings: object) -> Webhook:
    """A webhook to the server, in a hurry."""
    return Webhook(SecretUrl(server.url, "test"), **{"timeout_s": 10.0, "retries": 3, "backoff_s": 0.01} | settings)  # type: ignore[arg-type]


def test_a_webhook_is_posted_and_tried_again_while_that_may_help(server: Server) -> None:
    """Promise: Slack's shape; a server in trouble is tried again, a few times."""
    server.codes = [503, 429]
    webhook(server).send(alert("a < b"), threading.Event())
    assert server.texts() == ["a &lt; b"] * 3


@pytest.mark.parametrize(("codes", "attempts"), [([404], 1), ([302], 1), ([500] * 9, 4)])
def test_a_webhook_that_cannot_work_is_given_up(server: Server, codes: list[int], attempts: int) -> None:
    """Promise: a refusal is final, a redirection is not followed, and trying has an end; the secret is not told."""
    server.codes = codes
    with pytest.raises(NotSentError, match=f"answered {codes[0]}") as raised:
        webhook(server).send(alert(), threading.Event())
    assert len(server.bodies) == attempts
    assert SECRET not in f"{raised.value} {raised.value!r}"


def test_a_server_that_is_not_there_or_does_not_answer_is_given_up(server: Server) -> None:
    """Promise: no attempt is longer than its time-out."""
    server.hold.clear()
    began = time.monotonic()
    with pytest.raises(NotSentError):
        webhook(server, timeout_s=0.1, retries=1).send(alert(), threading.Event())
    assert time.monotonic() - began < 10
    server.close()
    with pytest.raises(NotSentError, match="refused") as raised:
        webhook(server, retries=0).send(alert(), threading.Event())
    assert SECRET not in str(raised.value)


def test_a_command_gets_the_alert_as_json(tmp_path: Path) -> None:
    """Promise: arguments are passed as they are, no shell sees them, and the alert comes whole on standard input."""
    out = tmp_path / "out"
    code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2] + sys.stdin.read())"
    hook = CommandHook((sys.executable, "-c", code, str(out), "$(id); x\n"), 30.0, os.environ)
    (told,) = write(verdict(), action())
    hook.send(told, threading.Event())
    first, line = out.read_text().splitlines()
    assert first == "$(id); x"
    assert msgspec.json.decode(line, type=Alert) == told


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("sh", "-c", "echo no luck >&2; exit 3"), "sh ended with 3: no luck"),
        (("sh", "-c", "sleep 60"), "sh did not end within 0.5 s"),
        (("sh", "-c", "sleep 60 & exit 0"), "sh did not end within 0.5 s"),
        (("/no/such/program",), "cannot be run"),
    ],
)
def test_a_command_that_fails_or_hangs_is_ended(argv: tuple[str, ...], why: str) -> None:
    """Promise: neither it nor what it started outlives its time."""
    began = time.monotonic()
    with pytest.raises(NotSentError, match=why):
        CommandHook(argv, 0.5, os.environ).send(alert(), threading.Event())
    assert time.monotonic() - began < 20


# The watcher ----------------------------------------------------------------------------------------------------------


def config(tmp_path: Path, *overrides: str) -> JobConfig:
    """The demo, with alerts."""
    return load_job("demo", ("--run.name", "llama", "--run.dir", str(tmp_path), *overrides))


def watcher(job: JobConfig, environment: dict[str, str]) -> AlertWatcher:
    """What `everstep run` would open."""
    opened = open_alerts(job, environment)
    assert opened is not None
    opened.open()
    return opened


def test_both_are_told_and_the_end_has_what_was_held_back(tmp_path: Path, server: Server) -> None:
    """Promise: a flood is cut off, and the last message says what it was; the secret leaves the environment."""
    out = tmp_path / "out"
    command = f'["{sys.executable}", "-c", "import sys; open({str(out)!r}, \'a\').write(sys.stdin.read())"]'
    overrides = ("--alerts.webhook_env", "HOOK", "--alerts.command", command, "--alerts.max_per_hour", "3")
    environment = {**os.environ, "HOOK": server.url}
    told = watcher(config(tmp_path, *overrides), environment)
    assert "HOOK" not in environment
    for incident in range(1, 8):
        told.on_event(verdict(incident))
        told.on_event(action(incident))
        told.on_tick()
    told.on_event(stopped())
    told.close()
    wait_until(lambda: out.exists() and out.read_text().count("\n") == 3)
    titles = [msgspec.json.decode(line, type=Alert).title for line in out.read_text().splitlines()]
    incident = "cuda error rank 12 on node3 (gpu4): replace"
    assert titles == [incident, incident, "stopped with exit code 1"]
    assert server.texts()[-1].splitlines()[-2:] == ["5 more alerts were held back", f"5 x {incident}"]
    assert SECRET not in out.read_text()


def test_a_dead_webhook_stops_nobody_and_is_said_once(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: a hundred alerts to a server that hangs cost the supervisor nothing, and the log one line."""
    server.hold.clear()
    url = tmp_path / "url"
    url.write_text(server.url + "\n")
    url.chmod(0o600)
    limits = ("--alerts.max_per_hour", "1000", "--alerts.timeout_s", "0.2", "--alerts.retries", "0")
    told = watcher(config(tmp_path, "--alerts.webhook_file", str(url), *limits), {})
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        for incident in range(1, 120):
            told.on_event(verdict(incident))
            told.on_event(action(incident))
            told.on_tick()
        assert time.monotonic() - began < 1.0
        wait_until(lambda: bool(caplog.records))
        server.hold.set()
        told.close()
    assert len(caplog.records) <= 2
    assert "training goes on" in caplog.text
    assert SECRET not in caplog.text


def test_without_alerts_nobody_is_started(tmp_path: Path) -> None:
    """Promise: by default there is no thread and no connection; a watcher that never ran can be closed."""
    assert open_alerts(config(tmp_path), {}) is None
    idle = open_alerts(config(tmp_path, "--alerts.command", '["true"]'), dict(os.environ))
    assert idle is not None
    idle.close()


# The secret -----------------------------------------------------------------------------------------------------------


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    """Promise: and so is a file without a URL; no message has what is in it."""
    path = tmp_path / "url"
    path.write_text(f"https://example.org/{SECRET}\n")
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600") as raised:
        read_webhook_file(path)
    path.chmod(0o600)
    assert SECRET not in f"{raised.value} {read_webhook_file(path)!r}"
    for text in ("", SECRET, f"ftp://example.org/{SECRET}", f"https://example.org/ {SECRET}", f"https:///{SECRET}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="URL") as raised:
            read_webhook_file(path)
        assert SECRET not in str(raised.value)


@pytest.mark.parametrize("key", ["webhook", "webhook_file", "webhook_env", "url"])
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    """Promise: wherever it is put by mistake, the error does not print it."""
    url = f"https://hooks.example.org/services/{SECRET}"
    with pytest.raises(ConfigError) as raised:
        config(tmp_path, f"--alerts.{key}", url)
    assert SECRET not in str(raised.value)
    text = resolve_toml(config(tmp_path)).replace("[alerts]\n", f"[alerts]\n{key}_ = {url}\n")
    with pytest.raises(ConfigError) as raised:
        parse_job(text, "job.toml")
    assert SECRET not in str(raised.value)


def test_a_variable_that_is_not_set_and_a_program_that_is_not_there_are_said_at_once(tmp_path: Path) -> None:
    """Promise: before anything runs, not when the first alert is lost."""
    with pytest.raises(ValueError, match="HOOK is not set"):
        open_alerts(config(tmp_path, "--alerts.webhook_env", "HOOK"), {})
    with pytest.raises(ValueError, match="no program"):
        open_alerts(config(tmp_path, "--alerts.command", '["no-such-program"]'), {})
    with pytest.raises(ConfigError, match="set one of them"):
        config(tmp_path, "--alerts.webhook_env", "HOOK", "--alerts.webhook_file", "x")
    with pytest.raises(ConfigError, match="nothing would ever be told"):
        config(tmp_path, "--alerts.webhook_env", "HOOK", "--alerts.events", "[]")


def test_the_section_survives_the_run_directory(tmp_path: Path) -> None:
    """Promise: lists of texts and of choices are written so that they load back."""
    job = config(tmp_path, "--alerts.command", '["a b", "\\"c\\""]', "--alerts.events", '["begin"]')
    assert job.alerts.command == ("a b", '"c"')
    assert parse_job(resolve_toml(job), "job.toml") == job
    with pytest.raises(ConfigError, match="did you mean"):
        config(tmp_path, "--alerts.events", '["begins"]')
    with pytest.raises(ConfigError, match="a list of texts"):
        config(tmp_path, "--alerts.command", "true")
