"""Rows of stored tensors from a checkpoint's tensors, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.config import normalise
from dsconvert.models.stored_rows import by_source, chunks, source_rows, stored_rows
from dsconvert.models.tensor_table import HEADS, HEADS_TURNED, IDENTITY, Row, Spec, Table, expand

LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {"num_key_value_heads": 2},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
}


class Sizes:
    """A config of nothing but dimensions."""

    architecture, tied = "Toy", False

    def __init__(self, **dims: int) -> None:
        self.dims = dims


def llama(name: str) -> list[Spec]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    specs = expand(LLAMA.table, normalise(config | LLAMAS[name], "memory"))
    return [spec for spec in specs if not spec.row.when or name == "biases"]


def values(specs: list[Spec], dtype: type) -> dict[str, Any]:
    """A tensor of different numbers for every name of the checkpoint."""
    shapes = {name: spec.source for spec in specs for name in spec.names}
    return {n: np.arange(np.prod(s), dtype=np.int64).astype(dtype).reshape(s) for n, s in shapes.items()}


def reader(tensors: dict[str, Any]) -> Any:
    return lambda name, start, stop: tensors[name][start:stop]


def ranges(rows: int) -> list[tuple[int, int]]:
    """All of the rows, one in the middle, all but the ends."""
    return [span for span in ((0, rows), (rows // 3, rows // 3 + 1), (1, rows - 1)) if span[0] < span[1]]


def check_both_ways(specs: list[Spec], tensors: dict[str, Any], at_once: int = 100) -> dict[str, Any]:
    """The stored tensors of `tensors`, by chunks; the way back gives every range of every source again."""
    stored = {}
    for spec in specs:
        spans = list(chunks(spec, at_once))
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
        assert spans[-1][1] == spec.rows
        whole = np.concatenate([stored_rows(spec, reader(tensors), *span) for span in spans])
        assert whole.dtype == tensors[spec.names[0]].dtype
        assert whole.size == spec.values
        for start, stop in ranges(spec.rows):
            assert np.array_equal(stored_rows(spec, reader(tensors), start, stop), whole[start:stop])
        stored[spec.gguf] = whole
    for name, parts in by_source(specs).items():
        for start, stop in ranges(len(tensors[name])):
            back = source_rows(parts, name, reader(stored), start, stop)
            assert np.array_equal(back, tensors[name][start:stop]), (name, start, stop)
    return stored


@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
@pytest.mark.parametrize("name", LLAMAS)
def test_the_rows_of_a_llama_go_there_and_back(name: str, at_once: int) -> None:
    specs = llama(name)
    tensors = values(specs, np.float32)
    stored = check_both_ways(specs, tensors, at_once)
    moved = [spec for spec in specs if (stored[spec.gguf].ravel() != tensors[spec.hf].ravel()).any()]
    assert {spec.gguf.split(".")[2] for spec in moved} == {"attn_q", "attn_k"}  # all else stays in its order


def test_bits_stay_bits() -> None:
    specs = llama("tiny")
    tensors = values(specs, np.uint16)
    for spec in specs:
        stored = stored_rows(spec, reader(tensors), 0, spec.rows)
        assert stored.dtype == np.uint16
        assert np.array_equal(np.sort(stored, axis=None), np.sort(tensors[spec.hf], axis=None))


def test_whole_rows_are_views() -> None:
    spec = next(spec for spec in llama("tiny") if spec.row.transform is IDENTITY)
    tensors = values([spec], np.float32)
    assert np.shares_memory(stored_rows(spec, reader(tensors), 3, 9), tensors[spec.hf])


def test_parts_cut_a_fused_tensor() -> None:
    table = tuple(
        Row(f"qkv.{kind}", f"{letter}.{kind}", "vision", shape, part=(k, ("d", "d", "d")))
        for k, letter in enumerate("qkv")
        for kind, shape in (("weight", ("d", "d")), ("bias", ("d",)))
    )
    specs = expand(Table(table), Sizes(d=64))
    tensors = values(specs, np.float32)
    assert tensors["qkv.weight"].shape == (192, 64)
    stored = check_both_ways(specs, tensors)
    for k, letter in enumerate("qkv"):
        assert np.array_equal(stored[f"{letter}.weight"], tensors["qkv.weight"][64 * k : 64 * (k + 1)])


def test_axes_behind_the_first_are_rows_too() -> None:
    """A convolution's [c, 3, p, p], and a table with a leading axis of one."""
    table = (
        Row("conv", "conv", "vision", ("c", "3", "p", "p")),
        Row("table", "table", "vision", ("n", "c"), source=("1", "n", "c")),
    )
    specs = expand(Table(table), Sizes(c=8, p=5, n=12))
    assert [spec.rows for spec in specs] == [8 * 3 * 5, 12]
    check_both_ways(specs, values(specs, np.float32))


def test_experts_are_stacked_in_order() -> None:
    """Ranges end where an expert ends, so that one expert is read at a time."""
    table = (Row("experts.{e}.up", "up_exps", "gate_up", ("E", "m", "d")),)
    specs = expand(Table(table), Sizes(E=11, m=6, d=8))
    tensors = values(specs, np.float32)
    for e in range(11):
        tensors[f"experts.{e}.up"] += 1000 * e
    stored = check_both_ways(specs, tensors, at_once=4 * 8)
    expected = np.stack([tensors[f"experts.{e}.up"] for e in range(11)])
    assert np.array_equal(stored["up_exps"].reshape(11, 6, 8), expected)
    assert list(chunks(specs[0], 4 * 8))[:3] == [(0, 4), (4, 6), (6, 10)]


@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_slices_and_transposes_within_heads(at_once: int) -> None:
    """MLA's kv_b: of each head the first rows turned, the last as they are (llama.cpp's absorbed form)."""
    heads, nope, v, rank = 5, 6, 4, 7
    source, sizes = ("kvb", "rank"), ("nope", "value")
    table = (
        Row("kv_b", "k_b", "qkv", ("heads", "rank", "nope"), HEADS_TURNED, part=(0, sizes), source=source),
        Row("kv_b", "v_b", "qkv", ("heads", "value", "rank"), HEADS, part=(1, sizes), source=source),
    )
    dims = {"heads": heads, "nope": nope, "value": v, "rank": rank, "kvb": heads * (nope + v)}
    specs = expand(Table(table), Sizes(**dims))
    tensors = values(specs, np.float32)
    stored = check_both_ways(specs, tensors, at_once)
    by_head = tensors["kv_b"].reshape(heads, nope + v, rank)
    assert np.array_equal(stored["k_b"].reshape(heads, rank, nope), by_head[:, :nope].transpose(0, 2, 1))
    assert np.array_equal(stored["v_b"].reshape(heads, v, rank), by_head[:, nope:])
