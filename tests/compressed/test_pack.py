"""Packing against big integers and against the reader, which knows the format's description alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from converters.compressed.pack import pack, stored_shapes, words
from converters.compressed.schemes import INTEGERS, SCHEMES
from converters.compressed.unpack import integers
from dsconvert.errors import QuantizationError
from dsconvert.quantization.bit_stream import fields

BITS = [SCHEMES[name].bits for name in INTEGERS]


def random_linear(bits: int, sym: bool, outputs: int = 40) -> dict[str, Any]:
    """Arguments of `pack` that use every code and, unless symmetric, every zero point."""
    rng, inputs, groups, top = np.random.default_rng(bits), 96, 3, 1 << bits
    zeros = np.full((groups, outputs), top // 2) if sym else rng.integers(0, top, (groups, outputs))
    return {
        "codes": rng.integers(0, top, (inputs, outputs)).astype(np.uint8),
        "scales": rng.uniform(1e-3, 1, (groups, outputs)).astype(np.float16),
        "zeros": zeros.astype(np.uint8),
        "bits": bits,
        "sym": sym,
    }


def as_integer(values: Any, bits: int, size: int) -> bytes:
    """Values as one long integer, the first in its lowest bits."""
    whole = sum(int(value) << (bits * k) for k, value in enumerate(values))
    return whole.to_bytes(4 * size, "little")


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_codes_and_columns_of_zero_points_are_long_integers(bits: int) -> None:
    linear = random_linear(bits, sym=False)
    found = pack(**linear)
    for n in range(40):
        row = found["weight_packed"][n].tobytes()
        assert row == as_integer(linear["codes"][:, n], bits, words(96, bits))
    for g in range(3):
        column = found["weight_zero_point"][:, g].tobytes()
        assert column == as_integer(linear["zeros"][g], bits, words(40, bits))
    assert found["weight_shape"].tolist() == [40, 96]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_reader_gives_back_what_was_packed(bits: int, sym: bool) -> None:
    linear = random_linear(bits, sym)
    found, group = pack(**linear), np.arange(96) // 32
    kinds = {"int32": "I32", "float16": "F16", "int64": "I64"}
    assert {part: (kinds[a.dtype.name], a.shape) for part, a in found.items()} == stored_shapes(
        40, 96, 3, bits, sym
    )
    codes = fields(found["weight_packed"], bits, 96)
    np.testing.assert_array_equal(codes, linear["codes"].T)
    zeros = None if sym else fields(found["weight_zero_point"].T, bits, 40).T
    scales = found["weight_scale"].astype(np.float32)
    weights = integers(codes, scales, zeros, group, bits)
    for n, k in ((0, 0), (39, 95), (17, 40), (31, 31), (5, 64)):
        q, z = int(linear["codes"][k, n]), int(linear["zeros"][group[k], n])
        assert weights[n, k] == np.float32(linear["scales"][group[k], n]) * np.float32(q - z)


@pytest.mark.parametrize(
    ("part", "value", "sym"),
    [("codes", 16, True), ("zeros", 16, False), ("zeros", 7, True), ("scales", np.inf, True)],
)
def test_what_the_format_cannot_hold_is_refused(part: str, value: float, sym: bool) -> None:
    linear = random_linear(4, sym)
    linear[part].reshape(-1)[7] = value
    with pytest.raises(QuantizationError, match="cannot hold"):
        pack(**linear)
