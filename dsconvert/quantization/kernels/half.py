"""Float16 in kernels: the value that a file holds for one that is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, uint32

from dsconvert.compile import inlined

NORMAL = uint32(0x38800000)  # 2^-14, the least float16 that is not subnormal
TOO_LARGE = uint32(0x477FF000)  # 65520, which rounds to infinity
INFINITY = uint32(0x7F800000)


@inlined
def to_half(value: Any) -> Any:
    """`value`, by way of float32, rounded to the nearest float16, ties to even, as float32."""
    bits = float32(value).view(np.uint32)
    size = uint32(bits & uint32(0x7FFFFFFF))
    # Below 2^-14: one half and a float16's subnormal have the same last place.
    small = float32(float32(uint32(size).view(np.float32) + float32(0.5)) - float32(0.5)).view(np.uint32)
    odd = uint32((size >> uint32(13)) & uint32(1))
    rounded = uint32(uint32(size + uint32(0xFFF) + odd) & uint32(0xFFFFE000))
    rounded = uint32(small) if size < NORMAL else rounded
    rounded = uint32(INFINITY) if size >= TOO_LARGE else rounded
    return uint32(rounded | uint32(bits & uint32(0x80000000))).view(np.float32)
