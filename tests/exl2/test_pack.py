"""EXL2 packing against big integers and scalars, and exllamav2's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.exl2.pack import (
    PARTS,
    Packed,
    dequantize,
    effective_scales,
    pack,
    stored_groups,
    stored_shapes,
    unpack,
)
from converters.exl2.settings import Group
from dsconvert.errors import QuantizationError

PEERS = Path(__file__).parents[3] / "shared" / "data" / "peers"
BITS = (2, 3, 4, 5, 6, 8)
MIXES = {
    **{f"{bits} bits": ((bits, 64), (bits, 32)) for bits in BITS},
    "all": tuple((bits, 32) for bits in reversed(BITS)),
    "hot rows": ((8, 32), (5, 128), (4, 128), (4, 128), (4, 96)),
    "short last": ((6, 128), (3, 128), (3, 32)),
    "one": ((5, 32),),
}
SUBNORMAL = 2.0**-10  # a 256th of it and below is subnormal in float16


def random_linear(groups: Any, outputs: int, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Arguments of `pack` with codes over the whole range of every width."""
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 1 << bits, (rows, outputs)) for bits, rows in groups]
    inputs = sum(rows for _, rows in groups)
    return {
        "codes": np.concatenate(codes).astype(np.uint8),
        "groups": tuple(Group(*group) for group in groups),
        "scales": rng.integers(0, 16, (len(groups), outputs)).astype(np.uint8),
        "scale_max": (rng.uniform(0.1, 1, len(groups)) * scale).astype(np.float16),
        "permutation": rng.permutation(inputs),
    }


@pytest.mark.parametrize("outputs", [32, 33, 40, 1, 96])
@pytest.mark.parametrize("mix", MIXES)
def test_packing_and_unpacking_are_inverse(mix: str, outputs: int) -> None:
    linear = random_linear(MIXES[mix], outputs)
    packed = pack(**linear)
    codes, scales = unpack(packed)
    np.testing.assert_array_equal(codes[:, :outputs], linear["codes"])
    np.testing.assert_array_equal(scales[:, :outputs], linear["scales"])
    assert stored_groups(packed) == linear["groups"]
    np.testing.assert_array_equal(packed.q_invperm[linear["permutation"]], np.arange(len(codes)))
    again = pack(codes, linear["groups"], scales, packed.q_scale_max, np.argsort(packed.q_invperm))
    for part in PARTS:
        assert getattr(again, part).tobytes() == getattr(packed, part).tobytes()
    kinds = {"int32": "I32", "float16": "F16", "int16": "I16"}
    stored = {name: (kinds[array.dtype.name], array.shape) for name, array in packed.tensors("x").items()}
    assert stored == stored_shapes("x", outputs, linear["groups"])


