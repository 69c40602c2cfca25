"""What each precision recipe is, and which card and library can do it. Pure facts, no torch.

Capabilities are those of NVIDIA's cards as Transformer Engine 2.20 and torchao 0.18 ask for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from configs.schema import JobConfig

Capability = tuple[int, int]
Backend = Literal["te", "torchao", "emulated"]

FULL = ("auto", "fp32", "bf16")


class RecipeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One low-precision recipe.

    bits: of an element in a matrix multiplication. capability: the least that a card needs; before: the first that no
    longer has it, None if all later ones do. granule: what each dim of a converted matrix, and the tokens of a
    microbatch, must be a multiple of. backends: what can compute it, best first; `emulated` can everywhere. words: what
    it does, for a person.
    """

    bits: int
    capability: Capability
    before: Capability | None = None
    granule: int
    backends: tuple[Backend, ...]
    words: str


LOW: Mapping[str, RecipeFacts] = {
    "fp8_current": RecipeFacts(
        bits=8,
        capability=(8, 9),
        granule=16,
        backends=("te", "torchao", "emulated"),
        words="E4M3 forward, E5M2 gradients, one scale a tensor from its own largest value",
    ),
    "fp8_block": RecipeFacts(
        bits=8,
        capability=(9, 0),
        granule=16,
        backends=("te", "emulated"),
        words="E4M3, a scale for 1 x 128 elements of activations and gradients and for 128 x 128 of weights",
    ),
    "fp8_delayed": RecipeFacts(
        bits=8,
        capability=(8, 9),
        granule=16,
        backends=("torchao", "emulated"),
        words="E4M3 forward, E5M2 gradients, one scale a tensor from the largest values of past steps",
    ),
    "mxfp8": RecipeFacts(
        bits=8,
        capability=(10, 0),
        before=(12, 0),
        granule=32,
        backends=("te", "torchao", "emulated"),
        words="E4M3, a power of two for each 32 elements",
    ),
    "nvfp4": RecipeFacts(
        bits=4,
        capability=(10, 0),
        granule=16,
        backends=("te", "emulated"),
        words="E2M1, an E4M3 scale for 16 elements (16 x 16 of weights) under one a tensor, gradients by chance",
    ),
}


def is_low(recipe: str) -> bool:
    """Whether a recipe multiplies in less than 16 bits."""
    return recipe in LOW


def lowered_to(config: JobConfig, recipe: str) -> JobConfig:
    """The job with another recipe that the supervisor went over to; "": as it is."""
    if not recipe:
        return config
    precision = msgspec.structs.replace(config.precision, recipe=recipe, backend="auto")
    return msgspec.structs.replace(config, precision=precision)


def safer_than(recipe: str) -> str:
    """The recipe to go on with where numbers go wrong in this one and nothing else helped; "" if there is none.

    `auto` converts nothing: all is computed in what the rest was, which is bf16 on GPUs.
    """
    return "auto" if is_low(recipe) else ""


def microbatch_tokens(config: JobConfig) -> int:
    """Rows of the matrices that a rank multiplies at a time: the tokens of one microbatch."""
    mesh, training = config.parallelism, config.training
    sequences = mesh.pp_microbatch_size if mesh.pp > 1 else training.microbatch_size
    return sequences * training.seq_len // mesh.cp
