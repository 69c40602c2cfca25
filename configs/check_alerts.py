"""Checks of `[alerts]`: who is told can be told, and the webhook's secret does not stand in the configuration. Pure."""

from __future__ import annotations

import re

from configs.errors import Problem
from configs.schema import JobConfig

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = "the URL is a secret, and a configuration is copied and printed; put it into a file (chmod 600)"


def check_alerts(config: JobConfig) -> list[Problem]:
    """What is wrong with the section."""
    alerts = config.alerts
    problems = []
    if "://" in alerts.webhook_file:
        problems.append(Problem("alerts.webhook_file", alerts.webhook_file, f"{_SECRET}, and name the file here"))
    if alerts.webhook_env and not _VARIABLE.fullmatch(alerts.webhook_env):
        what = f"must be the name of an environment variable: {_SECRET} or a variable, and name that here"
        problems.append(Problem("alerts.webhook_env", alerts.webhook_env, what))
    if alerts.webhook_file and alerts.webhook_env:
        what = "there is one webhook, but alerts.webhook_file names one too; set one of them"
        problems.append(Problem("alerts.webhook_env", alerts.webhook_env, what))
    if alerts.command and not alerts.command[0].strip():
        what = "begins with no program; name one, and its arguments after it, each as text of its own"
        problems.append(Problem("alerts.command", alerts.command, what))
    if not alerts.events and (alerts.webhook_file or alerts.webhook_env or alerts.command):
        what = 'nothing would ever be told; name some, such as "verdict" and "end"'
        problems.append(Problem("alerts.events", alerts.events, what))
    return problems
