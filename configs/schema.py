"""The configuration of a job: frozen structs, one per TOML section.

Every field has a unit in its name where it has a unit, and a comment-free meaning in the docstring of its
section. Decoding, overrides and cross-field checks live in `configs.load` and `configs.check`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: immutable, unknown keys are errors."""


class RunConfig(Section, frozen=True, kw_only=True):
    """`[run]`: name is the run's folder below dir; seed feeds initialisation and data order."""

    name: str
    dir: str = "runs"
    seed: NonNegative = 0


class ModelConfig(Section, frozen=True, kw_only=True):
    """`[model]`: a torchtitan family and flavour.

    layers and vocab_size replace the flavour's own (0 keeps it). attention: `auto` takes FlexAttention with
    document masks on GPUs and SDPA (plain causal) on CPU.
    """

    family: Literal["llama3", "deepseek_v3", "qwen3"]
    flavor: str
    layers: NonNegative = 0
    vocab_size: NonNegative = 0
    attention: Literal["auto", "sdpa", "flex"] = "auto"


class DataSet(Section, frozen=True, kw_only=True):
    """`[[data.sets]]`: one prepared corpus; path is the prefix of `.bin` and `.idx`."""

    path: str
    weight: PositiveFloat = 1.0


class LeaveOut(Section, frozen=True, kw_only=True):
    """`[[data.leave_out]]`: `count` batches from `first` on, which no step reads; batches count from 1."""

    first: Positive
    count: Positive = 1


class DataConfig(Section, frozen=True, kw_only=True):
    """`[data]`: the blend, the tokenizer that made it (a tokenizers JSON file), how far to read ahead, and what not
    to read: step s takes the s-th batch of those that leave_out leaves."""

    sets: tuple[DataSet, ...]
    tokenizer: str
    prefetch_steps: Positive = 2
    leave_out: tuple[LeaveOut, ...] = ()


class TrainingConfig(Section, frozen=True, kw_only=True):
    """`[training]`: global_batch_size counts sequences a step over all ranks; microbatch_size those of one forward.

    z_loss: coefficient of the mean square of the log of the output softmax's denominator, which is minimised beside
    the loss (0: none).
    """

    steps: Positive
    seq_len: Positive
    global_batch_size: Positive
    microbatch_size: Positive = 1
    max_grad_norm: PositiveFloat = 1.0
    z_loss: NonNegativeFloat = 0.0
    activation_checkpoint: Literal["none", "selective", "full"] = "none"
    compile: bool = False


class ValidationConfig(Section, frozen=True, kw_only=True):
    """`[validation]`: a loss on data that is not trained on; sets are as in `[data]`.

    Measured after every interval_steps-th step and after the last one (0: never), each time on the same `batches`
    batches of training.global_batch_size samples.
    """

    sets: tuple[DataSet, ...] = ()
    interval_steps: NonNegative = 0
    batches: Positive = 8


class EvaluationConfig(Section, frozen=True, kw_only=True):
    """`[evaluation]`: a program that is run on exported snapshots, beside training, on the supervisor's machine.

    After every interval_steps-th step (0: never), a multiple of checkpoint.persist_interval_steps, and after the last
    one. command is a program and its arguments, run without a shell, with EVERSTEP_MODEL (the exported folder, in
    `format`), EVERSTEP_STEP and EVERSTEP_RUN in its environment. ema: export the average of the weights. Export and
    program may take timeout_s together.
    """

    command: tuple[str, ...] = ()
    interval_steps: NonNegative = 0
    format: Literal["hf", "dcp"] = "hf"
    ema: bool = False
    timeout_s: PositiveFloat = 3600.0


