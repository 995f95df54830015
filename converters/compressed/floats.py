"""Small floating-point numbers as bytes, both ways: E4M3 and E2M1, rounded to nearest, ties to even.

E4M3 is float8_e4m3fn: no infinity, 448 the largest. E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

E4M3_MAX, E2M1_MAX = 448.0, 6.0
LEAST_NORMAL = 2.0**-6  # of E4M3
STEPS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)  # between two values of E2M1
TO_LOWER = (True, False, True, False, True, False, True)  # at a tie: the one with an even last bit


def _e4m3_values() -> Floats:
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7.0)
    values = np.where(exponent == 0, fraction * 2.0**-9, normal) * np.where(codes >> 7, -1, 1)
    values[codes & 127 == 127] = np.nan
    return values.astype(np.float32)


E4M3 = _e4m3_values()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def to_e4m3(values: Floats) -> Codes:
    """The codes of finite values; what is beyond the largest becomes it."""
    size = np.minimum(np.abs(values), np.float32(E4M3_MAX))
    bits = np.ascontiguousarray(size).view(np.uint32).astype(np.int64)
    bits += 0x7FFFF + (bits >> 20 & 1)
    normal = (bits >> 20) - (127 - 7 << 3)
    small = np.rint(size * np.float32(512))  # multiples of the least value; 8 of them are the least normal
    codes = np.where(size < LEAST_NORMAL, small, np.minimum(normal, 0x7E)).astype(np.uint8)
    return codes | np.where(np.signbit(values), np.uint8(0x80), np.uint8(0))


def to_e2m1(values: Floats) -> Codes:
    """The 4-bit codes of finite values: the index of the magnitude, and 8 for a sign."""
    size, codes = np.abs(values), np.zeros(values.shape, np.uint8)
    for step, lower in zip(STEPS, TO_LOWER, strict=True):
        codes += (size > step) if lower else (size >= step)
    return codes | np.where(values < 0, np.uint8(8), np.uint8(0))


def to_nibbles(codes: Codes) -> Codes:
    """Codes [n, K] of 4 bits, two in a byte, the first in the lower half: [n, K / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4)


def from_nibbles(data: npt.NDArray[Any]) -> Codes:
    """The inverse of `to_nibbles`."""
    return np.stack([data & np.uint8(15), data >> np.uint8(4)], axis=-1).reshape(len(data), -1)
