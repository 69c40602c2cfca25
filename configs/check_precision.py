"""Does the precision recipe fit the model, the batch and itself? What needs the card is asked when a rank starts."""

from __future__ import annotations

from configs.errors import Problem
from configs.models import ModelFacts
from configs.precision import LOW, RecipeFacts, microbatch_tokens
from configs.schema import JobConfig


def check_precision(config: JobConfig, facts: ModelFacts | None) -> list[Problem]:
    """What does not fit; facts is None for an unknown flavour, whose checks are left out."""
    recipe = LOW.get(config.precision.recipe)
    return _check_full(config) if recipe is None else _check_low(config, recipe, facts)


def _check_full(config: JobConfig) -> list[Problem]:
    precision = config.precision
    problems = []
    if precision.recipe != "auto" and precision.param_dtype not in ("auto", precision.recipe):
        fix = f'set precision.param_dtype = "auto", or precision.recipe = "{precision.param_dtype}"'
        what = f'precision.recipe = "{precision.recipe}" says otherwise; {fix}'
        problems.append(Problem("precision.param_dtype", precision.param_dtype, what))
    if precision.backend != "auto":
        fix = 'set precision.recipe to one of them, or precision.backend = "auto"'
        what = f'nothing is converted with precision.recipe = "{precision.recipe}", but with {", ".join(LOW)}; {fix}'
        problems.append(Problem("precision.backend", precision.backend, what))
    return problems


def _check_low(config: JobConfig, recipe: RecipeFacts, facts: ModelFacts | None) -> list[Problem]:
    return _check_backend(config, recipe) + _check_layers(config, facts) + _check_tokens(config, recipe)


def _check_backend(config: JobConfig, recipe: RecipeFacts) -> list[Problem]:
    precision = config.precision
    if precision.backend == "auto":
        return []
    if precision.backend not in recipe.backends:
        choices = " or ".join(f'"{backend}"' for backend in recipe.backends)
        why = ""
        if precision.backend == "te" and precision.recipe == "fp8_delayed":
            why = "; Transformer Engine keeps its history pickled, which no snapshot here holds"
        what = f"does not do {precision.recipe}{why}; set {choices}, or another precision.recipe"
        return [Problem("precision.backend", precision.backend, what)]
    if config.training.compile and precision.backend != "torchao":
        fix = 'set training.compile = false, or precision.backend = "torchao"'
        what = f'precision.backend = "{precision.backend}" cannot be traced as a whole; {fix}'
        return [Problem("training.compile", True, what)]
    return []


def _check_layers(config: JobConfig, facts: ModelFacts | None) -> list[Problem]:
    """Asked for but inactive is an error."""
    precision = config.precision
    layers = config.model.layers or (facts.n_layers if facts else 0)
    kept = precision.keep_first_layers + precision.keep_last_layers
    if facts is None or kept < layers:
        return []
    what = (
        f"with precision.keep_last_layers = {precision.keep_last_layers} none of the {layers} layers would be computed "
        f"in {precision.recipe}; set both so that they add up to at most {layers - 1}"
    )
    return [Problem("precision.keep_first_layers", precision.keep_first_layers, what)]


def _check_tokens(config: JobConfig, recipe: RecipeFacts) -> list[Problem]:
    tokens = microbatch_tokens(config)
    if tokens % recipe.granule == 0:
        return []
    what = (
        f"a microbatch has {tokens} tokens on a rank, and {config.precision.recipe} needs a multiple of "
        f"{recipe.granule}; set a multiple of {recipe.granule * config.parallelism.cp}"
    )
    return [Problem("training.seq_len", config.training.seq_len, what)]
