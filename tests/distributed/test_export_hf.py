"""Promises of Hugging Face exports: transformers computes what we compute, and importing gives every bit back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpointing.export_hf import export_hf
from checkpointing.import_hf import import_hf
from configs.schema import JobConfig
from parallelism.mesh import World
from tests.checkpoint_helpers import same_bits
from tests.distributed.exchange import STEP, first_loss, job, probe_tokens, register_sigmoid, silent, trained_run
from tests.harness import run_ranks
from trainer.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.distributed
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of fewer ids than the model has rows."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokens.json"
    train_tokenizer(["a few words, a few more words"] * 3, 257).save(path)
    return path


def hf_logits(folder: Path, latent_eps: float | None = None) -> torch.Tensor:
    """What transformers' own model says, in fp32. latent_eps: of DeepSeek's inner norms, where it is hard-wired."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for name, module in model.named_modules():
        if latent_eps and name.endswith("kv_a_layernorm"):
            module.variance_epsilon = latent_eps
    with torch.no_grad():
        return model.eval()(probe_tokens()).logits


CASES = {
    "llama3": ("llama3", "debugmodel", {"dp_shard": 2}),
    "qwen3": ("qwen3", "debugmodel", {}),
    "qwen3_moe": ("qwen3", "debugmodel_moe", {"layers": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_we_compute(tmp_path: Path, tokenizer: Path, case: str) -> None:
    family, flavor, options = CASES[case]
    config = job(family, flavor, tokenizer, **options)
    ranks, steps = options.get("dp_shard", 1), 0 if "moe" in case else STEP
    run_dir, output = tmp_path / "run", tmp_path / "hf"
    run_dir.mkdir()
    run_ranks(ranks, trained_run, config, run_dir, steps)
    export_hf(run_dir, STEP, output, "float32", silent)
    expected = load_file(run_dir / "logits.safetensors")["logits"]
    torch.testing.assert_close(hf_logits(output), expected, atol=1e-4, rtol=0)


def sigmoid_run(world: World, config: JobConfig, run_dir: Path, output: Path) -> None:
    """A trained run of a flavour that only this process knows, and its export."""
    register_sigmoid()
    trained_run(world, config, run_dir, 4)
    export_hf(run_dir, STEP, output, "float32", silent)


def test_deepseek_with_sigmoid_routing_groups_and_biases(tmp_path: Path, tokenizer: Path) -> None:
    """The routing of the 671B flavour: sigmoid, groups, normalised, scaled, and biases that training has moved."""
    run_dir, output = tmp_path / "run", tmp_path / "hf"
    run_dir.mkdir()
    run_ranks(1, sigmoid_run, job("deepseek_v3", "sigmoid", tokenizer, layers=3), run_dir, output)
    live = load_file(run_dir / "live.safetensors")
    assert live["model.layers.1.moe.expert_bias_E"].count_nonzero()
    expected = load_file(run_dir / "logits.safetensors")["logits"]
    torch.testing.assert_close(hf_logits(output, latent_eps=1e-5), expected, atol=1e-4, rtol=0)
    # transformers gives the norms of the latents 1e-6 whatever config.json says; torchtitan's flavours have 1e-5.
    torch.testing.assert_close(hf_logits(output), expected, atol=1e-3, rtol=0)


def test_an_export_imports_bit_for_bit_and_the_run_goes_on_from_it(tmp_path: Path, tokenizer: Path) -> None:
    """Export of a run on two ranks, import into a new run, and its first loss on other numbers of ranks."""
    config = job("llama3", "debugmodel", tokenizer, dp_shard=2)
    source, run_dir, output = tmp_path / "run", tmp_path / "again", tmp_path / "hf"
    source.mkdir()
    run_ranks(2, trained_run, config, source)
    export_hf(source, STEP, output, "float32", silent, file_bytes=1_000_000)
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 1
    assert import_hf(output, config, run_dir, silent, shard_bytes=2_000_000) == 0
    assert len(list((run_dir / "checkpoints/step-0").glob("g0-rank*.safetensors"))) > 1
    losses = [run_ranks(2, first_loss, config, folder, step)[0] for folder, step in ((source, STEP), (run_dir, 0))]
    assert losses[0] == losses[1]
    before, after = load_file(source / "live.safetensors"), load_file(run_dir / "live.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert same_bits(after[name], tensor if name.startswith("model.") else torch.zeros_like(tensor)), name
    with pytest.raises(ValueError, match="has snapshots already"):
        import_hf(output, config, run_dir, silent)
    alone = job("llama3", "debugmodel", tokenizer)
    assert run_ranks(1, first_loss, alone, run_dir, 0)[0] == pytest.approx(losses[0], abs=2e-5)


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe"])
def test_what_transformers_saves_can_be_imported(tmp_path: Path, tokenizer: Path, case: str) -> None:
    """A model that transformers loaded from an export, and saved in its own way, comes back with every bit."""
    family, flavor, options = CASES[case]
    config = job(family, flavor, tokenizer, **{**options, "layers": 1})
    run_dir, exported, saved, again = (tmp_path / name for name in ("run", "hf", "saved", "again"))
    run_dir.mkdir()
    run_ranks(1, trained_run, config, run_dir, 0)
    export_hf(run_dir, STEP, exported, "float32", silent)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    model.save_pretrained(saved)
    import_hf(saved, config, again, silent)
    (again / "config.toml").write_text((run_dir / "config.toml").read_text())
    export_hf(again, 0, tmp_path / "hf2", "float32", silent)
    before, after = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "hf2"))
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], tensor) for name, tensor in before.items())


def test_half_precision_and_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    """bf16 weights are ours rounded; AutoTokenizer reads the folder; config.json names the token that ends a text."""
    config = job("qwen3", "debugmodel", tokenizer, layers=1)
    run_dir, output = tmp_path / "run", tmp_path / "hf"
    run_dir.mkdir()
    run_ranks(1, trained_run, config, run_dir)
    export_hf(run_dir, STEP, output, "bfloat16", silent)
    live, stored = load_file(run_dir / "live.safetensors"), load_file(output / "model.safetensors")
    assert same_bits(stored["model.embed_tokens.weight"], live["model.tok_embeddings.weight"].bfloat16())
    assert transformers.AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    ours = load_tokenizer(tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    text = "a few more words"
    assert theirs(text)["input_ids"] == list(next(iter(ours.encode([text]))))[:-1]
    assert theirs.eos_token_id == ours.eod_id == json.loads((output / "config.json").read_text())["eos_token_id"]


def test_biases_that_a_format_cannot_hold_are_an_error(tmp_path: Path, tokenizer: Path) -> None:
    """Qwen3's architecture has no balancing bias: an export says so, and leaves them out only when asked to."""
    config = job("qwen3", "debugmodel_moe", tokenizer, layers=1)
    run_dir, output = tmp_path / "run", tmp_path / "hf"
    run_dir.mkdir()
    run_ranks(1, trained_run, config, run_dir)
    with pytest.raises(ValueError, match="expert_bias_E is not zero, and Qwen3MoeForCausalLM has no place"):
        export_hf(run_dir, STEP, output, "float32", silent)
    assert not output.exists()
    export_hf(run_dir, STEP, output, "float32", silent, drop_expert_bias=True)
    assert json.loads((output / "config.json").read_text())["model_type"] == "qwen3_moe"
