"""The tables against the libraries that use them: names, shapes, the RoPE layout; the plan's errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny

from dsconvert.errors import PlanError
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.config import ModelConfig, normalise
from dsconvert.models.tensor_table import (
    ROPE_K,
    ROPE_Q,
    SOLVE_ORDER,
    Row,
    Table,
    expand,
    plan,
    plan_stored,
    prefixed,
)

TINY = tiny.Tiny()
SIZES: dict[str, dict[str, Any]] = {
    "tiny": tiny.tiny_config(TINY),
    "tied": tiny.tiny_config(tiny.Tiny(tied=True)),
    "bias": tiny.tiny_config(tiny.Tiny(bias=True)),
    "wide heads": {**tiny.tiny_config(TINY), "head_dim": 32},
    # deepseek-llm-7b-base and 67b-base, by their published sizes.
    "7b": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "vocab_size": 102400,
        "max_position_embeddings": 4096,
    },
    "67b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 95,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 102400,
        "max_position_embeddings": 4096,
    },
}


def config_of(name: str) -> ModelConfig:
    return normalise(SIZES[name], name)


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model as transformers makes it, without memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[name]))
    tensors = model.state_dict()
    if SIZES[name].get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    return {key: tuple(value.shape) for key, value in tensors.items()}


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    shapes = shapes_of(name)
    specs = plan(LLAMA.table, config_of(name), shapes)
    assert {spec.hf: spec.shape for spec in specs} == shapes


@pytest.mark.parametrize("name", ["tiny", "bias", "67b"])
def test_gguf_names_are_those_of_the_gguf_library(name: str) -> None:
    import gguf

    config = config_of(name)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    for spec in expand(LLAMA.table, config):
        assert spec.gguf == names.get_name(spec.hf, try_suffixes=(".weight", ".bias"))


def test_layers_come_in_order_with_their_roles() -> None:
    specs = expand(LLAMA.table, config_of("7b"))
    layers = [spec.layer for spec in specs if spec.layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == set(range(30))
    roles = {spec.hf.split(".")[-2]: spec.role for spec in specs if len(spec.shape) == 2}
    assert [roles[name] for name in ("q_proj", "o_proj", "up_proj", "down_proj")] == list(SOLVE_ORDER)


# --- layout transforms -------------------------------------------------------------------------------------


def rotate_adjacent(
    x: np.ndarray[Any, Any], positions: np.ndarray[Any, Any], theta: float
) -> np.ndarray[Any, Any]:
    """RoPE of the RoFormer paper (equation 34), on adjacent pairs as complex numbers; x [tokens, dim]."""
    dim = x.shape[1]
    angles = positions[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


@pytest.mark.parametrize(("transform", "count"), [(ROPE_Q, 4), (ROPE_K, 2)])
def test_rope_on_adjacent_pairs_of_the_stored_rows_is_the_librarys_rope(transform: Any, count: int) -> None:
    """GGUF's llama turns adjacent pairs, transformers turns halves: the same numbers in another order."""
    import torch
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config, dim, tokens = config_of("tiny"), 16, 9
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((count * dim, 64)), rng.standard_normal((tokens, 64))
    rotary = LlamaRotaryEmbedding(LlamaConfig(**SIZES["tiny"]))
    cos, sin = rotary(torch.zeros(1, tokens, 64), torch.arange(tokens)[None])
    heads = torch.from_numpy((x @ weight.T).reshape(tokens, count, dim).swapaxes(0, 1)[None]).float()
    theirs, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    stored = transform.forward(weight.reshape(count, dim, 64)).reshape(weight.shape)
    ours = (x @ stored.T).reshape(tokens, count, dim)
    for head in range(count):
        turned = rotate_adjacent(ours[:, head], np.arange(tokens), config.rope_theta)
        separate = np.concatenate([turned[:, 0::2], turned[:, 1::2]], axis=1)
        np.testing.assert_allclose(separate, theirs[0, head].numpy(), atol=2e-5)


def test_a_table_under_a_prefix() -> None:
    mounted = Table(prefixed(LLAMA.table.rows, "language_model."))
    shapes = {"language_model." + name: shape for name, shape in tiny.tiny_shapes(TINY).items()}
    specs = plan(mounted, config_of("tiny"), shapes)
    assert {spec.hf: spec.shape for spec in specs} == shapes
    assert {spec.gguf for spec in specs} == {
        spec.gguf for spec in plan(LLAMA.table, config_of("tiny"), tiny.tiny_shapes(TINY))
    }
    del shapes["language_model.lm_head.weight"]
    assert len(plan(mounted, config_of("tied"), shapes)) == len(shapes)


# --- the plan's errors -------------------------------------------------------------------------------------


def refused(shapes: dict[str, tuple[int, ...]], name: str = "tiny") -> str:
    with pytest.raises(PlanError) as caught:
        plan(LLAMA.table, config_of(name), shapes)
    text = str(caught.value)
    assert text.isprintable()
    return text


def test_every_missing_tensor_is_noticed() -> None:
    shapes = tiny.tiny_shapes(TINY)
    for name in shapes:
        text = refused({key: value for key, value in shapes.items() if key != name})
        assert f"1 missing: {name!r}" in text


def test_every_wrong_shape_is_noticed() -> None:
    shapes = tiny.tiny_shapes(TINY)
    for name, shape in shapes.items():
        for wrong in ((shape[0] + 1, *shape[1:]), (*shape, 1), shape[:-1]):
            text = refused({**shapes, name: wrong})
            assert text.startswith(f"{name}: has shape {list(wrong)}")
            assert str(list(shape)) in text


