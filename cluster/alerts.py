"""Alerts: tells somebody who is not looking. A watcher of the supervisor that hands over and never waits.

What is worth telling is said by `cluster.alert_words`, how often by `cluster.alert_limit`, both pure. One thread a sink
does the sending; whatever happens there is at most a line in the log.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from cluster import events
from cluster.alert_limit import AlertLimit
from cluster.alert_sinks import CommandHook, NotSentError, SecretUrl, Sink, Webhook, read_webhook_file
from cluster.alert_words import Alert, AlertWriter, with_held
from configs.schema import AlertsConfig, JobConfig

_MOST_WAITING = 100
_LAST_WORDS_S = 5.0

logger = logging.getLogger("everstep.alerts")


class SinkThread:
    """Sends alerts one after the other, in the background. A failure is said once, until sending works again."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._waiting: queue.Queue[Alert | None] = queue.Queue(_MOST_WAITING)
        self._ending = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"alerts-{sink.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, alert: Alert) -> None:
        """Hand one over. One that finds the queue full is lost, and said to be."""
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            self._failed("too many wait to be sent")

    def end(self, within_s: float) -> None:
        """Send what waits, without pauses between attempts, for so long; the thread does not outlive the process."""
        if not self._thread.is_alive():
            return
        self._ending.set()
        deadline = time.monotonic() + within_s
        try:
            self._waiting.put(None, timeout=within_s)
        except queue.Full:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (alert := self._waiting.get()) is not None:
            try:
                self.sink.send(alert, self._ending)
                self._failing = False
            except NotSentError as error:
                self._failed(str(error))

    def _failed(self, why: str) -> None:
        if not self._failing:
            logger.warning("alerts: the %s does not work: %s; training goes on", self.sink.name, why)
        self._failing = True


class AlertWatcher:
    """See `cluster.supervisor.Watcher`."""

    def __init__(self, writer: AlertWriter, limit: AlertLimit, sinks: Sequence[Sink]) -> None:
        self.writer = writer
        self.limit = limit
        self.threads = [SinkThread(sink) for sink in sinks]

    def open(self) -> None:
        """Begin to send."""
        for thread in self.threads:
            thread.start()

    def on_event(self, event: events.AnyEvent) -> None:
        """Tell what is worth it."""
        for alert in self.writer.take(event):
            self._tell(alert)

    def on_tick(self) -> None:
        """A verdict without an action is not kept back, and neither is a summary that has a place now."""
        for alert in self.writer.flush():
            self._tell(alert)
        if held := self.limit.summary(time.monotonic()):
            self._put(self.writer.summary(held, time.time()))

    def close(self) -> None:
        """Let what waits go out, for a few seconds."""
        for alert in self.writer.flush():
            self._tell(alert)
        deadline = time.monotonic() + _LAST_WORDS_S
        for thread in self.threads:
            thread.end(max(0.1, deadline - time.monotonic()))

    def _tell(self, alert: Alert) -> None:
        if not self.limit.admit(time.monotonic(), alert.title, alert.urgent):
            return
        if alert.kind == "end" and (held := self.limit.take_held()):
            alert = with_held(alert, held)
        self._put(alert)

    def _put(self, alert: Alert) -> None:
        for thread in self.threads:
            thread.put(alert)


def open_alerts(config: JobConfig, environment: MutableMapping[str, str]) -> AlertWatcher | None:
    """The watcher that `[alerts]` asks for; None if nobody is to be told.

    The variable that holds a secret is taken out of environment: no agent, worker or command inherits it.

    Raises:
        ValueError: if the webhook's URL or the command is not there, or others may read the secret.
        OSError: if the file with the secret cannot be read.
    """
    alerts = config.alerts
    sinks: list[Sink] = []
    if (url := _webhook_url(alerts, environment)) is not None:
        sinks.append(Webhook(url, alerts.timeout_s, alerts.retries))
    if alerts.command:
        if shutil.which(alerts.command[0]) is None:
            raise ValueError(f"alerts.command: there is no program {alerts.command[0]!r}; give its whole path")
        sinks.append(CommandHook(alerts.command, alerts.timeout_s, environment))
    if not sinks:
        return None
    return AlertWatcher(AlertWriter(config.run.name, alerts), AlertLimit(alerts.max_per_hour), sinks)


def _webhook_url(alerts: AlertsConfig, environment: MutableMapping[str, str]) -> SecretUrl | None:
    if alerts.webhook_file:
        return read_webhook_file(Path(alerts.webhook_file))
    if not alerts.webhook_env:
        return None
    url = environment.pop(alerts.webhook_env, "").strip()
    if not url:
        raise ValueError(
            f"alerts.webhook_env: {alerts.webhook_env} is not set; put the webhook's URL into it, or use "
            "alerts.webhook_file"
        )
    return SecretUrl(url, f"alerts.webhook_env: {alerts.webhook_env}")
