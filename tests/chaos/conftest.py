"""A small corpus and a small model for whole jobs on this machine, and a guard that no test leaves anything behind."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.chaos.jobs import Job
from trainer.prepare import PrepareSettings, prepare

CONFIG = """
[run]
name = "set by the test"
seed = 7

[model]
family = "llama3"
flavor = "debugmodel"
layers = 2
vocab_size = 512

[data]
tokenizer = "{corpus}/tokenizer.json"

[[data.sets]]
path = "{corpus}/corpus"

[training]
steps = 24
seq_len = 32
global_batch_size = 8
microbatch_size = 2

[optimizer]
lr = 1e-3
schedule = "constant"

[parallelism]
dp_shard = 2
tp = 2

[checkpoint]
persist_interval_steps = 3

[health]
heartbeat_interval_s = 0.5
heartbeat_timeout_s = 4.0
hang_floor_s = 5.0
preflight = false

[cluster]
nodes = 2
ranks_per_node = 2
spares = 1
shrink = false
"""

MakeJob = Callable[..., Job]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of some of Python's own library."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare((), folder, PrepareSettings(vocab_size=512, library_max_bytes=1 << 20))
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Where the session's runs live, with `job.toml` in it."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "job.toml").write_text(CONFIG.format(corpus=corpus))
    return folder


@pytest.fixture
def make_job(home: Path) -> Iterator[MakeJob]:
    """Makes jobs; after the test none of them may have left a process or shared memory."""
    made: list[Job] = []

    def make(name: str, overrides: Sequence[str] = ()) -> Job:
        made.append(Job(home, name, "job.toml", overrides))
        return made[-1]

    yield make
    left = {job.name: job.leftovers() for job in made}
    for job in made:
        job.end()
    assert not any(left.values()), f"left behind: {left}"


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Randomness of a chaos test; the seed is in the test's output, and EVERSTEP_CHAOS_SEED repeats it."""
    seed = int(os.environ.get("EVERSTEP_CHAOS_SEED", random.SystemRandom().randrange(1 << 30)))
    request.node.add_report_section("setup", "chaos seed", f"EVERSTEP_CHAOS_SEED={seed}")
    return random.Random(seed)
