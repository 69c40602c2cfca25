"""Names and values of weights in Hugging Face's formats, by torchtitan's own state dict adapters, one tensor a time."""

from __future__ import annotations

from torch import Tensor

from configs.schema import JobConfig
from parallelism.hf_config import HfValue, hf_config
from parallelism.outline import Outline, outline


class HfNames:
    """How one model's logical tensors are called, cut and permuted in Hugging Face's format.

    config: the fields of config.json. names: for each logical tensor, in the model's order, the shapes of the Hugging
    Face tensors that it becomes; none for a tensor that the format has no place for.
    """

    def __init__(self, model: Outline, config: dict[str, HfValue]) -> None:
        self.model = model
        self.config = config
        self._adapter = model.spec.state_dict_adapter(model.spec.model, None)
        self.names: dict[str, dict[str, tuple[int, ...]]] = {
            name: {key: tuple(value.shape) for key, value in self.to_hf(name, tensor).items()}
            for name, tensor in model.tensors.items()
        }

    def to_hf(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What becomes of one logical tensor; views of it where that is possible."""
        found: dict[str, Tensor] = self._adapter.to_hf(self.model.split(name, tensor))
        return found

    def from_hf(self, name: str, entries: dict[str, Tensor]) -> Tensor:
        """The inverse of `to_hf`, from all the entries that it gives."""
        complete = dict(entries)
        if self.config["tie_word_embeddings"]:
            # The adapter looks for one of them in every state dict, to tell a tied model from a broken one.
            complete.setdefault("lm_head.weight", self.model.tensors["tok_embeddings.weight"])
        return self.model.join(name, self._adapter.from_hf(complete))


def hf_names(config: JobConfig) -> HfNames:
    """The mapping for a job's model.

    Raises:
        ValueError: transformers has no model that computes the same; or as for `outline`.
    """
    model = outline(config)
    return HfNames(model, hf_config(config, model.spec.model))
