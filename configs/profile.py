"""A cluster's profile: what is a site's own, apart from any job. One TOML file a site, given to `everstep submit`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from configs.decode import decode_as
from configs.errors import ConfigError, Problem
from configs.profile_kubernetes import KubernetesProfile, check_kubernetes
from configs.schema import Positive, Section

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE = re.compile(r"[^\x00-\x1f\x7f\x85\u2028\u2029]*")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_TIME_LIMIT = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}|\d+")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.*)?")
_OWN_OPTIONS = (
    "nodes",
    "ntasks-per-node",
    "no-kill",
    "requeue",
    "signal",
    "open-mode",
    "job-name",
    "output",
    "comment",
)


class SlurmProfile(Section, frozen=True, kw_only=True):
    """`[slurm]`: what this site's sbatch wants.

    Empty texts leave the site's default. gres is per node (`gpu:8`); time_limit is `D-HH:MM:SS` or minutes; switches is
    `1@10:00`. modules are loaded, and setup, the site's own shell lines, is run before anything of ours. options are
    further sbatch options, each whole: `--licenses=x`. grace_s: how long before the wall-time limit the job is told to
    save and leave. chain: so many jobs in a row, each going on where the one before stopped.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    gres: str = ""
    exclude: str = ""
    time_limit: str = ""
    switches: str = ""
    exclusive: bool = True
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    grace_s: Positive = 120
    bad_node: Literal["drain", "down", "none"] = "drain"
    chain: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


class ClusterProfile(Section, frozen=True, kw_only=True):
    """A whole profile. environment and nccl become variables of every process; secrets have no place in them.

    interface: the network interface for control and collectives ("": the one that the host's name leads to).
    python: the interpreter on the nodes ("": the one that submits).
    """

    environment: dict[str, str] = msgspec.field(default_factory=dict)
    nccl: dict[str, str] = msgspec.field(default_factory=dict)
    interface: str = ""
    python: str = ""
    slurm: SlurmProfile = SlurmProfile()
    kubernetes: KubernetesProfile = KubernetesProfile()

    @property
    def variables(self) -> dict[str, str]:
        """All environment variables, nccl's with the prefix `NCCL_`."""
        return {**self.environment, **{f"NCCL_{name.upper()}": value for name, value in self.nccl.items()}}


def load_profile(path: Path | str) -> ClusterProfile:
    """Read a profile.

    Raises:
        ConfigError: with a line for each thing that is wrong, naming the file, the key, the value and the fix.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            [Problem("", None, f"cannot be read: {error.strerror}; name a profile", str(path))]
        ) from error
    except ValueError as error:
        raise ConfigError([Problem("", None, f"this is not TOML: {error}; mend it", str(path))]) from error
    decoded = decode_as(table, ClusterProfile)
    problems = decoded if isinstance(decoded, list) else list(_check(decoded))
    if problems or isinstance(decoded, list):
        raise ConfigError([msgspec.structs.replace(problem, source=str(path)) for problem in problems])
    return decoded


def _check(profile: ClusterProfile) -> Iterator[Problem]:
    for section, values in (("environment", profile.environment), ("nccl", profile.nccl)):
        for name, value in values.items():
            yield from _check_variable(f"{section}.{name}", name, value)
    yield from _check_slurm(profile.slurm)
    yield from check_kubernetes(profile.kubernetes)
    yield from _one_line("", profile)


def _check_variable(key: str, name: str, value: str) -> Iterator[Problem]:
    if not _VARIABLE.fullmatch(name):
        yield Problem(key, value, "is no name of a variable; use letters, digits and '_'")
    if _SECRET.search(name):
        fix = "job scripts and process lists show it; put it into a file that only you may read and name that file"
        yield Problem(key, None, f"looks like a secret: {fix}")


def _check_slurm(slurm: SlurmProfile) -> Iterator[Problem]:
    if slurm.time_limit and not _TIME_LIMIT.fullmatch(slurm.time_limit):
        yield Problem("slurm.time_limit", slurm.time_limit, 'write "D-HH:MM:SS", "HH:MM:SS" or minutes')
    if slurm.chain > 1 and not slurm.time_limit:
        yield Problem("slurm.chain", slurm.chain, "a chain of jobs needs slurm.time_limit, or the first one never ends")
    for option in slurm.options:
        name = option.removeprefix("--").partition("=")[0]
        if not _OPTION.fullmatch(option):
            yield Problem("slurm.options", option, 'write each whole: "--key=value"')
        elif name in _OWN_OPTIONS:
            yield Problem("slurm.options", option, f"--{name} is set by everstep; remove it")


def _one_line(prefix: str, section: msgspec.Struct) -> Iterator[Problem]:
    """No text of a profile may begin a line of its own in a script or manifest."""
    for field in msgspec.structs.fields(section):
        key, value = prefix + field.name, getattr(section, field.name)
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for text in texts:
            if isinstance(text, msgspec.Struct):
                yield from _one_line(f"{key}.", text)
            elif isinstance(text, str) and not _LINE.fullmatch(text):
                yield Problem(key, text, "has a line break or a control character; write it on one line")