@pytest.mark.parametrize("mix", MIXES)
def test_a_groups_column_is_one_long_integer(mix: str) -> None:
    linear = random_linear(MIXES[mix], 24)
    packed = pack(**linear)
    table = packed.q_groups.tolist()
    ends = [*table[3::2], len(packed.q_weight)]
    row = 0
    for i, (bits, rows) in enumerate(linear["groups"]):
        assert table[2 * i] == bits
        words = packed.q_weight[table[2 * i + 1] : ends[i]]
        for column in (0, 7, 23, 24, 31):
            codes = [1 << (bits - 1)] * rows  # what padding stands for
            if column < 24:
                codes = linear["codes"][row : row + rows, column].tolist()
            whole = sum(code << (bits * j) for j, code in enumerate(codes))
            assert words[:, column].astype("<i4").tobytes() == whole.to_bytes(rows * bits // 8, "little")
        nibbles = int.from_bytes(packed.q_scale[i].astype("<i4").tobytes(), "little")
        assert [nibbles >> (4 * n) & 15 for n in range(24)] == linear["scales"][i].tolist()
        row += rows


@pytest.mark.parametrize("scale", [1.0, SUBNORMAL, 2.0**-14, 300.0])
@pytest.mark.parametrize("mix", MIXES)
def test_dequantizes_in_the_runtimes_rounding(mix: str, scale: float) -> None:
    outputs = 35
    linear = random_linear(MIXES[mix], outputs, scale)
    weights = dequantize(pack(**linear), outputs)
    inputs = len(linear["codes"])
    assert weights.shape == (outputs, inputs)
    assert weights.dtype == np.float32
    group = np.repeat(np.arange(len(linear["groups"])), [rows for _, rows in linear["groups"]])
    for row in range(0, inputs, 3):
        g = group[row]
        part = np.float16(np.float32(linear["scale_max"][g]) / np.float32(256))
        zero = 1 << (linear["groups"][g].bits - 1)
        for n in range(0, outputs, 5):
            step = np.float16((int(linear["scales"][g, n]) + 1) ** 2) * part
            value = np.float16(int(linear["codes"][row, n]) - zero) * step
            assert step.dtype == value.dtype == np.float16
            assert weights[n, linear["permutation"][row]] == np.float32(value)


def test_subnormal_parts_of_scales_are_kept() -> None:
    # 2^-16 / 256 is the least float16, and 2^-17 / 256 rounds to zero (half to even)
    scales = np.array([[0, 15], [0, 15], [0, 15]], np.uint8)
    maxima = np.array([2.0**-16, 2.0**-17, 1.5 * 2.0**-16], np.float16)
    expected = [[2.0**-24, 2.0**-16], [0, 0], [2.0**-23, 2.0**-15]]
    np.testing.assert_array_equal(effective_scales(scales, maxima), expected)


def test_what_the_format_cannot_hold_is_refused() -> None:
    changes: list[tuple[str, Any, str]] = [
        ("codes", np.full((128, 32), 16, np.uint8), "a code is outside 0 ... 15"),
        ("codes", np.zeros((96, 32), np.uint8), "do not fit"),
        ("codes", np.zeros((128, 32), np.int64), "not bytes"),
        ("scales", np.full((2, 32), 16, np.uint8), "above 15"),
        ("scales", np.zeros((3, 32), np.uint8), "do not fit"),
        ("scale_max", np.array([1, np.inf], np.float16), "finite"),
        ("scale_max", np.array([1, -1], np.float16), "finite"),
        ("scale_max", np.ones(2, np.float32), "finite"),
        ("permutation", np.zeros(128, np.int32), "permutation"),
        ("permutation", np.arange(64), "do not fit"),
        ("groups", (Group(4, 64), Group(8, 64)), "falling"),
        ("groups", (Group(7, 64), Group(4, 64)), "width"),
        ("groups", (Group(4, 80), Group(4, 48)), "width"),
        ("groups", (Group(4, 128), Group(4, 0)), "width"),
        ("groups", (), "do not fit"),
    ]
    pack(**random_linear(((4, 64), (4, 64)), 32))
    for part, value, words in changes:
        linear = random_linear(((4, 64), (4, 64)), 32) | {part: value}
        with pytest.raises(QuantizationError, match=words):
            pack(**linear)


def test_exllamav2s_own_file_comes_back_bit_for_bit() -> None:
    path = PEERS / "exl2_4.2bpw" / "output.safetensors"
    if not path.exists():
        pytest.skip("needs the peers' files, exl2_4.2bpw")
    from safetensors.numpy import load_file

    tensors = load_file(path)
    linears = [name.removesuffix(".q_weight") for name in tensors if name.endswith(".q_weight")]
    assert len(linears) == 29
    mixes = set()
    for linear in linears:
        stored = Packed(*(tensors[f"{linear}.{part}"] for part in PARTS))
        groups = stored_groups(stored)
        mixes.add(tuple(bits for bits, _ in groups))
        codes, scales = unpack(stored)
        again = pack(codes, groups, scales, stored.q_scale_max, np.argsort(stored.q_invperm))
        for part in PARTS:
            assert getattr(again, part).dtype == getattr(stored, part).dtype
            assert getattr(again, part).tobytes() == getattr(stored, part).tobytes()
    assert {(8, 6), (4, 4), (8, 8, 4, 4, 4, 4, 4, 4)} <= mixes
