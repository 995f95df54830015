"""Float formats as bits: bf16 to float32, and float32 to bf16 and f16 exactly as ggml rounds them.

An array of bits says its format by its type: uint16 is bf16, uint32 is float32. float16 takes part only
as the target of `narrow_f16`. Integers alone do the work, so that the compiler may use vectors without being
allowed to reorder floats. Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba.extending import overload
from numpy import float32, int16, int32, uint16, uint32

from converters.gguf.kernels import NONFINITE, OVERFLOW
from dsconvert.compile import inlined, kernel

Bits = npt.NDArray[Any]  # uint16 or uint32

MAGNITUDE = uint32(0x7FFFFFFF)  # all of a float32 but its sign
INFINITY = uint32(0x7F800000)  # at or above it: infinite or not a number
HALF_INFINITY = uint16(0x7C00)  # the same for float16
BF16_INFINITY = uint16(0x7F80)


def as_float(bits: Any) -> float32:
    """The float32 value of the bits of a bf16 (16 bits wide) or a float32 (32 bits), signed or not."""
    raise NotImplementedError  # numba takes the body below that fits the type


@overload(as_float)
def _as_float(bits: Any) -> Any:
    def bf16(bits: Any) -> Any:
        return uint32(uint32(uint16(bits)) << uint32(16)).view(np.float32)

    def f32(bits: Any) -> Any:
        return uint32(bits).view(np.float32)

    return bf16 if bits.bitwidth == 16 else f32


def as_signed(bits: Any) -> Any:
    """The same bits as a signed integer of the same width."""
    raise NotImplementedError


@overload(as_signed)
def _as_signed(bits: Any) -> Any:
    def narrow(bits: Any) -> Any:
        return int16(bits)

    def wide(bits: Any) -> Any:
        return int32(bits)

    return narrow if bits.bitwidth == 16 else wide


@inlined
def magnitude(x: Any) -> Any:
    """The bits of |x|; INFINITY or more when `x` is not finite."""
    return uint32(float32(x).view(np.uint32) & MAGNITUDE)


@inlined
def half(x: Any) -> Any:
    """The bits of float32 `x` as float16: round to nearest even, NaN to 0x7e00 with its sign."""
    bits = float32(x).view(np.uint32)
    size = uint32(bits & MAGNITUDE)
    # Below 2^-14: adding 0.5 leaves the float16 subnormal, correctly rounded, in the low bits.
    small = uint32(float32(size.view(np.float32) + float32(0.5)).view(np.uint32) - uint32(0x3F000000))
    # Else: exponent bias 127 to 15, 13 bits fewer, half to even; a carry runs into the exponent.
    odd = uint32((size >> uint32(13)) & uint32(1))
    normal = uint32(uint32(size - uint32(0x38000000) + uint32(0xFFF) + odd) >> uint32(13))
    result = normal if size >= uint32(0x38800000) else small
    result = uint32(HALF_INFINITY) if size >= uint32(0x47800000) else result
    result = uint32(0x7E00) if size > INFINITY else result
    return uint16((uint32(bits >> uint32(16)) & uint32(0x8000)) | result)


@inlined
def brain(x: Any) -> Any:
    """The bits of float32 `x` as bf16: round to nearest even, NaN made quiet."""
    bits = float32(x).view(np.uint32)
    odd = uint32((bits >> uint32(16)) & uint32(1))
    rounded = uint32(uint32(bits + uint32(0x7FFF) + odd) >> uint32(16))
    quiet = uint32(uint32(bits >> uint32(16)) | uint32(64))
    return uint16(quiet if uint32(bits & MAGNITUDE) > INFINITY else rounded)


@inlined
def flags_of(largest: Any, overflow: Any) -> Any:
    """The flags for the largest magnitude met and whether a finite value became infinite."""
    return (NONFINITE if largest >= INFINITY else 0) | (OVERFLOW if overflow else 0)


@inlined
def widen_rows(bits: Bits, out: npt.NDArray[np.float32]) -> Any:
    """bf16 or float32 bits [n, size] to the first rows of float32 `out`, for kernels; returns flags."""
    largest = uint32(0)
    for n in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            x = as_float(bits[n, i])
            largest = max(largest, magnitude(x))
            out[n, i] = x
    return flags_of(largest, False)


@kernel
def widen(bits: Bits, out: npt.NDArray[np.float32]) -> int:
    """bf16 or float32 bits [n] to float32 [n]; returns flags."""
    largest = uint32(0)
    for i in range(bits.size):
        x = as_float(bits[i])
        largest = max(largest, magnitude(x))
        out[i] = x
    return int(flags_of(largest, False))


@kernel
def narrow_f16(bits: Bits, out: npt.NDArray[np.uint16]) -> int:
    """bf16 or float32 bits [n] to float16 bits [n]; returns flags."""
    largest = uint32(0)
    overflow = uint32(0)
    for i in range(bits.size):
        x = as_float(bits[i])
        result = half(x)
        size = magnitude(x)
        infinite = uint16(result & uint16(0x7FFF)) >= HALF_INFINITY
        overflow |= uint32(1) if infinite and size < INFINITY else uint32(0)
        largest = max(largest, size)
        out[i] = result
    return int(flags_of(largest, overflow != uint32(0)))


@kernel
def narrow_bf16(bits: Bits, out: npt.NDArray[np.uint16]) -> int:
    """bf16 or float32 bits [n] to bf16 bits [n]; returns flags."""
    largest = uint32(0)
    overflow = uint32(0)
    for i in range(bits.size):
        x = as_float(bits[i])
        result = brain(x)
        size = magnitude(x)
        infinite = uint16(result & uint16(0x7FFF)) >= BF16_INFINITY
        overflow |= uint32(1) if infinite and size < INFINITY else uint32(0)
        largest = max(largest, size)
        out[i] = result
    return int(flags_of(largest, overflow != uint32(0)))


@kernel
def copy_bf16(bits: Bits, out: npt.NDArray[np.uint16]) -> int:
    """bf16 bits [n] as they are; returns flags."""
    largest = uint16(0)
    for i in range(bits.size):
        size = uint16(bits[i] & uint16(0x7FFF))
        largest = size if size > largest else largest
        out[i] = bits[i]
    return NONFINITE if largest >= BF16_INFINITY else 0
