"""Experts and latent attention by tiny models of transformers' own classes, fp8 too."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_experts
from agreement import LIMIT, divergence, engine_logits, file_of, logits, token_ids
from click.testing import CliRunner

from converters.gguf.parse import open_gguf
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError
from dsconvert.models.config import normalise

runtime = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experts")
    return {name: tiny_experts.checkpoint(folder / name, name) for name in tiny_experts.FAMILIES}


@runtime
@pytest.mark.parametrize("name", tiny_experts.FAMILIES)
def test_llama_cpp_computes_what_transformers_does(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    file = file_of(models[name], tmp_path / "x.gguf")
    assert divergence(logits_of(name, models[name]), engine_logits(file)) < LIMIT


def logits_of(name: str, folder: Path) -> Any:
    """transformers' own; of the model without a class those of the one that was saved."""
    if name != "deepseek":
        return logits(folder)
    import torch

    with torch.no_grad():
        found = tiny_experts.random_model(name)(torch.from_numpy(token_ids())[None]).logits[0]
    return np.asarray(found.numpy(), np.float64)


@runtime
def test_all_keys_and_chosen_ones_are_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    """The runtime's, too: where an indexer keeps all of 300 keys, and where it keeps 64."""
    dense = shutil.copytree(models["v32"], tmp_path / "model")
    tiny_experts.restate(dense, index_topk=2048)
    every = logits(dense)
    assert divergence(every, engine_logits(file_of(dense, tmp_path / "x.gguf"))) < LIMIT
    assert divergence(logits(models["v32"]), every) > 0.1


@runtime
@pytest.mark.parametrize(
    ("name", "scales"), [("v3", "f32"), ("v3", "ue8m0"), ("v3", "f8_e8m0"), ("v32", "f32")]
)
def test_fp8_is_read_as_torch_reads_it(name: str, scales: str, tmp_path: Path) -> None:
    """Rows of 320 and 288 give ragged blocks."""
    more = {"qk_rope_head_dim": 64, "intermediate_size": 544, "num_hidden_layers": 3}
    model = tiny_experts.checkpoint(tmp_path / "model", name, **more)
    stored, plain = tiny_experts.to_fp8(model, scales)
    file = file_of(stored, tmp_path / "x.gguf")
    tensors = {name: tensor.numpy() for name, tensor in tiny_experts.weights(plain).items()}
    same(file, tiny_experts.stored(tensors))
    if scales == "f32":
        assert divergence(logits(plain), engine_logits(file)) < LIMIT


def same(file: Path, expected: dict[str, Any]) -> None:
    """The file holds these tensors, bit for bit."""
    tensors = open_gguf(file).tensors
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        assert tensors[name].shape == array.shape, name
        assert tensors[name].float32().tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("name", tiny_experts.FAMILIES)
def test_every_tensor_is_as_llama_cpp_has_it(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    tensors = {key: value.numpy() for key, value in tiny_experts.weights(models[name]).items()}
    pairs = 64 if name in ("mixtral", "deepseek") else 0
    same(file_of(models[name], tmp_path / "x.gguf"), tiny_experts.stored(tensors, pairs=pairs))


# The keys that llama.cpp's converter writes of these models, without the prefix.
KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "expert_count",
    "expert_used_count", "expert_group_count", "expert_group_used_count", "expert_gating_func",
    "attention.key_length", "attention.value_length", "leading_dense_block_count", "vocab_size",
    "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    "expert_feed_forward_length", "expert_shared_count", "expert_weights_scale", "rope.dimension_count",
}  # fmt: skip
SCALING = {
    "type",
    "factor",
    "original_context_length",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_log_multiplier",
}
MORE = {
    "v2": {"attention.q_lora_rank", *(f"rope.scaling.{key}" for key in SCALING)},
    "v2-lite": set(),
    "v3": {"attention.q_lora_rank", "expert_weights_norm", *(f"rope.scaling.{key}" for key in SCALING)},
}
MORE["v32"] = MORE["v3"] | {f"attention.indexer.{key}" for key in ("head_count", "key_length", "top_k")}