class OptimizerConfig(Section, frozen=True, kw_only=True):
    """`[optimizer]`: AdamW, or Muon beside it, and the schedule of both.

    `muon` (arXiv 2502.16982) updates all matrices but embeddings, head and what muon_except (patterns of names) says;
    the rest is AdamW's. It orthogonalises each matrix's momentum in muon_iterations, in bf16 on GPUs, and scales it so
    that it moves as far as AdamW's would (`match_rms_adamw`) or by the root of rows over columns (`original`).
    muon_lr_ratio: its rate as a part of lr.

    no_decay: what weight_decay spares: `vectors` (parameters of one dim: norms, biases), `embeddings`, or patterns of
    parameter names with `*`; one that matches nothing is an error.
    decay_fraction: the last part of the steps over which `wsd` decays, in the shape of decay_shape (`sqrt` is 1 minus
    the root of the way gone, arXiv 2405.18392); cosine and linear decay all the way after warm-up. min_lr_ratio: the
    floor as a part of lr.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 3e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    no_decay: tuple[str, ...] = ("vectors", "embeddings")
    muon_momentum: Fraction = 0.95
    muon_nesterov: bool = True
    muon_iterations: Annotated[int, msgspec.Meta(ge=1, lt=100)] = 5
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    muon_lr_ratio: PositiveFloat = 1.0
    muon_except: tuple[str, ...] = ()
    warmup_steps: NonNegative = 0
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    decay_fraction: Fraction = 0.2
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    min_lr_ratio: Fraction = 0.1


class EmaConfig(Section, frozen=True, kw_only=True):
    """`[ema]`: an exponential moving average of the weights, kept beside them, saved and exported with them.

    decay: what a step leaves of it (0: no average); lower in the first steps. interval_steps: how often the weights
    are taken in; the decay remains that of a step.
    """

    decay: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    interval_steps: Positive = 1


class ParallelismConfig(Section, frozen=True, kw_only=True):
    """`[parallelism]`: degrees of the mesh axes; pp * dp_replicate * dp_shard * cp * tp is the number of ranks.

    ep is carved out of dp_shard * cp * tp. pp_microbatch_size: sequences of one pipeline microbatch.
    """

    pp: Positive = 1
    dp_replicate: Positive = 1
    dp_shard: Positive = 1
    cp: Positive = 1
    tp: Positive = 1
    ep: Positive = 1
    pp_schedule: Literal["1F1B", "Interleaved1F1B"] = "1F1B"
    pp_microbatch_size: Positive = 1


class PrecisionConfig(Section, frozen=True, kw_only=True):
    """`[precision]`: what matrices are multiplied in. Master weights and optimizer state are fp32.

    recipe: `auto` is bf16 on GPUs and fp32 on CPU. The fp8, mxfp8 and nvfp4 ones convert the linear layers and experts
    of the decoder's layers, but not routers, the head, the first keep_first_layers and last keep_last_layers, and
    modules with one of the names in keep_modules. backend computes them: Transformer Engine, torchao, or plain
    torch on the rounded numbers (`emulated`, everywhere, slow); `auto` takes the best one that there is.

    param_dtype: of all that the recipe leaves alone (`auto`: bf16 on GPUs, fp32 on CPU); reduce_dtype: of sums of
    gradients. reuse_weights: a weight is rounded once a step and kept, not once a microbatch; `auto` does where weights
    are not sharded. amax_history_steps: how far back fp8_delayed looks.
    """

    recipe: Literal["auto", "fp32", "bf16", "fp8_current", "fp8_block", "fp8_delayed", "mxfp8", "nvfp4"] = "auto"
    backend: Literal["auto", "te", "torchao", "emulated"] = "auto"
    param_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    keep_first_layers: NonNegative = 1
    keep_last_layers: NonNegative = 1
    keep_modules: tuple[str, ...] = ()
    reuse_weights: Literal["auto", "on", "off"] = "auto"
    amax_history_steps: Positive = 16


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """`[checkpoint]`: how often each tier is fed and what is kept. `[s3]` has the keys of the farthest one.

    Every ram_interval_steps the state goes to shared memory below ram_dir. Every peer_interval_steps (a multiple of
    it; 0: every time) each node sends its part to peer_copies other nodes, in other failure domains where there are
    any; the next update waits for the copies, but never longer than peer_wait_s. peer_max_mb_per_s bounds what a node
    sends (0: no bound). Every node_interval_steps it goes to node_dir on the node's own disk ("": no such tier); every
    persist_interval_steps, and after persist_interval_minutes (0: no clock), to the run directory.

    keep_last newest snapshots stay in the run directory, every keep_every_steps-th for ever (0: none), and the
    keep_best with the lowest validation loss. A loaded snapshot whose first loss differs from the one in
    metrics.jsonl by more than the part canary_tolerance of it is rejected (0: not compared).
    """

    ram_interval_steps: Positive = 1
    ram_dir: str = "/dev/shm"
    peer_copies: NonNegative = 1
    peer_interval_steps: NonNegative = 0
    peer_wait_s: NonNegativeFloat = 2.0
    peer_max_mb_per_s: NonNegativeFloat = 0.0
    node_dir: str = ""
    node_interval_steps: Positive = 10
    persist_interval_steps: Positive = 10
    persist_interval_minutes: NonNegativeFloat = 0.0
    keep_last: Annotated[int, msgspec.Meta(ge=2)] = 2
    keep_every_steps: NonNegative = 0
    keep_best: NonNegative = 0
    canary_tolerance: NonNegativeFloat = 0.01


class S3Config(Section, frozen=True, kw_only=True):
    """`[s3]`: snapshots of the run directory that are also kept in a bucket; bucket "" means none.

    Objects lie below prefix/<run.name>/. endpoint is for servers other than AWS's. Credentials come from where boto3
    finds them (environment, files, instance role), never from here. Every interval_steps-th step (a multiple of
    checkpoint.persist_interval_steps) and the last one are sent, in parts of part_mb over `connections` connections,
    at most max_mb_per_s (0: no bound). keep_last and keep_every_steps are as in `[checkpoint]`.
    """

    bucket: str = ""
    prefix: str = "everstep"
    endpoint: str = ""
    region: str = "us-east-1"
    interval_steps: Positive = 10
    part_mb: Annotated[int, msgspec.Meta(ge=5, le=5120)] = 64
    connections: Positive = 8
    max_mb_per_s: NonNegativeFloat = 0.0
    keep_last: Annotated[int, msgspec.Meta(ge=2)] = 2
    keep_every_steps: NonNegative = 0


class HealthConfig(Section, frozen=True, kw_only=True):
    """`[health]`: how failures are noticed.

    A node is lost after heartbeat_timeout_s without a heartbeat. When no rank makes progress for hang_factor times the
    slowest recent step, never less than hang_floor_s, evidence is collected for up to evidence_timeout_s, and says
    whether it is a hang; ranks that may be at work get hang_patience times as long. startup_timeout_s bounds the time
    to the first step. flight_record_entries: how many collectives each rank remembers (0: torch's own choice).
    max_restarts is the budget of automatic restarts for the run.

    probe_steps: each rank times the parts of its steps and its waiting for others. A rank is slow when that is
    straggler_pct more than its peers take and than it took itself, in straggler_steps steps at least; after
    straggler_persist_steps steps of it the node may be replaced.

    At most max_evictions_per_hour nodes are evicted on evidence (0: none); nodes that are lost do not count. Evidence
    older than evidence_window_hours is no longer held against a node. restart_cost_s: what a restart is taken to cost
    until this run has had one.

    preflight: each node examines itself before it joins, and one that fails does not join. A device that is slower
    than its peers' median by preflight_slow_pct fails too (0: never). Nodes without ranks repeat the known-answer
    tests every selftest_interval_minutes (0: never). Every node_probe_interval_s (0: never) a node looks at its disks,
    memory and ports; others' processes are reported when they take foreign_load_pct of the processors (0: never).

    GPUs are read every gpu_interval_s (0: never), by a process that is killed when a call to the driver takes
    gpu_timeout_s. One that is hot or short of power in gpu_throttle_samples readings in a row is impaired. DCGM, where
    it is installed, is asked every dcgm_interval_s (0: never).
    """

    heartbeat_interval_s: PositiveFloat = 0.5
    heartbeat_timeout_s: PositiveFloat = 2.5
    hang_factor: PositiveFloat = 2.0
    hang_floor_s: PositiveFloat = 3.0
    hang_patience: Annotated[float, msgspec.Meta(ge=1)] = 5.0
    evidence_timeout_s: PositiveFloat = 1.0
    flight_record_entries: NonNegative = 2000
    startup_timeout_s: PositiveFloat = 600.0
    max_restarts: NonNegative = 100
    probe_steps: bool = True
    straggler_pct: PositiveFloat = 20.0
    straggler_steps: Positive = 3
    straggler_persist_steps: Positive = 50
    max_evictions_per_hour: NonNegative = 8
    evidence_window_hours: PositiveFloat = 24.0
    restart_cost_s: PositiveFloat = 20.0
    preflight: bool = True
    preflight_slow_pct: Annotated[float, msgspec.Meta(ge=0, lt=100)] = 20.0
    selftest_interval_minutes: NonNegativeFloat = 10.0
    node_probe_interval_s: NonNegativeFloat = 10.0
    foreign_load_pct: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    gpu_interval_s: NonNegativeFloat = 5.0
    gpu_timeout_s: PositiveFloat = 10.0
    gpu_throttle_samples: Positive = 12
    dcgm_interval_s: NonNegativeFloat = 60.0


class IntegrityConfig(Section, frozen=True, kw_only=True):
    """`[integrity]`: how numbers that a device computed or kept wrong are found.

    Every interval_steps-th step (0: none) the sums of weights and optimizer state right before the update must be those
    right after the update before, those of gradients must not change before the update, and replicas must be equal.

    replay_suspects: a step whose numbers are odd is computed again, on other devices too, before anything is blamed.
    Every replay_interval_steps-th step (0: none) is, whatever its numbers. record_every_step: keep the sums of each
    rank's gradients in all steps, so that the replay of a suspect one can say which rank was wrong the first time.
    """

    interval_steps: NonNegative = 10
    replay_suspects: bool = True
    replay_interval_steps: NonNegative = 2000
    record_every_step: bool = False


class NumbersConfig(Section, frozen=True, kw_only=True):
    """`[numbers]`: when a step's numbers are out of line, and what follows.

    An update is left out if the loss or the gradient norm is not finite, or lies more than spike_z deviations (0: no
    such bound) above the median of the last window_steps applied steps, or if the loss lies so far, and half, above
    its lowest median; not before step warmup_steps, and not while fewer than half of window_steps are known. After
    max_skips such steps among skip_window_steps (0: never) the run goes back to before the first of them and leaves
    out their batches, up to the first sane one, at most max_stretch_steps of them. If the trouble comes back at the
    same place, it goes back back_steps further each time. With the next after max_rollbacks it goes on in bf16, if it
    was computed in less and leave_low_precision says so, and stops with the one after that. Every layers_interval_steps
    (0: never) the gradients of each layer and the load of each expert are looked at.
    """

    window_steps: Annotated[int, msgspec.Meta(ge=4, le=256)] = 64
    warmup_steps: NonNegative = 100
    spike_z: NonNegativeFloat = 10.0
    max_skips: NonNegative = 3
    skip_window_steps: Positive = 8
    max_stretch_steps: Positive = 16
    back_steps: NonNegative = 16
    max_rollbacks: NonNegative = 3
    leave_low_precision: bool = True
    layers_interval_steps: NonNegative = 50


class ClusterConfig(Section, frozen=True, kw_only=True):
    """`[cluster]`: the machines. nodes * ranks_per_node is the number of ranks; spares are extra, warm nodes.

    backend: who owns them. On `slurm` and `kubernetes` this process must run inside the job: `everstep submit` sees to
    that. interface: the network interface for control and collectives ("": the one that the host's name leads to).
    bad_node: what the owner of the machines is told to do with a node that is evicted because it is bad.

    shrink: with no spare left, go on with the largest layout that fits on the nodes that are there, never with fewer
    than min_nodes (0: half of nodes), and grow back when others come. Growing waits until the job has been
    grow_after_minutes at its size, and until fewer than max_resizes_per_hour changes of size lie in the last hour.

    supervisor_lost_timeout_s: how long agents with nothing left to do wait for a supervisor to come back.
    lease_timeout_s: a node that the supervisor does not reach for so long, though it lives, stops by itself; so does
    one that cannot see the run directory either.
    leave_timeout_s: how long a job that is asked to leave may take to finish its step and save.

    node_history is the file in which all runs of a site remember nodes ("": `nodes.jsonl` in run.dir). An evicted node
    is back after repair_hours; a job that lacks one stands still for requeue_s: both price evictions. A node that was
    repaired is only a spare until it has served burn_in_hours.
    """

    backend: Literal["local", "slurm", "kubernetes"] = "local"
    interface: str = ""
    bad_node: Literal["drain", "down", "taint", "cordon", "none"] = "drain"
    nodes: Positive = 1
    ranks_per_node: Positive = 1
    spares: NonNegative = 0
    shrink: bool = True
    min_nodes: NonNegative = 0
    grow_after_minutes: NonNegativeFloat = 10.0
    max_resizes_per_hour: Positive = 4
    supervisor_lost_timeout_s: PositiveFloat = 600.0
    lease_timeout_s: PositiveFloat = 10.0
    leave_timeout_s: PositiveFloat = 60.0
    node_history: str = ""
    repair_hours: PositiveFloat = 24.0
    requeue_s: PositiveFloat = 1800.0
    burn_in_hours: NonNegativeFloat = 24.0


class TelemetryConfig(Section, frozen=True, kw_only=True):
    """`[telemetry]`: a step line and a metrics row every log_interval_steps; wandb offline by default."""

    log_interval_steps: Positive = 1
    wandb: Literal["off", "offline", "online"] = "offline"
    wandb_project: str = "everstep"


class AlertsConfig(Section, frozen=True, kw_only=True):
    """`[alerts]`: who is told when something happens; nobody by default. docs/alerts.md has examples.

    A webhook's URL is a secret and stands nowhere but in the file webhook_file, which only its owner may read, or in
    the environment variable webhook_env. command is a program and its arguments, run without a shell, with the alert
    as JSON on its standard input. Verdicts below min_severity are not told. No more than max_per_hour alerts go out in
    any hour; the rest is summed up in a later one. timeout_s bounds each attempt and each run of the command; an
    attempt at the webhook is repeated up to `retries` times.
    """

    webhook_file: str = ""
    webhook_env: str = ""
    command: tuple[str, ...] = ()
    min_severity: Literal["notice", "workers", "node", "job"] = "workers"
    events: tuple[Literal["verdict", "eviction", "snapshot", "evaluation", "size", "begin", "end"], ...] = (
        "verdict", "eviction", "evaluation", "size", "end",
    )  # fmt: skip
    max_per_hour: Positive = 12
    timeout_s: PositiveFloat = 10.0
    retries: NonNegative = 3


class JobConfig(Section, frozen=True, kw_only=True):
    """A whole job, resolved."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    s3: S3Config = S3Config()
    health: HealthConfig = HealthConfig()
    numbers: NumbersConfig = NumbersConfig()
    integrity: IntegrityConfig = IntegrityConfig()
    cluster: ClusterConfig = ClusterConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    alerts: AlertsConfig = AlertsConfig()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.cluster.nodes * self.cluster.ranks_per_node

    @property
    def dp_degree(self) -> int:
        """Number of ranks that read different samples."""
        return self.parallelism.dp_replicate * self.parallelism.dp_shard
