"""Codes, scales and zero points as the tensors of a compressed-tensors folder.

Source of the layout: compressed-tensors 0.20, `pack-quantized`: codes of b bits without a gap from the lowest
bit of a row's first 32-bit word on, zero points likewise down the outputs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.checkpoints.safetensors_header import BITS
from dsconvert.errors import QuantizationError
from dsconvert.quantization.bit_packing import FIELDS, pack_rows

Array = npt.NDArray[Any]


def pack(codes: Array, scales: Array, zeros: Array, bits: int, sym: bool) -> dict[str, Array]:
    """The tensors of a linear of K inputs and N outputs, by the last part of their names.

    `codes` uint8 [K, N], `scales` float16 [G, N], `zeros` uint8 [G, N], groups being runs of inputs. Gives
    `weight_packed` int32 [N, K*bits/32], `weight_scale` float16 [N, G], `weight_shape` int64 [2] and, unless
    it is symmetric, `weight_zero_point` int32 [ceil(N*bits/32), G]. Raises QuantizationError for what the
    format cannot hold.
    """
    _check(codes, scales, zeros, bits, sym)
    found = {
        "weight_packed": np.ascontiguousarray(pack_rows(codes, bits).T),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array(codes.shape[::-1], np.int64),
    }
    if not sym:
        rows = -(-zeros.shape[1] // FIELDS) * FIELDS
        padded = np.zeros((rows, len(zeros)), np.uint8)
        padded[: zeros.shape[1]] = zeros.T
        found["weight_zero_point"] = pack_rows(padded, bits)[: words(zeros.shape[1], bits)]
    return found


def words(values: int, bits: int) -> int:
    """How many 32-bit words hold so many values."""
    return -(-values * bits // 32)


def stored_shapes(
    outputs: int, inputs: int, groups: int, bits: int, sym: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the tensors of a linear, by the last part of their names."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (outputs, words(inputs, bits))),
        "weight_scale": ("F16", (outputs, groups)),
        "weight_shape": ("I64", (2,)),
    }
    return shapes if sym else {**shapes, "weight_zero_point": ("I32", (words(outputs, bits), groups))}


def integer_nbytes(outputs: int, inputs: int, groups: int, bits: int, sym: bool) -> int:
    """Bytes of the tensors of a linear."""
    stored = stored_shapes(outputs, inputs, groups, bits, sym)
    return sum(BITS[kind] // 8 * prod(shape) for kind, shape in stored.values())


def _check(codes: Array, scales: Array, zeros: Array, bits: int, sym: bool) -> None:
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    wrong = ""
    if int(codes.max()) > top:
        wrong = f"a code is {int(codes.max())}, the largest is {top}"
    elif int(zeros.max()) > top or (sym and not (zeros == middle).all()):
        wrong = f"zero points go from {int(zeros.min())} to {int(zeros.max())}"
    elif scales.dtype != np.float16 or not np.isfinite(scales).all():
        wrong = "a scale is not a finite float16 value"
    if wrong:
        raise QuantizationError(
            "gives values that the format cannot hold",
            why=wrong,
            hint="This is a fault of dsconvert; please report it with the command",
        )
