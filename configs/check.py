"""Checks across fields: each problem says which numbers do not fit and what to set instead. Pure, no torch."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from configs.check_alerts import check_alerts
from configs.check_evaluation import check_evaluation
from configs.check_layout import check_layout
from configs.check_precision import check_precision
from configs.errors import Problem, alternatives
from configs.models import FAMILIES
from configs.schema import JobConfig
from configs.shrinking import check_shrinking
from configs.timeouts import check_timeouts

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_NAME_CHARS = 100
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?:[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*)?")
_PREPARE = "run `everstep data prepare` first, or name files that exist"


def check_job(config: JobConfig) -> list[Problem]:
    """Everything that does not fit together in a well-typed configuration; looks at no file."""
    problems = _check_run(config) + _check_data(config)
    flavors = FAMILIES[config.model.family]
    facts = flavors.get(config.model.flavor)
    if facts is None:
        what = f"{config.model.family} has no such flavour{alternatives(config.model.flavor, list(flavors))}"
        problems.append(Problem("model.flavor", config.model.flavor, what))
    misfits = check_layout(config, facts)
    problems += misfits or check_shrinking(config)
    problems += check_precision(config, facts)
    problems += _check_validation(config) + check_evaluation(config) + _check_optimizer(config) + check_alerts(config)
    return problems + _check_checkpoint(config) + _check_numbers(config) + check_timeouts(config)


def check_files(config: JobConfig) -> list[Problem]:
    """What is missing of the data files that a run needs; relative paths count from the working directory."""
    problems = []
    for key, sets in (("data.sets", config.data.sets), ("validation.sets", config.validation.sets)):
        for index, data_set in enumerate(sets):
            missing = [name for name in (data_set.path + ".bin", data_set.path + ".idx") if not Path(name).is_file()]
            if missing:
                what = f"no {' and no '.join(missing)}; {_PREPARE}"
                problems.append(Problem(f"{key}[{index}].path", data_set.path, what))
    return problems + _check_tokenizer(config)


class _Vocabulary(msgspec.Struct):
    """`model` of a tokenizers JSON file: ids by token, or for Unigram a list whose index is the id."""

    vocab: dict[str, int] | list[object] = []


class _AddedToken(msgspec.Struct):
    id: int


class _Tokenizer(msgspec.Struct):
    model: _Vocabulary
    added_tokens: list[_AddedToken] = []


def _check_tokenizer(config: JobConfig) -> list[Problem]:
    """The tokenizer's largest id must have a row in the model's embedding."""
    path = config.data.tokenizer
    try:
        tokenizer = msgspec.json.decode(Path(path).read_bytes(), type=_Tokenizer)
    except OSError as error:
        return [Problem("data.tokenizer", path, f"cannot be read ({error.strerror}); {_PREPARE}")]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return [Problem("data.tokenizer", path, f"is no tokenizers JSON file ({error}); {_PREPARE}")]
    vocab = tokenizer.model.vocab
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
    tokens = 1 + max([*ids, *(token.id for token in tokenizer.added_tokens)], default=-1)
    facts = FAMILIES[config.model.family].get(config.model.flavor)
    rows = config.model.vocab_size or (facts.vocab_size if facts else tokens)
    if tokens <= rows:
        return []
    what = f"{path} has {tokens} tokens, the model room for {rows}; set at least {tokens}, or another data.tokenizer"
    return [Problem("model.vocab_size", config.model.vocab_size, what)]


def _check_run(config: JobConfig) -> list[Problem]:
    name = config.run.name
    if not _NAME.fullmatch(name) or len(name) > _NAME_CHARS:
        rule = f"letters, digits, '.', '_' and '-', at most {_NAME_CHARS}, not starting with '.' or '-'"
        return [Problem("run.name", name, f"cannot be a folder's name everywhere; use {rule}")]
    return []


def _check_data(config: JobConfig) -> list[Problem]:
    if not config.data.sets:
        return [Problem("data.sets", (), "there is no data; add [[data.sets]] with path = ... of a prepared corpus")]
    return []


def _check_numbers(config: JobConfig) -> list[Problem]:
    numbers = config.numbers
    problems = []
    for key, among in (
        ("skip_window_steps", numbers.skip_window_steps),
        ("max_stretch_steps", numbers.max_stretch_steps),
    ):
        if numbers.max_skips > among:
            what = f"there are never {numbers.max_skips} bad steps (numbers.max_skips) among {among}; "
            problems.append(Problem(f"numbers.{key}", among, f"{what}set at least {numbers.max_skips}"))
    return problems


def _check_validation(config: JobConfig) -> list[Problem]:
    validation, keep_best = config.validation, config.checkpoint.keep_best
    persist = config.checkpoint.persist_interval_steps
    if validation.interval_steps and not validation.sets:
        what = "there is nothing to measure on; add [[validation.sets]] with path = ... of a prepared corpus, or set 0"
        return [Problem("validation.interval_steps", validation.interval_steps, what)]
    if keep_best and not validation.interval_steps:
        fix = f"set validation.interval_steps = {persist} and add [[validation.sets]], or set 0"
        return [Problem("checkpoint.keep_best", keep_best, f"no validation loss is measured; {fix}")]
    if keep_best and validation.interval_steps % persist:
        fix = f"set {_round_up(validation.interval_steps, persist)}"
        what = f"only every {persist} steps is a snapshot written (checkpoint.persist_interval_steps), which "
        what += f"checkpoint.keep_best = {keep_best} could keep; {fix}"
        return [Problem("validation.interval_steps", validation.interval_steps, what)]
    return []


def _check_optimizer(config: JobConfig) -> list[Problem]:
    optimizer, steps = config.optimizer, config.training.steps
    problems = []
    averages = ("beta1", optimizer.beta1), ("beta2", optimizer.beta2), ("muon_momentum", optimizer.muon_momentum)
    for key, beta in averages:
        if beta >= 1:
            problems.append(Problem(f"optimizer.{key}", beta, "must be below 1, or the average never moves"))
    if optimizer.warmup_steps > steps:
        fix = f"set optimizer.warmup_steps to at most {steps}, or training.steps to at least {optimizer.warmup_steps}"
        problems.append(
            Problem("optimizer.warmup_steps", optimizer.warmup_steps, f"more than training.steps = {steps}; {fix}")
        )
    elif optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_fraction * steps > steps:
        largest = (steps - optimizer.warmup_steps) / steps
        problems.append(
            Problem(
                "optimizer.decay_fraction",
                optimizer.decay_fraction,
                f"decay would begin before the {optimizer.warmup_steps} steps of warm-up end; set at most {largest:g}",
            )
        )
    if optimizer.decay_shape != "linear" and optimizer.schedule != "wsd":
        what = f'{optimizer.schedule} has its own shape; set optimizer.schedule = "wsd", or leave this key out'
        problems.append(Problem("optimizer.decay_shape", optimizer.decay_shape, what))
    return problems


def _check_checkpoint(config: JobConfig) -> list[Problem]:
    checkpoint = config.checkpoint
    ram, persist = checkpoint.ram_interval_steps, checkpoint.persist_interval_steps
    problems = [
        Problem(
            f"checkpoint.{name}",
            value,
            f"must be a multiple of checkpoint.ram_interval_steps = {ram}; set {_round_up(value, ram)}",
        )
        for name in ("peer_interval_steps", "node_interval_steps", "persist_interval_steps")
        if (value := getattr(checkpoint, name)) % ram
    ]
    if checkpoint.keep_every_steps % persist:
        problems.append(
            _kept_but_never_written("checkpoint", checkpoint.keep_every_steps, "persist_interval_steps", persist)
        )
    return problems + _check_s3(config)


def _check_s3(config: JobConfig) -> list[Problem]:
    s3, persist = config.s3, config.checkpoint.persist_interval_steps
    if not s3.bucket:
        return []
    problems = []
    if not _BUCKET.fullmatch(s3.bucket):
        what = "is no bucket's name; use 3 to 63 of a-z, 0-9, '.' and '-', beginning and ending with a letter or digit"
        problems.append(Problem("s3.bucket", s3.bucket, what))
    if not _PREFIX.fullmatch(s3.prefix):
        what = "cannot begin object names; use letters, digits, '.', '_', '-' and '/' between them"
        problems.append(Problem("s3.prefix", s3.prefix, what))
    if s3.endpoint and not s3.endpoint.startswith(("http://", "https://")):
        problems.append(Problem("s3.endpoint", s3.endpoint, f"is no URL; set https://{s3.endpoint}"))
    if s3.interval_steps % persist:
        fix = f"set {_round_up(s3.interval_steps, persist)}"
        what = f"only what is in the run directory is sent (checkpoint.persist_interval_steps = {persist}); {fix}"
        problems.append(Problem("s3.interval_steps", s3.interval_steps, what))
    elif s3.keep_every_steps % s3.interval_steps:
        problems.append(_kept_but_never_written("s3", s3.keep_every_steps, "interval_steps", s3.interval_steps))
    return problems


def _kept_but_never_written(section: str, keep: int, interval_name: str, interval: int) -> Problem:
    return Problem(
        f"{section}.keep_every_steps",
        keep,
        f"only every {interval} steps is a snapshot written ({section}.{interval_name}); "
        f"set {_round_up(keep, interval)}, or 0 to keep none for ever",
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
