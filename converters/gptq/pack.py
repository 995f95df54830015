"""Codes and zero points as the 32-bit words of a GPTQ file, and back.

Fields of 2, 3, 4 or 8 bits fill the words from the lowest bit on; 3-bit fields run across word borders, 32
of them in 3 words. Zero points are stored less one in the v1 format ("gptq"), as they are in v2 ("gptq_v2").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import QuantizationError
from dsconvert.quantization.bit_packing import FIELDS, pack_rows, unpack_rows

Array = npt.NDArray[Any]
STORED_LESS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format: what is taken off a zero point
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized linear of K inputs, N outputs and G groups as it is stored.

    `qweight` int32 [K*bits/32, N], `qzeros` int32 [G, N*bits/32], `scales` float16 [G, N], `g_idx` int32
    [K]: the group of each input.
    """

    qweight: Array
    qzeros: Array
    scales: Array
    g_idx: Array

    def tensors(self, linear: str) -> dict[str, Array]:
        """The four tensors by name, for the linear `linear` (without ".weight")."""
        return {f"{linear}.{part}": getattr(self, part) for part in PARTS}


def pack(
    codes: Array, scales: Array, zeros: Array, g_idx: Array, bits: int, checkpoint_format: str = "gptq"
) -> Packed:
    """Pack codes [K, N], float16 scales [G, N], zero points [G, N] and groups [K].

    Raises QuantizationError for a code, zero point, scale or group that the format cannot hold: it would
    spill into its neighbours.
    """
    limit, less = 1 << bits, STORED_LESS[checkpoint_format]
    _within("code", codes, 0, limit - 1)
    _within("zero point", zeros, less, limit - 1)
    _within("group", g_idx, 0, len(scales) - 1)
    if scales.dtype != np.float16 or not np.isfinite(scales).all():
        raise QuantizationError("a scale is not a finite float16 value")
    stored = zeros.astype(np.uint32) - less
    return Packed(
        qweight=pack_rows(codes, bits),
        qzeros=np.ascontiguousarray(pack_rows(stored.T, bits).T),
        scales=np.ascontiguousarray(scales),
        g_idx=g_idx.astype(np.int32),
    )


def unpack(packed: Packed, bits: int, checkpoint_format: str = "gptq") -> tuple[Array, Array]:
    """The codes uint8 [K, N] and the zero points int16 [G, N]; the inverse of `pack`."""
    return unpack_rows(packed.qweight, bits), zero_points(packed, bits, checkpoint_format)


def zero_points(packed: Packed, bits: int, checkpoint_format: str = "gptq") -> Array:
    """The zero points alone, int16 [G, N]."""
    stored: Array = unpack_rows(packed.qzeros.T, bits).T.astype(np.int16)
    return stored + STORED_LESS[checkpoint_format]


def dequantize(packed: Packed, bits: int, checkpoint_format: str = "gptq") -> npt.NDArray[np.float32]:
    """The weights that the file stands for, float32 [N, K]: scale * (code - zero point)."""
    codes, zeros = unpack(packed, bits, checkpoint_format)
    scales, group = packed.scales.astype(np.float32), packed.g_idx
    weights = np.empty(codes.shape[::-1], np.float32)
    for i in range(0, len(codes), FIELDS):  # a few rows at a time: the whole in float32 once, not thrice
        part = slice(i, i + FIELDS)
        weights[:, part] = ((codes[part].astype(np.int16) - zeros[group[part]]) * scales[group[part]]).T
    return weights


def stored_shapes(
    linear: str, outputs: int, inputs: int, groups: int, bits: int
) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Type ("I32", "F16") and shape of the four tensors of a linear, by name."""
    shapes = {
        "qweight": ("I32", (inputs * bits // 32, outputs)),
        "qzeros": ("I32", (groups, outputs * bits // 32)),
        "scales": ("F16", (groups, outputs)),
        "g_idx": ("I32", (inputs,)),
    }
    return {f"{linear}.{part}": shape for part, shape in shapes.items()}


def _within(what: str, values: Array, low: int, high: int) -> None:
    least, most = int(values.min()), int(values.max())
    if least < low or most > high:
        raise QuantizationError(
            f"a {what} is outside {low} ... {high}",
            why=f"They go from {least} to {most}",
            hint="This is a fault of dsconvert; please report it with the command",
        )
