"""Defects planted in files of experts and latent attention: each is found, named, and gives exit code 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_experts
from agreement import file_of
from click.testing import CliRunner
from rewrite import edited

from converters.gguf import kernels
from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.cli import cli

LAYER = "model.layers.2."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tiny_experts.checkpoint(tmp_path_factory.mktemp("planted") / "model", "v3")


@pytest.fixture(scope="module")
def files(model: Path) -> dict[str, GGUFFile]:
    return {
        quant: open_gguf(file_of(model, model.with_name(f"{quant}.gguf"), quant))
        for quant in ("q8_0", "q4_k_m")
    }


def judged(file: Path, model: Path) -> str:
    """What verify says of a file that it should fail."""
    done = CliRunner().invoke(
        cli, ["verify", str(file), "--against", str(model), "--windows", "1", "--length", "128"]
    )
    assert done.exit_code == 3, done.output
    return done.output


def stack(file: GGUFFile, name: str) -> Any:
    """The blocks of a stack of experts, [experts, rows, bytes]."""
    tensor = file.tensors[name]
    return np.array(tensor.blocks()).reshape(tensor.shape[0], tensor.shape[1], -1)


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_two_experts_swapped(quant: str, files: dict[str, GGUFFile], model: Path, tmp_path: Path) -> None:
    name = "blk.2.ffn_up_exps.weight"
    blocks = stack(files[quant], name)
    blocks[[3, 5]] = blocks[[5, 3]]
    told = judged(edited(files[quant], tmp_path / "x.gguf", {}, stored={name: blocks}), model)
    for expert in (3, 5):
        assert f"FAIL  weights          {LAYER}mlp.experts.{expert}.up_proj.weight" in told
    assert "experts.4.up_proj.weight: " not in told


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_an_experts_down_zeroed(quant: str, files: dict[str, GGUFFile], model: Path, tmp_path: Path) -> None:
    name = "blk.3.ffn_down_exps.weight"
    blocks = stack(files[quant], name)
    blocks[7] = 0
    told = judged(edited(files[quant], tmp_path / "x.gguf", {}, stored={name: blocks}), model)
    assert "FAIL  weights          model.layers.3.mlp.experts.7.down_proj.weight" in told


def test_the_correction_bias_zeroed(files: dict[str, GGUFFile], model: Path, tmp_path: Path) -> None:
    name = "blk.2.exp_probs_b.bias"
    zero = np.zeros_like(files["q8_0"].tensors[name].blocks())
    told = judged(edited(files["q8_0"], tmp_path / "x.gguf", {}, stored={name: zero}), model)
    assert f"FAIL  weights          {LAYER}mlp.gate.e_score_correction_bias" in told


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("expert_gating_func", ("uint32", 1), "experts: gating is softmax, the reference has sigmoid"),
        ("expert_gating_func", None, "experts: gating is softmax, the reference has sigmoid"),
        ("expert_weights_norm", None, "experts: normalised is False, the reference has True"),
        ("expert_weights_scale", ("float32", 1.0), "experts: scale is 1.0, the reference has 2.5"),
        ("expert_group_used_count", ("uint32", 3), "experts: groups_used is 3, the reference has 2"),
        ("expert_used_count", ("uint32", 3), "experts: used is 3, the reference has 4"),
        ("rope.scaling.yarn_log_multiplier", ("float32", 0.0707), "softmax is "),
        ("rope.scaling.yarn_log_multiplier", None, "softmax is "),
    ],
)
def test_a_key_that_says_another_model(
    key: str, value: Any, said: str, files: dict[str, GGUFFile], model: Path, tmp_path: Path
) -> None:
    told = judged(edited(files["q8_0"], tmp_path / "x.gguf", {f"deepseek2.{key}": value}), model)
    assert f"FAIL  config           {said}" in told


def test_kv_b_not_transposed(files: dict[str, GGUFFile], model: Path, tmp_path: Path) -> None:
    name = "blk.1.attn_k_b.weight"
    tensor = files["q8_0"].tensors[name]
    heads, columns, rows = tensor.shape
    plain = np.ascontiguousarray(tensor.float32().swapaxes(1, 2)).reshape(heads * columns, rows)
    blocks = np.empty_like(tensor.blocks())
    kernels.quantize(tensor.qtype, plain, blocks, None)
    told = judged(edited(files["q8_0"], tmp_path / "x.gguf", {}, stored={name: blocks}), model)
    assert "FAIL  weights          model.layers.1.self_attn.kv_b_proj.weight" in told


def test_the_grid_of_scales_shifted_by_one(model: Path, tmp_path: Path) -> None:
    """A file made of scales that stand one block too far, against the right ones."""
    import shutil

    right, _ = tiny_experts.to_fp8(shutil.copytree(model, tmp_path / "model"))
    wrong = shutil.copytree(right, tmp_path / "wrong")
    tensors = tiny_experts.weights(wrong)
    name = f"{LAYER}mlp.experts.1.gate_proj.weight"
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].roll(1, 1)
    tiny_experts.save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    told = judged(file_of(wrong, tmp_path / "x.gguf", "q8_0"), right)
    assert f"FAIL  weights          {name}" in told


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_experts.checkpoint(tmp_path_factory.mktemp("sparse") / "model", "v32", num_hidden_layers=3)


def test_an_indexer_of_other_weights_or_numbers(sparse: Path, tmp_path: Path) -> None:
    file = open_gguf(file_of(sparse, tmp_path / "x.gguf", "q8_0"))
    short = ("--windows", "1", "--length", "64")  # all keys are chosen
    done = CliRunner().invoke(cli, ["verify", str(file.path), "--against", str(sparse), *short])
    assert done.exit_code == 0, done.output
    assert "the indexer, which keeps 64 keys, leaves none out of them; --length 128" in done.output
    proj = np.zeros(file.tensors["blk.1.indexer.proj.weight"].blocks().shape, np.uint8)
    told = judged(edited(file, tmp_path / "y.gguf", {}, stored={"blk.1.indexer.proj.weight": proj}), sparse)
    assert "FAIL  weights          model.layers.1.self_attn.indexer.weights_proj.weight" in told
    assert "FAIL  foretold KLD" in told
    fewer = {"deepseek32.attention.indexer.top_k": ("uint32", 32)}
    told = judged(edited(file, tmp_path / "z.gguf", fewer), sparse)
    assert "FAIL  config           indexer: top is 32, the reference has 64" in told
