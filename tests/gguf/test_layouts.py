"""A layout of stacked experts and of a tensor cut within heads, through the plan, the file and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from converters.gguf.as_model import GGUFModel, open_model
from converters.gguf.parse import open_gguf
from dsconvert.cli import cli
from dsconvert.models import architectures
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.tensor_table import DROP, HEADS, HEADS_TURNED, Row, Table

EXPERTS, M, D, HEAD_COUNT, NOPE, V, RANK = 3, 64, 256, 4, 32, 64, 96
_L, _MLP = "model.layers.{i}.", ("gate", "up", "down")
_KV, _SIZES = ("384", "96"), ("32", "64")
TOY = replace(
    LLAMA,
    hf_class="ToyForCausalLM",
    model_type="toy",
    gguf="toy",
    words="",
    table=Table(
        (
            *(replace(row, depth="1") if ".mlp." in row.hf else row for row in LLAMA.table.rows),
            *(
                Row(
                    f"{_L}mlp.experts.{{e}}.{name}_proj.weight",
                    f"blk.{{i}}.ffn_{name}_exps.weight",
                    "down" if name == "down" else "gate_up",
                    ("3", "d", "64") if name == "down" else ("3", "64", "d"),
                    first="1",
                )
                for name in _MLP
            ),
            Row(
                _L + "self_attn.kv_b_proj.weight", "blk.{i}.attn_k_b.weight", "qkv",
                ("heads", "96", "32"), HEADS_TURNED, part=(0, _SIZES), first="1", source=_KV,
            ),
            Row(
                _L + "self_attn.kv_b_proj.weight", "blk.{i}.attn_v_b.weight", "qkv",
                ("heads", "64", "96"), HEADS, part=(1, _SIZES), first="1", source=_KV,
            ),
        ),
        DROP,
    ),
)  # fmt: skip


def toy_tensors() -> dict[str, Any]:
    """Layer 0 is Llama's; layer 1 has experts in place of the MLP, and a kv_b."""
    rng = np.random.default_rng(0)
    found = tiny.tiny_tensors(tiny.Tiny(layers=2, d=D, ff=256))
    found = {name: value for name, value in found.items() if not name.startswith("model.layers.1.mlp.")}
    more = {
        f"model.layers.1.mlp.experts.{e}.{name}_proj.weight": (D, M) if name == "down" else (M, D)
        for name in _MLP
        for e in range(EXPERTS)
    } | {"model.layers.1.self_attn.kv_b_proj.weight": (HEAD_COUNT * (NOPE + V), RANK)}
    return found | {n: 0.05 * rng.standard_normal(shape).astype(np.float32) for n, shape in more.items()}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the toy architecture, whose table is found as one of the package's."""
    monkeypatch.setitem(architectures.ARCHITECTURES, TOY.hf_class, TOY)
    monkeypatch.setitem(architectures.BY_GGUF_NAME, TOY.gguf, TOY)
    options = tiny.Tiny(layers=2, d=D, ff=256, dtype="f32")
    folder = tiny.tiny_checkpoint(tmp_path / "toy", options)
    tiny.write_weights(folder, toy_tensors(), options)
    config = {"architectures": [TOY.hf_class], "model_type": "toy"}
    tiny.write_json(folder / "config.json", tiny.tiny_config(options) | config)
    return folder


def converted(source: Path, quant: str) -> GGUFModel:
    path = source / f"{quant}.gguf"
    result = CliRunner().invoke(cli, ["gguf", str(source), "-q", quant, "--verify", "off", "-o", str(path)])
    assert result.exit_code == 0, result.output
    return open_model(open_gguf(path))


def test_the_file_holds_stacks_and_slices_and_gives_the_checkpoint_again(source: Path) -> None:
    model, tensors = converted(source, "f32"), toy_tensors()
    stored = {name: tensor.float32() for name, tensor in model.file.tensors.items()}
    for name in _MLP:
        experts = [tensors[f"model.layers.1.mlp.experts.{e}.{name}_proj.weight"] for e in range(EXPERTS)]
        assert np.array_equal(stored[f"blk.1.ffn_{name}_exps.weight"], np.stack(experts))
    kv_b = tensors["model.layers.1.self_attn.kv_b_proj.weight"].reshape(HEAD_COUNT, NOPE + V, RANK)
    assert np.array_equal(stored["blk.1.attn_k_b.weight"], kv_b[:, :NOPE].transpose(0, 2, 1))
    assert np.array_equal(stored["blk.1.attn_v_b.weight"], kv_b[:, NOPE:])
    assert model.shapes() == {name: value.shape for name, value in tensors.items()}
    for name, value in tensors.items():
        assert np.array_equal(model.float32(name), value), name
        assert np.array_equal(model.rows(name, 5, 43), value[5:43]), name


def test_rows_are_rounded_in_the_types_of_their_parts(source: Path) -> None:
    """q4_k_m takes other types where rows are not a multiple of 256, as those of kv_b are not."""
    model, tensors = converted(source, "q4_k_m"), toy_tensors()
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    kinds = [model.file.tensors[f"blk.1.attn_{part}_b.weight"].qtype.name for part in "kv"]
    assert kinds == ["q5_0", "q5_0"]
    assert model.dtype(name) == "q5_0"
    head = NOPE + V
    assert np.array_equal(model.nearest(name, head, tensors[name][head:]), model.rows(name, head, 4 * head))
    assert model.nearest(name, 1, tensors[name][1:]) is None
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert model.dtype(expert) == "q4_k"
    assert np.array_equal(model.nearest(expert, 3, tensors[expert][3:9]), model.rows(expert, 3, 9))


def test_an_expert_that_is_not_finite_is_named(source: Path) -> None:
    tensors = toy_tensors()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name][-1, -1] = np.nan
    tiny.write_weights(source, tensors, tiny.Tiny(layers=2, d=D, ff=256, dtype="f32"))
    result = CliRunner().invoke(cli, ["gguf", str(source), "-q", "q8_0", "-o", str(source / "x.gguf")])
    assert result.exit_code == 2
    assert f"{name}: holds NaN or infinite values" in result.output
