"""The files that let transformers' AutoTokenizer read a job's tokenizer."""

from __future__ import annotations

from pathlib import Path

import msgspec

from configs.models import FAMILIES
from configs.schema import JobConfig

_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


def tokenizer_files(config: JobConfig) -> tuple[dict[str, bytes], int | None]:
    """Contents by file name, and the id of the token that ends a document, if the tokenizer has one.

    Nothing for a job without a tokenizer (data.tokenizer is "").

    Raises:
        ValueError: the tokenizer that the job names is missing or none.
    """
    if not config.data.tokenizer:
        return {}, None
    path = Path(config.data.tokenizer)
    try:
        data = path.read_bytes()
        added = msgspec.json.decode(data, type=_Tokenizer).added_tokens
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"the tokenizer {path} cannot be read ({error}); put it back there") from error
    ids = {token.content: token.id for token in added if token.special}
    end = next((name for name in _END_OF_DOCUMENT if name in ids), None)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": FAMILIES[config.model.family][config.model.flavor].max_seq_len,
        **({} if end is None else {"eos_token": end}),
    }
    files = {"tokenizer.json": data, "tokenizer_config.json": msgspec.json.format(msgspec.json.encode(about)) + b"\n"}
    return files, None if end is None else ids[end]
