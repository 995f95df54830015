"""Packing against big integers, against other tools' files, and the shape rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.gptq.pack import (
    PARTS,
    Packed,
    dequantize,
    pack,
    stored_shapes,
    unpack,
)
from converters.gptq.shapes import Layout, broken_rules, check_shapes, refusing_runtimes
from dsconvert.errors import QuantizationError, UsageError
from dsconvert.quantization.bit_packing import pack_rows, unpack_rows
from dsconvert.quantization.gptq_grid import Scheme

PEERS = Path(__file__).parents[3] / "shared" / "data" / "peers"
PEER_FILES = ("gptq_gptqmodel_4b_g128", "gptq_autoround_4b_g128")
BITS = (2, 3, 4, 8)


def random_linear(
    bits: int, less: int, inputs: int = 96, outputs: int = 64, groups: int = 3
) -> dict[str, Any]:
    """Arguments of `pack` that use every code and every zero point; groups in random order."""
    rng = np.random.default_rng(bits)
    inputs, outputs, groups, top = 96, 64, 3, 1 << bits
    return {
        "codes": rng.integers(0, top, (inputs, outputs)).astype(np.uint8),
        "scales": rng.uniform(1e-3, 1, (groups, outputs)).astype(np.float16),
        "zeros": rng.integers(less, top, (groups, outputs)).astype(np.uint8),
        "g_idx": rng.permutation(np.arange(inputs) % groups).astype(np.int32),
    }


@pytest.mark.parametrize("bits", BITS)
def test_rows_fill_one_long_integer_from_its_lowest_bit(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (96, 5)).astype(np.uint8)
    words = pack_rows(values, bits)
    assert words.dtype == np.int32
    assert words.shape == (96 * bits // 32, 5)
    for column in range(5):
        whole = sum(int(value) << (bits * k) for k, value in enumerate(values[:, column]))
        assert words[:, column].tobytes() == whole.to_bytes(96 * bits // 8, "little")
    np.testing.assert_array_equal(unpack_rows(words, bits), values)


def test_the_published_words_of_symmetric_zero_points() -> None:
    codes, scales = np.zeros((32, 32), np.uint8), np.ones((1, 32), np.float16)
    words = {
        (4, "gptq"): 0x77777777,
        (4, "gptq_v2"): 0x88888888,
        (8, "gptq"): 0x7F7F7F7F,
        (2, "gptq"): 0x55555555,
    }
    for (bits, form), word in words.items():
        zeros = np.full((1, 32), 1 << (bits - 1), np.uint8)
        packed = pack(codes, scales, zeros, np.zeros(32, np.int32), bits, form)
        assert (packed.qzeros.view(np.uint32) == word).all()
    packed = pack(codes, scales, np.full((1, 32), 4, np.uint8), np.zeros(32, np.int32), 3)
    whole = int.from_bytes(packed.qzeros.tobytes(), "little")
    assert [whole >> (3 * k) & 7 for k in range(32)] == [3] * 32


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("form", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_packing_and_unpacking_are_inverse(bits: int, form: str, less: int) -> None:
    linear = random_linear(bits, less)
    packed = pack(**linear, bits=bits, checkpoint_format=form)
    codes, zeros = unpack(packed, bits, form)
    np.testing.assert_array_equal(codes, linear["codes"])
    np.testing.assert_array_equal(zeros, linear["zeros"])
    again = pack(codes, packed.scales, zeros, packed.g_idx, bits, form)
    for part in PARTS:
        assert getattr(again, part).tobytes() == getattr(packed, part).tobytes()
    shapes = stored_shapes("x", 64, 96, 3, bits)
    kinds = {"int32": "I32", "float16": "F16"}
    assert {n: (kinds[t.dtype.name], t.shape) for n, t in packed.tensors("x").items()} == shapes


@pytest.mark.parametrize("bits", BITS)
def test_dequantizes_by_the_formula(bits: int) -> None:
    linear = random_linear(bits, 1)
    weights = dequantize(pack(**linear, bits=bits), bits)
    assert weights.shape == (64, 96)
    for n, k in ((0, 0), (63, 95), (17, 40), (40, 31), (5, 64)):
        g = linear["g_idx"][k]
        q, z, s = int(linear["codes"][k, n]), int(linear["zeros"][g, n]), np.float32(linear["scales"][g, n])
        assert weights[n, k] == s * np.float32(q - z)


def test_what_would_spill_into_a_neighbour_is_refused() -> None:
    for part, value, form in (
        ("codes", 16, "gptq"),
        ("zeros", 0, "gptq"),
        ("zeros", 16, "gptq_v2"),
        ("g_idx", 3, "gptq"),
        ("g_idx", -1, "gptq"),
        ("scales", np.inf, "gptq"),
    ):
        linear = random_linear(4, 1)
        linear[part].reshape(-1)[7] = value
        with pytest.raises(QuantizationError):
            pack(**linear, bits=4, checkpoint_format=form)
    linear = random_linear(4, 0)
    linear["zeros"][0, 0] = 0
    pack(**linear, bits=4, checkpoint_format="gptq_v2")


@pytest.mark.parametrize("name", PEER_FILES)
def test_other_tools_files_come_back_bit_for_bit(name: str) -> None:
    if not (PEERS / name).is_dir():
        pytest.skip(f"needs the peers' files, {name}")
    from safetensors.numpy import safe_open

    with safe_open(PEERS / name / "model.safetensors", "np") as file:
        linears = [key.removesuffix(".qweight") for key in file.keys() if key.endswith(".qweight")]  # noqa: SIM118
        assert len(linears) == 28
        for linear in linears:
            stored = Packed(*(file.get_tensor(f"{linear}.{part}") for part in PARTS))
            codes, zeros = unpack(stored, 4)
            assert (zeros == 8).all()
            again = pack(codes, stored.scales, zeros, stored.g_idx, 4)
            for part in PARTS:
                assert getattr(again, part).tobytes() == getattr(stored, part).tobytes()


# The linears of DeepSeek LLM 7B and 67B and of DeepSeek-VL 1.3B: [outputs, inputs].
DEEPSEEK = (
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (8192, 8192),
    (1024, 8192),
    (22016, 8192),
    (8192, 22016),
)
DEEPSEEK += ((2048, 2048), (5632, 2048), (2048, 5632))


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_every_runtime_takes_the_default_settings_of_every_deepseek(group: int) -> None:
    linears = {f"model.layers.{i}.x.weight": shape for i, shape in enumerate(DEEPSEEK)}
    layout = Layout(Scheme(4, group))
    assert not list(broken_rules(linears, layout))
    check_shapes(linears, layout, runtimes=("format", "gptqmodel", "exllamav2", "vllm"))


@pytest.mark.parametrize(
    ("shape", "layout", "runtime", "rule"),
    [
        ((64, 48), Layout(Scheme()), "format", "inputs are a multiple of 32"),
        ((48, 64), Layout(Scheme()), "format", "outputs are a multiple of 32"),
        ((64, 128), Layout(Scheme(sym=False)), "gptqmodel", "asymmetric"),
        ((64, 128), Layout(Scheme(3)), "exllamav2", "4 bits only"),
        ((64, 65536), Layout(Scheme()), "exllamav2", "65535"),
        ((64, 128), Layout(Scheme(), checkpoint_format="gptq_v2"), "exllamav2", "the gptq format only"),
        ((64, 128), Layout(Scheme(3)), "vllm", "4 or 8 bits"),
        ((64, 128), Layout(Scheme(sym=False)), "vllm", "symmetric only"),
        ((64, 128), Layout(Scheme(), desc_act=True), "vllm", "no desc_act"),
        ((64, 128), Layout(Scheme(), checkpoint_format="gptq_v2"), "vllm", "the gptq format only"),
        ((96, 128), Layout(Scheme(4, 32)), "vllm", "outputs a multiple of 64 and inputs of 128"),
        ((64, 64), Layout(Scheme(4, 32)), "vllm", "outputs a multiple of 64 and inputs of 128"),
        ((128, 192), Layout(Scheme(4, 128)), "vllm", "multiple of the group size"),
    ],
)
def test_each_rule_is_refused_by_name(
    shape: tuple[int, int], layout: Layout, runtime: str, rule: str
) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    linears = {"model.layers.0.x.weight": (128, 128), name: shape}
    with pytest.raises(QuantizationError) as caught:
        check_shapes(linears, layout, runtimes=(runtime,))
    assert rule in str(caught.value)
    assert runtime in str(caught.value)
    assert runtime in refusing_runtimes(linears, layout)
    assert any(b.tensor == name and rule in b.text for b in broken_rules(linears, layout))
    if runtime != "format":  # a rule of one runtime does not stop a file that others read
        check_shapes(linears, layout)


def test_shapes_that_vllm_takes_either_way() -> None:
    for shape in ((64, 128), (128, 64)):
        assert "vllm" not in refusing_runtimes({"a.weight": shape}, Layout(Scheme(4, 32)))


def test_fused_linears_are_quantized_together() -> None:
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    names += [f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    linears = dict.fromkeys(names, (64, 64))
    check_shapes(linears, Layout(Scheme()))
    for left in names:
        some = {name: shape for name, shape in linears.items() if name != left}
        if "o_proj" in left or "down_proj" in left:
            check_shapes(some, Layout(Scheme()), others=[left])
        else:
            with pytest.raises(QuantizationError, match=left.split(".")[-2]):
                check_shapes(some, Layout(Scheme()), others=[left])


def test_settings_that_no_reader_knows_are_refused() -> None:
    linears = {"a.weight": (64, 64)}
    for layout in (Layout(Scheme(5)), Layout(Scheme(4, 48)), Layout(Scheme(), checkpoint_format="marlin")):
        with pytest.raises(UsageError):
            check_shapes(linears, layout)
    with pytest.raises(UsageError, match="tgi"):
        check_shapes(linears, Layout(Scheme()), runtimes=("tgi",))
    for name, shape in (("a.weight", (64,)), ("a.bias", (64, 64))):
        with pytest.raises(QuantizationError):
            check_shapes({name: shape}, Layout(Scheme()))