def test_a_misspelt_tensor_is_named_with_its_nearest_row() -> None:
    shapes = tiny.tiny_shapes(TINY)
    shapes["model.layers.1.mlp.gate_prj.weight"] = shapes.pop("model.layers.1.mlp.gate_proj.weight")
    text = refused(shapes)
    missing, unknown = "'model.layers.1.mlp.gate_proj.weight'", "'model.layers.1.mlp.gate_prj.weight'"
    assert f"1 missing: {missing} (nearest: {unknown})" in text
    assert f"1 unknown: {unknown} (nearest: {missing})" in text


def test_a_layer_too_many_or_too_few() -> None:
    text = refused(tiny.tiny_shapes(tiny.Tiny(layers=3)))
    assert "9 unknown: 'model.layers.2." in text
    assert "and 6 more" in text
    assert "num_hidden_layers" in text
    assert "9 missing: 'model.layers.1." in refused(tiny.tiny_shapes(tiny.Tiny(layers=1)))


def test_biases_only_with_their_flag() -> None:
    assert "14 unknown" in refused(tiny.tiny_shapes(tiny.Tiny(bias=True)))
    assert "12 missing" in refused(tiny.tiny_shapes(TINY), "bias")


def test_a_head_may_be_absent_only_when_tied() -> None:
    tied, untied = tiny.tiny_shapes(tiny.Tiny(tied=True)), tiny.tiny_shapes(TINY)
    assert "lm_head.weight" in refused(tied)
    assert "output.weight" not in {spec.gguf for spec in plan(LLAMA.table, config_of("tied"), tied)}
    assert "output.weight" in {spec.gguf for spec in plan(LLAMA.table, config_of("tied"), untied)}


def test_known_leftovers_are_dropped_and_look_alikes_are_not() -> None:
    shapes = tiny.tiny_shapes(TINY)
    expected = plan(LLAMA.table, config_of("tiny"), shapes)
    assert (
        plan(LLAMA.table, config_of("tiny"), {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)})
        == expected
    )
    for name in (
        "model.layers.0.self_attn.rotary_emb.xinv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq2",
    ):
        assert "1 unknown" in refused({**shapes, name: (8,)})


def test_hostile_names_stay_readable() -> None:
    shapes = tiny.tiny_shapes(TINY)
    for name in ("a\nb", "\x1b[31m", "\ud800", "n" * 100000, ""):
        text = refused({**shapes, name: (1,)})
        assert "1 unknown" in text
        assert len(text) < 1000


def test_an_empty_checkpoint_and_a_strange_one() -> None:
    assert "21 missing" in refused({})
    text = refused({"transformer.wte.weight": (50257, 768), "transformer.wpe.weight": (1024, 768)})
    assert "21 missing" in text
    assert "2 unknown" in text


# --- rows of some layers, and of many tensors --------------------------------------------------------------


class Toy:
    """A config of nothing but dimensions: three layers, the first dense, four experts in the others."""

    architecture, tied = "Toy", False

    def __init__(self) -> None:
        self.dims = {"layers": 3, "dense": 1, "E": 4, "m": 6, "ff": 10, "d": 8}


TOY = Table(
    (
        Row("layers.{i}.norm", "blk.{i}.norm", "norm", ("d",)),
        Row("layers.{i}.up", "blk.{i}.ffn_up", "gate_up", ("ff", "d"), depth="dense"),
        Row("layers.{i}.experts.{e}.up", "blk.{i}.ffn_up_exps", "gate_up", ("E", "m", "d"), first="dense"),
    )
)


def toy_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"layers.{i}.norm": (8,) for i in range(3)}
    experts = {f"layers.{i}.experts.{e}.up": (6, 8) for i in (1, 2) for e in range(4)}
    return {**shapes, "layers.0.up": (10, 8), **experts}


def test_rows_of_some_layers_and_of_many_tensors() -> None:
    specs = plan(TOY, Toy(), toy_shapes())
    assert {spec.gguf: spec.shape for spec in specs} == {
        "blk.0.norm": (8,),
        "blk.0.ffn_up": (10, 8),
        "blk.1.norm": (8,),
        "blk.1.ffn_up_exps": (4, 6, 8),
        "blk.2.norm": (8,),
        "blk.2.ffn_up_exps": (4, 6, 8),
    }
    assert specs[3].names == tuple(f"layers.1.experts.{e}.up" for e in range(4))
    assert plan_stored(TOY, Toy(), {spec.gguf: spec.shape for spec in specs}) == specs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers.1.experts.2.up": None}, "1 missing: 'layers.1.experts.2.up'"),
        ({"layers.1.experts.4.up": (6, 8)}, "1 unknown: 'layers.1.experts.4.up'"),
        ({"layers.2.up": (10, 8)}, "1 unknown: 'layers.2.up'"),
        ({"layers.0.experts.0.up": (6, 8)}, "1 unknown: 'layers.0.experts.0.up'"),
        (
            {"layers.2.experts.3.up": (8, 6)},
            "layers.2.experts.3.up: has shape [8, 6], config.json asks for [6, 8]",
        ),
    ],
)
def test_each_expert_and_layer_is_checked(changes: dict[str, Any], said: str) -> None:
    shapes = {name: shape for name, shape in (toy_shapes() | changes).items() if shape is not None}
    with pytest.raises(PlanError) as caught:
        plan(TOY, Toy(), shapes)
    assert said in str(caught.value)


def test_a_file_without_the_experts_is_refused_by_its_own_names() -> None:
    shapes = {spec.gguf: spec.shape for spec in plan(TOY, Toy(), toy_shapes())}
    del shapes["blk.2.ffn_up_exps"]
    with pytest.raises(PlanError, match=r"1 missing: 'blk\.2\.ffn_up_exps'"):
        plan_stored(TOY, Toy(), shapes)
