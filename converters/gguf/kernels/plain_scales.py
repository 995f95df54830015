"""mxfp4, nvfp4, tq1_0 and tq2_0: the largest magnitude gives the scale, and there is nothing to search for.

    mxfp4   17 bytes   32 values: a power of two (its exponent, 127 added); 16 bytes of levels, two a byte
    nvfp4   36 bytes   64 values: a float of 8 bits (e4m3) for each 16; 32 bytes of levels, two a byte
    tq1_0   54 bytes  256 values -d, 0 or d: 48 and 4 bytes of five and four digits to base 3; f16 d
    tq2_0   66 bytes  256 values -d, 0 or d: 64 bytes of four digits to base 4; f16 d

Every kernel takes `x`, bits [n_blocks, size] (uint16: bf16, uint32: float32), fills `out`, uint8 [n_blocks,
bytes], with the bytes of ggml's quantize_row_*_ref, and returns flags. An importance matrix changes nothing.
Pure, and free of locks. Importing this module imports numba.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import float32, uint8, uint32

from converters.gguf.kernels.kq_lanes import ONE, ZERO, Bytes, Floats
from converters.gguf.kernels.kq_pack import store_half
from converters.gguf.kernels.widen import INFINITY, Bits, as_float, flags_of, magnitude
from dsconvert.compile import inlined, kernel

SIX = float32(6)
# Twice the values of a 4-bit float (e2m1); the levels from 8 on are these below 0.
FLOAT4 = np.array([0, 1, 2, 3, 4, 6, 8, 12], dtype=np.float32)
LARGEST = uint32(0x45280000)  # the bits of 6 * 448: the largest level of the largest scale of nvfp4


@inlined
def _widen(x: Bits, n: Any, values: Floats) -> Any:
    """The values of block `n`; returns the bits of the largest magnitude."""
    largest = uint32(0)
    for j in range(x.shape[1]):
        values[j] = as_float(x[n, j])
        largest = max(largest, magnitude(values[j]))
    return largest


@inlined
def _half_power(exponent: Any) -> Any:
    """2^(exponent - 128): FLOAT4 is doubled. The exponent is a byte; below 2 the result is denormal."""
    shifted = uint32(exponent - 1) << uint32(23) if exponent >= 2 else uint32(0x200000) << uint32(exponent)
    return uint32(shifted).view(np.float32)


@inlined
def _put_levels(values: Floats, d: Any, levels: Bytes, least: Floats, out: Bytes) -> None:
    """The level of the least distance for each value, of several the one nearest to zero; two a byte."""
    for j in range(len(levels)):
        least[j] = abs(values[j])
        levels[j] = 0
    for k in range(1, 8):
        value = FLOAT4[k] * d
        for j in range(len(levels)):
            distance = abs(value - abs(values[j]))
            nearer = distance < least[j]
            least[j] = distance if nearer else least[j]
            levels[j] = uint8(k) if nearer else levels[j]
    for j in range(len(levels)):
        levels[j] |= uint8(8) if values[j] < ZERO and levels[j] else uint8(0)
    for j in range(len(levels) // 2):
        out[j] = levels[j] | levels[len(levels) // 2 + j] << 4


@inlined
def _float8(x: Any) -> Any:
    """The bits of `x`, not negative, as a float of 4 bits of exponent and 3 of mantissa: halves go up.

    What lies in the last of the exponents becomes the largest number, 448.
    """
    bits = uint32(float32(x).view(np.uint32))
    exponent = int(bits >> uint32(23)) - 120
    mantissa = int(bits >> uint32(20) & uint32(7)) + int(bits >> uint32(19) & uint32(1))
    normal = 8 * exponent + mantissa  # a carry runs into the exponent
    small = min(int(min(x, ONE) * float32(512) + float32(0.5)), 7)
    found = min(normal, 0x7E) if exponent < 15 else 0x7E
    found = 0x7E if found >= 0x78 else found
    return uint8(small if exponent <= 0 else found)


@inlined
def _half_of_float8(bits: Any) -> Any:
    """Half the value of such a float: FLOAT4 is doubled."""
    exponent, mantissa = int(bits) >> 3, float32(int(bits) & 7)
    power = uint32(uint32(exponent + 119) << uint32(23)).view(np.float32)
    return float32((ONE + mantissa / float32(8)) * power if exponent else mantissa * float32(2.0**-10))


@kernel
def quantize_mxfp4(x: Bits, out: Bytes) -> int:
    """The scale is a power of two, by the exponent of the largest value."""
    values, levels, least = np.empty(32, np.float32), np.empty(32, np.uint8), np.empty(32, np.float32)
    top = uint32(0)
    for n in range(len(x)):
        largest = _widen(x, n, values)
        top = max(top, largest)
        exponent = 0
        if largest:
            # The logarithm as float32, whose rounding can reach the next power: that is ggml's exponent.
            exponent = math.floor(math.log2(uint32(largest).view(np.float32))) + 125 & 255
        out[n, 0] = exponent
        _put_levels(values, _half_power(exponent), levels, least, out[n, 1:])
    return int(flags_of(top, False))


@kernel
def quantize_nvfp4(x: Bits, out: Bytes) -> int:
    """A finer scale for each 16 values; what is beyond the largest scale is cut off, and flagged."""
    values, levels, least = np.empty(64, np.float32), np.empty(16, np.uint8), np.empty(16, np.float32)
    top = uint32(0)
    for n in range(len(x)):
        top = max(top, _widen(x, n, values))
        for part in range(4):
            own = values[16 * part : 16 * part + 16]
            largest = ZERO
            for j in range(16):
                largest = max(largest, abs(own[j]))
            scale = _float8(largest / SIX)
            out[n, part] = scale
            _put_levels(own, _half_of_float8(scale), levels, least, out[n, 4 + 8 * part : 12 + 8 * part])
    return int(flags_of(top, LARGEST < top < INFINITY))


@inlined
def _digits(x: Bits, n: Any, values: Floats, digits: Bytes, d: Bytes) -> Any:
    """0, 1 or 2 for -d, 0 or d, halves away from zero; writes d and returns the largest magnitude's bits."""
    largest = _widen(x, n, values)
    size = uint32(largest).view(np.float32)
    store_half(size, d)
    # Of a denormal the inverse is infinite, and all that ggml then makes of it is 0.
    inverse = ONE / size if largest else ZERO
    inverse = inverse if inverse < float32(np.inf) else ZERO
    for j in range(256):
        v = inverse * values[j]
        digits[j] = uint8(1 + (1 if v >= float32(0.5) else 0) - (1 if v <= float32(-0.5) else 0))
    return largest


