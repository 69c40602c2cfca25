"""Does the mesh fit the machines, the model and the batch?"""

from __future__ import annotations

from math import prod

from configs.errors import Problem
from configs.models import ModelFacts
from configs.schema import JobConfig

_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def check_layout(config: JobConfig, facts: ModelFacts | None) -> list[Problem]:
    """What does not fit; facts is None for an unknown flavour, whose checks are left out."""
    problems = _check_world(config) + _check_sequence(config, facts) + _check_batch(config)
    if config.parallelism.cp > 1:
        fix = "set parallelism.cp = 1 and use tp for long sequences"
        problems.append(
            Problem("parallelism.cp", config.parallelism.cp, f"context parallelism does not run yet; {fix}")
        )
    if facts is not None and config.model.layers > facts.n_layers:
        what = f"{config.model.flavor} has {facts.n_layers} layers; give fewer, or 0 for all of them"
        problems.append(Problem("model.layers", config.model.layers, what))
    if facts is not None:
        problems += _check_tensor(config, facts) + _check_experts(config, facts) + _check_stages(config, facts)
    return problems


def pipeline_stages(config: JobConfig) -> int:
    """Number of model parts over all pipeline ranks: two to a rank where stages are interleaved."""
    per_rank = 2 if config.parallelism.pp_schedule == "Interleaved1F1B" else 1
    return config.parallelism.pp * per_rank if config.parallelism.pp > 1 else 1


def _divisors(number: int) -> str:
    """Up to eight smallest divisors, to offer as values."""
    found = [n for n in range(1, min(number, 1024) + 1) if number % n == 0][:8]
    return ", ".join(str(n) for n in found)


def _check_world(config: JobConfig) -> list[Problem]:
    mesh, cluster = config.parallelism, config.cluster
    degrees = [getattr(mesh, axis) for axis in _AXES]
    product, world = prod(degrees), config.world_size
    if product == world:
        return []
    others = product // mesh.dp_shard
    fixes = []
    if world % others == 0:
        fixes.append(f"parallelism.dp_shard = {world // others}")
    if product % cluster.ranks_per_node == 0:
        fixes.append(f"cluster.nodes = {product // cluster.ranks_per_node}")
    fix = f"set {' or '.join(fixes)}" if fixes else f"make the degrees multiply to {world}"
    terms = " * ".join(f"{axis} {degree}" for axis, degree in zip(_AXES, degrees, strict=True))
    machines = f"cluster.nodes {cluster.nodes} * cluster.ranks_per_node {cluster.ranks_per_node} = {world}"
    what = f"{terms} = {product} ranks, but {machines}; {fix}"
    return [Problem("parallelism.dp_shard", mesh.dp_shard, what)]


def _check_sequence(config: JobConfig, facts: ModelFacts | None) -> list[Problem]:
    seq_len, tp = config.training.seq_len, config.parallelism.tp
    problems = []
    if seq_len % tp:
        what = f"sequence parallelism cuts it into parallelism.tp = {tp} pieces; set a multiple of {tp}"
        problems.append(Problem("training.seq_len", seq_len, what))
    if facts is not None and seq_len > facts.max_seq_len:
        what = f"{config.model.flavor} has positions for {facts.max_seq_len} tokens; set at most that"
        problems.append(Problem("training.seq_len", seq_len, what))
    return problems


