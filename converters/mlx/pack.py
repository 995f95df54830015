"""Codes, scales and biases as the tensors of an MLX folder.

Source of the layout: mlx 0.32, `mx.quantize`: codes of b bits without a gap from the lowest bit of a row's
first 32-bit word on, at every width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from converters.mlx.affine import Affine, stored
from dsconvert.errors import QuantizationError
from dsconvert.quantization.bit_packing import pack_rows

Array = npt.NDArray[Any]
PARTS = ("weight", "scales", "biases")


def pack(codes: Array, scales: Array, biases: Array, settings: Affine, dtype: str) -> dict[str, Array]:
    """The tensors of a linear, or of some of its rows, by the last part of their names.

    `codes` uint8 [n, K], `scales` and `biases` float32 [n, G]. Gives `weight` uint32 [n, K*bits/32], and
    `scales` and `biases` of the type `dtype`, bf16 as its bits. Raises QuantizationError for what the format
    cannot hold.
    """
    if int(codes.max(initial=0)) > settings.maxq:
        raise QuantizationError(
            f"gives the code {int(codes.max())}; the largest is {settings.maxq}",
            hint="This is a fault of dsconvert; please report it with the command",
        )
    words = np.ascontiguousarray(pack_rows(codes.T, settings.bits).T).view(np.uint32)
    return {"weight": words, "scales": as_stored(scales, dtype), "biases": as_stored(biases, dtype)}


def as_stored(numbers: Array, dtype: str) -> Array:
    """float32 scales or biases in a folder's type; raises QuantizationError for what it cannot reach."""
    held = stored(numbers, dtype)
    if not np.isfinite(held).all():
        raise QuantizationError(
            f"has weights that are no finite numbers, or too large for scales in {dtype}",
            hint="Look for a damaged tensor in the checkpoint",
        )
    if dtype == "bf16":
        return (held.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return held.astype(np.float16) if dtype == "f16" else held


def stored_shapes(
    outputs: int, inputs: int, settings: Affine, dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the tensors of a linear, by the last part of their names."""
    numbers = (dtype.upper(), (outputs, settings.groups(inputs)))
    codes = ("U32", (outputs, inputs * settings.bits // 32))
    return {"weight": codes, "scales": numbers, "biases": numbers}
