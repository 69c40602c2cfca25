"""Journals for tests: builders of single events, and a storyteller that lives through a run and remembers the truth."""

from __future__ import annotations

from collections import defaultdict

from cluster.events import (
    ActionTaken,
    AgentStarted,
    AnyEvent,
    GenerationPlanned,
    NodeFinished,
    NodeReady,
    RunStarted,
    RunStopped,
    VerdictGiven,
    WorkersReported,
)
from cluster.timeline import TimeCause
from configs.schema import (
    ClusterConfig,
    DataConfig,
    DataSet,
    HealthConfig,
    JobConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from health.verdict import Cause, Certainty, Severity, Verdict
from trainer.events import Fact, FactKind, StepRecord

EPOCH_S = 1_700_000_000.0


def job(nodes: int = 2, spares: int = 1, max_restarts: int = 100) -> JobConfig:
    return JobConfig(
        run=RunConfig(name="story"),
        model=ModelConfig(family="llama3", flavor="debugmodel"),
        data=DataConfig(sets=(DataSet(path="corpus"),), tokenizer="tokenizer.json"),
        training=TrainingConfig(steps=100, seq_len=64, global_batch_size=8),
        health=HealthConfig(max_restarts=max_restarts),
        cluster=ClusterConfig(nodes=nodes, ranks_per_node=2, spares=spares),
    )


def verdict(
    cause: Cause = Cause.USER_ERROR,
    node: str = "node0",
    rank: int = 0,
    step: int = 7,
    severity: Severity = Severity.WORKERS,
    fingerprint: str = "",
    certainty: Certainty = Certainty.LIKELY,
    slowdown: float = 0.0,
) -> Verdict:
    mark = fingerprint or cause.value
    return Verdict(
        node=node, rank=rank, cause=cause, severity=severity, step=step, fingerprint=mark, evidence=("where", mark),
        certainty=certainty, slowdown=slowdown,
    )  # fmt: skip


def record(step: int, generation: int, end_s: float, step_s: float, data_s: float, stall_s: float) -> StepRecord:
    return StepRecord(
        step=step, steps=100, generation=generation, t_wall_s=end_s, step_s=step_s, data_s=data_s, stall_s=stall_s,
        loss_avg=5.0 - step / 100, loss_max=6.0, grad_norm=1.0, lr=1e-3, tokens_seen=step * 512,
        tokens_per_sec_per_gpu=512 / step_s,
    )  # fmt: skip


def planned(generation: int, at_s: float, nodes: tuple[str, ...] = ("node0", "node1")) -> GenerationPlanned:
    return GenerationPlanned(
        t_wall_s=at_s, t_mono_s=at_s, generation=generation, nodes=nodes, ranks_per_node=2, store_host="localhost",
        store_port=1, ram_step=-1, reason="test",
    )  # fmt: skip


def given(
    what: Verdict, generation: int, incident: int, at_s: float, failed_s: float = 0.0, others: tuple[Verdict, ...] = ()
) -> VerdictGiven:
    return VerdictGiven(
        t_wall_s=at_s, t_mono_s=at_s, generation=generation, verdict=what, t_failed_wall_s=failed_s, incident=incident,
        others=others,
    )  # fmt: skip


def action(name: str, incident: int, at_s: float, node: str = "", spare: str = "") -> ActionTaken:
    return ActionTaken(
        t_wall_s=at_s, t_mono_s=at_s, incident=incident, action=name, reason="because", node=node, spare=spare
    )


def started(attempt: int, at_s: float) -> RunStarted:
    return RunStarted(t_wall_s=at_s, t_mono_s=at_s, run="story", attempt=attempt, supervisor_pid=1, target_steps=100)


def stopped(code: int, at_s: float, step: int = 0) -> RunStopped:
    return RunStopped(t_wall_s=at_s, t_mono_s=at_s, exit_code=code, reason="end", last_step=step)


def ready(node: str, at_s: float) -> NodeReady:
    return NodeReady(t_wall_s=at_s, t_mono_s=at_s, node=node, host="localhost", pid=1)


def fact(kind: FactKind, generation: int, step: int, at_s: float) -> WorkersReported:
    what = Fact(kind=kind, node="node0", rank=0, generation=generation, step=step, t_wall_s=at_s)
    return WorkersReported(t_wall_s=at_s, t_mono_s=at_s, fact=what)


class Story:
    """Lives through a run: what it tells is the journal and the metrics, what it knows is the truth."""

    def __init__(self, log_interval: int = 1) -> None:
        self.now_s = EPOCH_S
        self.events: list[AnyEvent] = []
        self.steps: list[StepRecord] = []
        self.truth_s: dict[TimeCause, float] = defaultdict(float)
        self.step = 0
        self.generation = 0
        self.incident = 0
        self.attempt = 0
        self._log_interval = log_interval
        self._history: list[tuple[int, float, float, float]] = []

    def spend(self, cause: TimeCause, seconds: float) -> None:
        self.now_s += seconds
        self.truth_s[cause] += seconds

    def start(self, startup_s: float) -> None:
        self.attempt += 1
        self.events.append(started(self.attempt, self.now_s))
        for node in ("node0", "node1", "node2"):
            self.events.append(AgentStarted(t_wall_s=self.now_s, t_mono_s=self.now_s, node=node, handle="1"))
            self.events.append(ready(node, self.now_s))
        self.spend(TimeCause.STARTUP, startup_s / 2)
        self.plan()
        self.spend(TimeCause.STARTUP, startup_s / 2)

    def plan(self) -> None:
        self.generation += 1
        self.events.append(planned(self.generation, self.now_s))

    def train(self, lengths_s: list[tuple[float, float, float]]) -> None:
        """Steps of (work, data wait, snapshot stall) seconds each."""
        for index, (work_s, data_s, stall_s) in enumerate(lengths_s):
            self.step += 1
            self.now_s += work_s + data_s + stall_s
            self._history.append((self.step, work_s, data_s, stall_s))
            if index == 0:
                self.events.append(fact(FactKind.FIRST_STEP, self.generation, self.step, self.now_s))
            if self.step % self._log_interval == 0:
                length_s = work_s + data_s + stall_s
                self.steps.append(record(self.step, self.generation, self.now_s, length_s, data_s, stall_s))

    def fail(self, resume_at: int, in_flight_s: float, notice_s: float, decide_s: float, restart_s: float) -> None:
        """A failure in the step in flight; the next generation goes on from the state after step resume_at."""
        self.incident += 1
        self.spend(TimeCause.LOST, in_flight_s)
        failed_s = self.now_s
        self.spend(TimeCause.NOTICING, notice_s)
        what = verdict(step=self.step + 1, fingerprint=str(self.incident))
        self.events.append(given(what, self.generation, self.incident, self.now_s, failed_s))
        self.events.append(action("restart", self.incident, self.now_s))
        self.spend(TimeCause.DECIDING, decide_s)
        self.plan()
        self.spend(TimeCause.RESTARTING, restart_s)
        self.go_back(resume_at)

    def go_back(self, step: int) -> None:
        """The state is again that after an earlier step: the later ones' time is lost."""
        for _, work_s, data_s, stall_s in (each for each in self._history if each[0] > step):
            self.truth_s[TimeCause.LOST] += work_s + data_s + stall_s
        self._history = [each for each in self._history if each[0] <= step]
        self.step = step

    def stop(self, code: int, finishing_s: float) -> None:
        self.spend(TimeCause.FINISHING, finishing_s)
        for node in ("node0", "node1"):
            self.events.append(
                NodeFinished(
                    t_wall_s=self.now_s, t_mono_s=self.now_s, node=node, generation=self.generation, step=self.step
                )
            )
        self.events.append(stopped(code, self.now_s, self.step))

    def truth(self) -> dict[TimeCause, float]:
        """Seconds by cause, the waits of steps that survived included."""
        truth = defaultdict(float, self.truth_s)
        for _, work_s, data_s, stall_s in self._history:
            truth[TimeCause.PRODUCTIVE] += work_s
            truth[TimeCause.DATA_WAIT] += data_s
            truth[TimeCause.SNAPSHOT_STALL] += stall_s
        return {cause: truth[cause] for cause in TimeCause}