def _check_batch(config: JobConfig) -> list[Problem]:
    training, mesh = config.training, config.parallelism
    batch, readers = training.global_batch_size, config.dp_degree
    if batch % readers:
        up = -(-batch // readers) * readers
        what = (
            f"must be a multiple of dp_replicate {mesh.dp_replicate} * dp_shard {mesh.dp_shard} = {readers}; set {up}"
        )
        return [Problem("training.global_batch_size", batch, what)]
    per_rank = batch // readers
    share = f"each data-parallel rank has {per_rank} of training.global_batch_size = {batch} sequences"
    problems = []
    if per_rank % training.microbatch_size:
        what = f"{share}; set a divisor of {per_rank}: {_divisors(per_rank)}"
        problems.append(Problem("training.microbatch_size", training.microbatch_size, what))
    if mesh.pp == 1:
        return problems
    if per_rank % mesh.pp_microbatch_size:
        what = f"{share}; set a divisor of {per_rank}: {_divisors(per_rank)}"
        return [*problems, Problem("parallelism.pp_microbatch_size", mesh.pp_microbatch_size, what)]
    microbatches = per_rank // mesh.pp_microbatch_size
    if mesh.pp_schedule == "Interleaved1F1B" and microbatches % mesh.pp:
        unit = mesh.pp * mesh.pp_microbatch_size * readers
        what = (
            f"{share}, so a step has {microbatches} pipeline microbatches; Interleaved1F1B needs a multiple of "
            f'parallelism.pp = {mesh.pp}; set a multiple of {unit}, or parallelism.pp_schedule = "1F1B"'
        )
        problems.append(Problem("training.global_batch_size", batch, what))
    return problems


def _check_tensor(config: JobConfig, facts: ModelFacts) -> list[Problem]:
    tp = config.parallelism.tp
    vocab = config.model.vocab_size or facts.vocab_size
    problems = []
    for what, count in (("heads", facts.n_heads), ("key/value heads", facts.n_kv_heads)):
        if count % tp:
            text = f"must divide the {count} {what} of {config.model.flavor}; set one of {_divisors(count)}"
            problems.append(Problem("parallelism.tp", tp, text))
            break
    if vocab % tp:
        up = -(-vocab // tp) * tp
        text = f"must divide the vocabulary of {vocab}; set model.vocab_size = {up} or another parallelism.tp"
        problems.append(Problem("parallelism.tp", tp, text))
    return problems


def _check_experts(config: JobConfig, facts: ModelFacts) -> list[Problem]:
    mesh = config.parallelism
    if mesh.ep == 1:
        return []
    layers = config.model.layers or facts.n_layers
    if not facts.is_moe:
        what = f"{config.model.family} {config.model.flavor} has no experts; set parallelism.ep = 1"
        return [Problem("parallelism.ep", mesh.ep, what)]
    if layers <= facts.n_dense_layers:
        what = (
            f"the first {facts.n_dense_layers} layers have no experts; set model.layers to more, or parallelism.ep = 1"
        )
        return [Problem("model.layers", layers, what)]
    problems = []
    ranks = mesh.dp_shard * mesh.cp * mesh.tp
    if ranks % mesh.ep:
        terms = f"dp_shard {mesh.dp_shard} * cp {mesh.cp} * tp {mesh.tp} = {ranks}"
        what = f"must divide {terms}; set one of {_divisors(ranks)}"
        problems.append(Problem("parallelism.ep", mesh.ep, what))
    if facts.n_experts % mesh.ep:
        choices = _divisors(facts.n_experts)
        what = f"must divide the {facts.n_experts} experts of {config.model.flavor}; set one of {choices}"
        problems.append(Problem("parallelism.ep", mesh.ep, what))
    return problems


def _check_stages(config: JobConfig, facts: ModelFacts) -> list[Problem]:
    mesh, stages = config.parallelism, pipeline_stages(config)
    if mesh.pp == 1:
        return []
    layers = config.model.layers or facts.n_layers
    problems = []
    if layers < stages:
        per_rank = stages // mesh.pp
        what = f"{mesh.pp_schedule} makes {stages} stages of {layers} layers; set at most {max(layers // per_rank, 1)}"
        problems.append(Problem("parallelism.pp", mesh.pp, what))
    if facts.tied_embeddings:
        what = (
            f"{config.model.flavor} shares its first and last weights, which a pipeline cannot; set parallelism.pp = 1"
        )
        problems.append(Problem("parallelism.pp", mesh.pp, what))
    return problems