@pytest.mark.parametrize("name", tiny_experts.MLA)
def test_keys_are_those_of_llama_cpp(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    found = open_gguf(file_of(models[name], tmp_path / "x.gguf")).keys
    prefix = "deepseek32." if name == "v32" else "deepseek2."
    keys = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    assert set(keys) == KEYS | MORE[name]
    assert keys["expert_gating_func"] == (2 if name in ("v3", "v32") else 1)
    assert keys["attention.head_count_kv"] == 1
    sizes = ("attention.key_length", "attention.value_length", "attention.key_length_mla")
    assert [keys[key] for key in sizes] == [256 + 32, 256, 64 + 32]
    assert found["general.size_label"].startswith("4x" if name == "v2-lite" else "16x")
    if name == "v3":
        assert keys["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


HEADS = {"attention.key_length", "attention.value_length"}
USUAL = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "expert_count",
    "expert_used_count",
}  # fmt: skip
OTHERS = {
    "qwen3moe": ("qwen3moe", {"expert_feed_forward_length", *HEADS}),
    "mixtral": ("llama", {"rope.dimension_count", "vocab_size"}),
    "deepseek": (
        "deepseek",
        {
            "rope.dimension_count", "vocab_size", "expert_gating_func", "leading_dense_block_count",
            "expert_feed_forward_length", "expert_weights_scale", "expert_shared_count",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_keys_of_plain_attention_are_those_of_llama_cpp(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    kind, own = OTHERS[name]
    found = open_gguf(file_of(models[name], tmp_path / "x.gguf")).keys
    assert found["general.architecture"] == kind
    keys = {key.removeprefix(f"{kind}.") for key in found if key.startswith(f"{kind}.")}
    assert keys == USUAL | own


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [*map(str, words)])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        *(("v2-lite", quant) for quant in ("q8_0", "q2_k")),
        *((name, "q4_k_m") for name in tiny_experts.FAMILIES),
    ],
)
def test_files_are_proven(name: str, quant: str, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    code, told = command("gguf", models[name], "-q", quant, "-o", out, "--verify", "off", "--quiet")
    assert code == 0, told
    code, told = command("verify", out, "--against", models[name], "--windows", "1")
    assert code == 0, told
    assert "went to other experts" in told
    assert ("median KLD" in told) == (name != "v32")
    assert ("keeps 64 keys of them" in told) == (name == "v32")


def test_further_layers_are_left_out_and_said(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["v3"], tmp_path / "model")
    tiny_experts.with_mtp(folder, layer=4, like=3)
    out = tmp_path / "x.gguf"
    code, told = command("gguf", folder, "-q", "f32", "-o", out, "--verify", "off")
    assert code == 0, told
    assert "left out: layer 4" in " ".join(told.split())
    file = open_gguf(out)
    assert file.keys["deepseek2.block_count"] == 4
    assert not any(name.startswith("blk.4.") for name in file.tensors)
    tiny_experts.restate(folder, num_hidden_layers=3)  # a layer of the decoder is not taken for such a one
    code, told = command("gguf", folder, "-q", "f32", "-o", tmp_path / "y.gguf")
    assert code == 2
    assert "unknown" in told


def config(name: str, **changes: Any) -> Any:
    kind, keys = tiny_experts.FAMILIES[name]
    raw = {
        "architectures": [kind],
        "model_type": tiny_experts.MODEL_TYPES[name],
        **tiny_experts.LATENT,
        **keys,
    }
    return normalise({**raw, **changes}, "config.json")


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("v3", {"attention_bias": True}, "attention_bias is true"),
        ("v3", {"scoring_func": "softmax"}, "this class scores by sigmoid"),
        ("v3", {"topk_method": "greedy"}, "topk_method"),
        ("v3", {"moe_layer_freq": 2}, "moe_layer_freq is not 1"),
        ("v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("v3", {"n_group": 3}, "n_group is 3"),
        ("v3", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("v2", {"scoring_func": "sigmoid"}, "this class scores by softmax"),
        ("v2", {"norm_topk_prob": True}, "transformers ignores and llama.cpp obeys"),
        ("v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("v2", {"mlp_bias": True}, "mlp_bias is true"),
        ("v3", {"ep_size": 8}, "ep_size is not 1"),
        ("qwen3moe", {"mlp_only_layers": [1]}, "mlp_only_layers names layers"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is not 1"),
        ("v32", {"scoring_func": "softmax"}, "this class scores by sigmoid"),
        ("v32", {"q_lora_rank": None}, "q_lora_rank is null"),
        ("v32", {"index_head_dim": 16}, "index_head_dim is 16, less than the 32 values"),
        ("v32", {"index_topk": 0}, "index_topk is '0'"),
        ("v32", {"layer_types": ["full_attention"] * 4}, "other layers than indexed_attention"),
        ("v32", {"indexer_types": ["full", "shared"] * 2}, "indexer_types gives layers an indexer or none"),
        ("v32", {"mlp_layer_types": ["sparse"] * 4}, "mlp_layer_types is not 2 times dense"),
        ("deepseek", {"scoring_func": "sigmoid"}, "this class scores by softmax"),
        ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq is not 1"),
    ],
)
def test_what_the_layout_has_not_is_refused(name: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        config(name, **changes)


YARN = tiny_experts.YARN


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("v2-lite", {"num_hidden_layers": 30}, "30 layers without q_lora_rank"),
        ("v3", {"rope_interleave": False}, "rope_interleave false"),
        ("v32", {"rope_interleave": False}, "rope_interleave false"),
        ("v32", {"index_head_dim": 96}, "index_head_dim 96"),
        ("v32", {"index_head_dim": 32}, "index_head_dim 32"),
        ("v3", {"rope_scaling": YARN}, "mscale_all_dim"),
        ("v3", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale, mscale_all_dim"),
        ("v3", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "latent attention by yarn alone"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
        ("deepseek", {"norm_topk_prob": True}, "norm_topk_prob true"),
    ],
)
def test_what_llama_cpp_would_run_as_another_model_is_refused(
    name: str, changes: dict[str, Any], told: str
) -> None:
    from converters.gguf.metadata import model_keys
    from dsconvert.models.architectures import find_architecture

    found = config(name, **changes)
    with pytest.raises(CheckpointError, match=told):
        model_keys(found, find_architecture(found.architecture))


def test_where_llama_cpp_differs_is_said() -> None:
    from converters.gguf.rope import notes

    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    assert "sum of their two best scores" in " ".join(notes(config("v2", **groups)))
    for name in ("v3", "v32"):
        assert "rms_norm_eps 1e-05" in " ".join(notes(config(name, rms_norm_eps=1e-5)))
    assert notes(config("v2")) == notes(config("v3")) == notes(config("v32")) == ()


def test_groups_count_only_where_the_method_goes_by_them() -> None:
    assert config("v2", n_group=4, topk_group=2).experts.groups == 1
    grouped = config("v2", n_group=4, topk_group=2, topk_method="group_limited_greedy").experts
    assert (grouped.groups, grouped.groups_used) == (4, 2)
    assert config("v3").experts.gating == "sigmoid"  # config.json need not say it


def test_what_is_made_of_dense_models_only_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    few = ("--calib", "builtin", "--calib-samples", "4", "--calib-len", "64")
    code, told = command("exl2", "--bpw", "4", models["v3"], "--out", tmp_path / "out", *few)
    assert code == 2, told
    assert "experts, for which error feedback is not made here" in " ".join(told.split())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("DeepseekV4ForCausalLM", "hyper-connections"),
        ("DeepseekV41ForCausalLM", "engrams"),
        ("DeepseekVLV2ForCausalLM", "no runtime"),
    ],
)
def test_a_class_that_is_known_and_not_converted_says_why(
    name: str, told: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Before its weights are looked at, which may be stored as none here are."""
    folder = shutil.copytree(models["qwen3moe"], tmp_path / "model")
    tiny_experts.restate(folder, architectures=[name], model_type="other")
    tensors = tiny_experts.weights(folder)
    tiny_experts.save_file({f"{n}_scale_inv": t for n, t in tensors.items()}, folder / "model.safetensors")
    for words in (
        ("gguf", folder, "-q", "q8_0", "--dry-run"),
        ("imatrix", folder, "-o", tmp_path / "i.gguf"),
    ):
        code, output = command(*words)
        assert code == 2, output
        assert f"{name} is not converted" in " ".join(output.split())
        assert told in " ".join(output.split())
