"""Rounds values to nearest in a type that holds them as they are: what storing them there makes of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def nearest(rows: Floats, dtype: str) -> Floats | None:
    """float32 values of any shape as `dtype` ("bf16", "f16", "f32", "f64") holds them, in new memory.

    Rounded to nearest, ties to even; None for a type that is not known here.

        >>> nearest(np.array([1.001], np.float32), "bf16")
        array([1.], dtype=float32)
    """
    if dtype in ("f32", "f64"):
        return rows.copy()
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return rows.astype(np.float16).astype(np.float32)
    return to_bf16(rows) if dtype == "bf16" else None


def to_bf16(values: Floats) -> Floats:
    """float32 values as bf16 holds them; NaN stays NaN, and what is too large becomes infinite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    found: Floats = np.where(np.isnan(values), values, rounded.view(np.float32))
    return found