@inlined
def _put_base_3(digits: Bytes, count: Any, out: Bytes) -> None:
    """`count` digits a byte, those of a byte len(out) apart: as the fraction of 256 that they are of 3^5."""
    for m in range(len(out)):
        number = 0
        for k in range(5):
            number = 3 * number + (int(digits[m + k * len(out)]) if k < count else 0)
        out[m] = uint8((number * 256 + 242) // 243)


@kernel
def quantize_tq1_0(x: Bits, out: Bytes) -> int:
    """160 values in 32 bytes, 80 in 16, 16 in 4."""
    values, digits = np.empty(256, np.float32), np.empty(256, np.uint8)
    top = uint32(0)
    for n in range(len(x)):
        top = max(top, _digits(x, n, values, digits, out[n, 52:54]))
        _put_base_3(digits[:160], 5, out[n, 0:32])
        _put_base_3(digits[160:240], 5, out[n, 32:48])
        _put_base_3(digits[240:], 4, out[n, 48:52])
    return int(flags_of(top, False))


@kernel
def quantize_tq2_0(x: Bits, out: Bytes) -> int:
    """Four digits a byte, those of a byte 32 apart."""
    values, digits = np.empty(256, np.float32), np.empty(256, np.uint8)
    top = uint32(0)
    for n in range(len(x)):
        top = max(top, _digits(x, n, values, digits, out[n, 64:66]))
        for half in range(2):
            for m in range(32):
                at = 128 * half + m
                low, high = digits[at] | digits[at + 32] << 2, digits[at + 64] | digits[at + 96] << 2
                out[n, 32 * half + m] = low | high << 4
    return int(flags_of(top, False))


KERNELS: dict[str, Callable[[Bits, Bytes], int]] = {
    "mxfp4": quantize_mxfp4,
    "nvfp4": quantize_nvfp4,
    "tq1_0": quantize_tq1_0,
    "tq2_0": quantize_tq2_0,
}
