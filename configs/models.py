"""What the checks must know of each model flavour, without importing torch.

Names and numbers are those of torchtitan 0.3.0's registries; a unit test compares them.
"""

from __future__ import annotations

import msgspec


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One flavour. n_kv_heads equals n_heads where keys have no heads of their own (MHA, MLA).

    n_experts and top_k are 0 for dense models; the first n_dense_layers layers have no experts. n_params: all
    parameters, tied ones once. max_seq_len: what its rotary embedding was made for.
    """

    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    n_params: int
    max_seq_len: int
    n_experts: int = 0
    top_k: int = 0
    n_dense_layers: int
    tied_embeddings: bool = False

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return self.n_experts > 0


def _dense(
    n_layers: int, dim: int, heads: tuple[int, int], vocab: int, n_params: int, max_seq_len: int, tied: bool = False
) -> ModelFacts:
    return ModelFacts(
        n_layers=n_layers,
        dim=dim,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        vocab_size=vocab,
        n_params=n_params,
        max_seq_len=max_seq_len,
        n_dense_layers=n_layers,
        tied_embeddings=tied,
    )


def _moe(
    n_layers: int,
    dim: int,
    heads: tuple[int, int],
    vocab: int,
    n_params: int,
    max_seq_len: int,
    experts: tuple[int, int],
    n_dense_layers: int,
) -> ModelFacts:
    return ModelFacts(
        n_layers=n_layers,
        dim=dim,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        vocab_size=vocab,
        n_params=n_params,
        max_seq_len=max_seq_len,
        n_experts=experts[0],
        top_k=experts[1],
        n_dense_layers=n_dense_layers,
    )


LLAMA3 = {
    "debugmodel": _dense(6, 256, (16, 16), 2048, 6_163_712, 131_072),
    "1B": _dense(16, 2048, (32, 8), 128_256, 1_235_814_400, 131_072, tied=True),
    "3B": _dense(28, 3072, (24, 8), 128_256, 3_212_749_824, 131_072, tied=True),
    "8B": _dense(32, 4096, (32, 8), 128_256, 8_030_261_248, 131_072),
    "70B": _dense(80, 8192, (64, 8), 128_256, 70_553_706_496, 131_072),
    "405B": _dense(126, 16384, (128, 8), 128_256, 405_853_388_800, 131_072),
}

DEEPSEEK_V3 = {
    "debugmodel": _moe(6, 256, (16, 16), 2048, 33_014_016, 16_384, (8, 3), 1),
    "16B": _moe(27, 2048, (16, 16), 102_400, 15_706_484_224, 16_384, (64, 6), 1),
    "236B": _moe(60, 5120, (128, 128), 102_400, 235_741_434_880, 16_384, (160, 6), 1),
    "671B": _moe(61, 7168, (128, 128), 129_280, 671_026_404_352, 16_384, (256, 8), 3),
}

QWEN3 = {
    "debugmodel": _dense(8, 256, (16, 8), 2048, 31_987_968, 4096, tied=True),
    "debugmodel_non_fused_qkv": _dense(8, 256, (16, 8), 2048, 31_987_968, 4096, tied=True),
    "0.6B": _dense(28, 1024, (16, 8), 151_936, 596_049_920, 40_960, tied=True),
    "1.7B": _dense(28, 2048, (16, 8), 151_936, 1_720_574_976, 40_960, tied=True),
    "4B": _dense(36, 2560, (32, 8), 151_936, 4_022_468_096, 40_960, tied=True),
    "8B": _dense(36, 4096, (32, 8), 151_936, 8_190_735_360, 40_960),
    "14B": _dense(40, 5120, (40, 8), 151_936, 14_768_307_200, 40_960),
    "32B": _dense(64, 5120, (64, 8), 151_936, 32_762_123_264, 40_960),
    "debugmodel_moe": _moe(8, 256, (16, 8), 2048, 315_758_848, 4096, (64, 8), 0),
    "30B-A3B": _moe(48, 2048, (32, 4), 151_936, 30_532_122_624, 40_960, (128, 8), 0),
    "235B-A22B": _moe(94, 4096, (64, 4), 151_936, 235_093_634_560, 40_960, (128, 8), 0),
}

FAMILIES = {"llama3": LLAMA3, "deepseek_v3": DEEPSEEK_V3, "qwen3": QWEN3}
