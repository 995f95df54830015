"""The block types of 32 values: q8_0, q4_0, q4_1, q5_0, q5_1 (ggml's quantize_row_*_ref).

    q8_0   x = d * q                q in -127..127   { f16 d; int8 q[32] }
    q4_0   x = d * (q - 8)          q in 0..15       { f16 d; uint8 nibbles[16] }
    q5_0   x = d * (q - 16)         q in 0..31       { f16 d; uint32 fifth_bits; uint8 nibbles[16] }
    q4_1   x = d * q + m            q in 0..15       { f16 d; f16 m; uint8 nibbles[16] }
    q5_1   x = d * q + m            q in 0..31       { f16 d; f16 m; uint32 fifth_bits; uint8 nibbles[16] }

Byte j of the nibbles holds q[j] below and q[j + 16] above; bit j of fifth_bits belongs to q[j].

Every kernel takes `x`, bits [n_blocks, 32] (uint16: bf16, uint32: float32), and `out`, uint8
[n_blocks, bytes], and returns flags. It works on LANES blocks at a time in three passes that the compiler
turns into vector code: the extremes of each block (on bits), its scale (lanes are blocks), its levels.
Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import float32, int32, uint8, uint16, uint32

from converters.gguf.kernels.widen import (
    HALF_INFINITY,
    INFINITY,
    Bits,
    as_float,
    as_signed,
    flags_of,
    half,
    magnitude,
)
from dsconvert.compile import inlined, kernel

LANES = 64
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]
Grid = tuple[Any, Any, Any]
Scales = tuple[Halves, Halves, Floats, Floats]


# --- pass 1: the extremes of each block -------------------------------------------------------------
# Read as integers, the largest bits are those of the most negative value if there is one, the largest
# signed bits those of the most positive value if there is one. Loops run to x.shape[1] and not to 32:
# a small constant count would be unrolled into scalar code.


@inlined
def outermost(x: Bits, start: int, n: int, lows: Floats, highs: Floats) -> None:
    """The value of the largest bits and that of the largest signed bits of each block."""
    for b in range(n):
        low = x[start + b, 0]
        high = as_signed(x[start + b, 0])
        for j in range(x.shape[1]):
            bits = x[start + b, j]
            signed = as_signed(bits)
            low = bits if bits > low else low
            high = signed if signed > high else high
        lows[b] = as_float(low)
        highs[b] = as_float(high)


@inlined
def largest_magnitude(lows: Floats, highs: Floats, n: int, out: Floats) -> None:
    """The largest |x| of each block."""
    for b in range(n):
        out[b] = uint32(max(magnitude(lows[b]), magnitude(highs[b]))).view(np.float32)


@inlined
def widest(x: Bits, start: int, n: int, lows: Floats, highs: Floats, out: Floats) -> None:
    """The value of largest magnitude of each block, the first where two are equal, +0 if all are zero."""
    ties = uint32(0)  # rare: they are seen to apart, so that this loop becomes vectors
    for b in range(n):
        below, above = magnitude(lows[b]), magnitude(highs[b])
        value = lows[b] if below > above else highs[b]
        out[b] = value if above != uint32(0) or below != uint32(0) else float32(0)
        ties |= uint32(1) if below == above and lows[b] != highs[b] else uint32(0)
    if ties:
        for b in range(n):
            if magnitude(lows[b]) == magnitude(highs[b]) and lows[b] != highs[b]:
                out[b] = first_of(x, start + b, magnitude(highs[b]))


@inlined
def first_of(x: Bits, b: int, size: Any) -> float32:
    """The first value of block `b` whose magnitude has the bits `size`."""
    for j in range(x.shape[1]):
        value = as_float(x[b, j])
        if magnitude(value) == size:
            return value
    return float32(0)


@inlined
def extremes(x: Bits, start: int, n: int, smallest: Floats, largest: Floats) -> None:
    """The smallest and the largest value of each block; a smallest of zero has the first zero's sign."""
    for b in range(n):
        nearest = x[start + b, 0]
        low = x[start + b, 0]
        high = as_signed(x[start + b, 0])
        for j in range(x.shape[1]):
            bits = x[start + b, j]
            signed = as_signed(bits)
            nearest = bits if bits < nearest else nearest
            low = bits if bits > low else low
            high = signed if signed > high else high
        # Without a negative value `low` is the largest, without a positive one `high` the smallest:
        # `nearest`, the one nearest to zero, stands in.
        smallest[b] = as_float(low) if as_signed(low) < 0 else as_float(nearest)
        largest[b] = as_float(high) if high >= 0 else as_float(nearest)
        if smallest[b] == float32(0) and as_signed(low) < 0:
            smallest[b] = first_of(x, start + b, magnitude(float32(0)))


# --- pass 2: the scale of each block ----------------------------------------------------------------


@inlined
def inverse(d: Any) -> float32:
    """1 / d, or 0 for a block without a scale."""
    return float32(1) / d if d != float32(0) else float32(0)


@inlined
def centred_scales(widths: Floats, n: int, levels: Any, middle: Any, scales: Scales) -> int:
    """d = width / levels: its float16, its inverse, and what is added before truncation; returns flags.

    Where 1 / d is infinite (a block of nothing but tiny denormals) ggml's levels are all 0 on x86.
    """
    ds, _, ids, shifts = scales
    top = uint32(0)
    overflow = uint32(0)
    for b in range(n):
        size = magnitude(widths[b])
        d = float32(widths[b] / levels)
        scale = inverse(d)
        usable = magnitude(scale) < INFINITY
        ids[b] = scale if usable else float32(0)
        shifts[b] = middle if usable else float32(0)
        ds[b] = half(d)
        infinite = uint16(ds[b] & HALF_INFINITY) == HALF_INFINITY
        overflow |= uint32(1) if infinite and size < INFINITY else uint32(0)
        top = max(top, size)
    return int(flags_of(top, overflow != uint32(0)))


@inlined
def affine_scales(smallest: Floats, largest: Floats, n: int, levels: Any, scales: Scales) -> int:
    """d = (largest - smallest) / levels and m = smallest, as `centred_scales`; returns flags."""
    ds, ms, ids, _ = scales
    top = uint32(0)
    overflow = uint32(0)
    for b in range(n):
        size = max(magnitude(smallest[b]), magnitude(largest[b]))
        d = float32(float32(largest[b] - smallest[b]) / levels)
        scale = inverse(d)
        ids[b] = scale if magnitude(scale) < INFINITY else float32(0)
        ds[b] = half(d)
        ms[b] = half(smallest[b])
        infinite = max(uint16(ds[b] & HALF_INFINITY), uint16(ms[b] & HALF_INFINITY)) == HALF_INFINITY
        overflow |= uint32(1) if infinite and size < INFINITY else uint32(0)
        top = max(top, size)
    return int(flags_of(top, overflow != uint32(0)))


@inlined
def new_scales() -> Scales:
    """Room for LANES blocks: d and m as float16, 1 / d, what is added before truncation."""
    halves = np.empty((2, LANES), np.uint16)
    floats = np.empty((2, LANES), np.float32)
    return halves[0], halves[1], floats[0], floats[1]


# --- pass 3: the levels of each block ---------------------------------------------------------------


@inlined
def put_half(out: Bytes, b: int, at: int, value: Any) -> None:
    """Store a float16's bits, little endian."""
    out[b, at] = uint8(value & uint16(0xFF))
    out[b, at + 1] = uint8(value >> uint16(8))


@inlined
def level(bits: Any, grid: Grid, top: Any) -> int32:
    """The level of one value by its grid (m, 1 / d, shift): (x - m) / d + shift, truncated, at most `top`."""
    m, scale, shift = grid
    return min(int32(float32(float32(as_float(bits) - m) * scale) + shift), top)


@inlined
def put_nibbles(x: Bits, row: int, grid: Grid, out: Bytes, at: int) -> None:
    """16 bytes of 4-bit levels."""
    middle = x.shape[1] // 2
    for j in range(middle):
        q0 = level(x[row, j], grid, int32(15))
        q1 = level(x[row, j + middle], grid, int32(15))
        out[row, at + j] = uint8(q0 | (q1 << int32(4)))


@inlined
def put_five_bits(x: Bits, row: int, grid: Grid, out: Bytes, at: int) -> None:
    """4 bytes of fifth bits, then 16 bytes of the lower four bits of each level."""
    middle = x.shape[1] // 2
    fifth = uint32(0)
    for j in range(middle):
        q0 = level(x[row, j], grid, int32(31))
        q1 = level(x[row, j + middle], grid, int32(31))
        out[row, at + 4 + j] = uint8((q0 & int32(15)) | ((q1 & int32(15)) << int32(4)))
        both = uint32(uint32(q0) >> uint32(4)) | uint32(uint32(uint32(q1) >> uint32(4)) << uint32(16))
        fifth |= uint32(uint32(both) << uint32(j))
    for k in range(4):
        out[row, at + k] = uint8(uint32(fifth >> uint32(8 * k)) & uint32(0xFF))


# --- the types --------------------------------------------------------------------------------------


@kernel
def q8_0(x: Bits, out: Bytes) -> int:
    """d = max |x| / 127, q = x / d rounded half away from zero."""
    floats, scales = np.empty((3, LANES), np.float32), new_scales()
    lows, highs, widths = floats[0], floats[1], floats[2]
    ds, _, ids, _ = scales
    flags = 0
    for start in range(0, x.shape[0], LANES):
        n = min(LANES, x.shape[0] - start)
        outermost(x, start, n, lows, highs)
        largest_magnitude(lows, highs, n, widths)
        flags |= centred_scales(widths, n, float32(127), float32(0), scales)
        for b in range(n):
            put_half(out, start + b, 0, ds[b])
            for j in range(x.shape[1]):
                value = float32(as_float(x[start + b, j]) * ids[b])
                whole = int32(value)
                rest = float32(value - float32(whole))
                whole += int32(rest >= float32(0.5)) - int32(rest <= float32(-0.5))
                out[start + b, 2 + j] = uint8(whole)
    return flags


@kernel
def q4_0(x: Bits, out: Bytes) -> int:
    """d = (the value of largest magnitude) / -8, q = x / d + 8 rounded."""
    floats, scales = np.empty((3, LANES), np.float32), new_scales()
    lows, highs, widths = floats[0], floats[1], floats[2]
    ds, _, ids, shifts = scales
    flags = 0
    for start in range(0, x.shape[0], LANES):
        n = min(LANES, x.shape[0] - start)
        outermost(x, start, n, lows, highs)
        widest(x, start, n, lows, highs, widths)
        flags |= centred_scales(widths, n, float32(-8), float32(8.5), scales)
        for b in range(n):
            put_half(out, start + b, 0, ds[b])
            put_nibbles(x, start + b, (float32(0), ids[b], shifts[b]), out, 2)
    return flags


@kernel
def q5_0(x: Bits, out: Bytes) -> int:
    """d = (the value of largest magnitude) / -16, q = x / d + 16 rounded."""
    floats, scales = np.empty((3, LANES), np.float32), new_scales()
    lows, highs, widths = floats[0], floats[1], floats[2]
    ds, _, ids, shifts = scales
    flags = 0
    for start in range(0, x.shape[0], LANES):
        n = min(LANES, x.shape[0] - start)
        outermost(x, start, n, lows, highs)
        widest(x, start, n, lows, highs, widths)
        flags |= centred_scales(widths, n, float32(-16), float32(16.5), scales)
        for b in range(n):
            put_half(out, start + b, 0, ds[b])
            put_five_bits(x, start + b, (float32(0), ids[b], shifts[b]), out, 2)
    return flags


@kernel
def q4_1(x: Bits, out: Bytes) -> int:
    """m = min x, d = (max x - m) / 15, q = (x - m) / d rounded."""
    low, high = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scales = new_scales()
    ds, ms, ids, _ = scales
    flags = 0
    for start in range(0, x.shape[0], LANES):
        n = min(LANES, x.shape[0] - start)
        extremes(x, start, n, low, high)
        flags |= affine_scales(low, high, n, float32(15), scales)
        for b in range(n):
            put_half(out, start + b, 0, ds[b])
            put_half(out, start + b, 2, ms[b])
            put_nibbles(x, start + b, (low[b], ids[b], float32(0.5)), out, 4)
    return flags


@kernel
def q5_1(x: Bits, out: Bytes) -> int:
    """m = min x, d = (max x - m) / 31, q = (x - m) / d rounded."""
    low, high = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scales = new_scales()
    ds, ms, ids, _ = scales
    flags = 0
    for start in range(0, x.shape[0], LANES):
        n = min(LANES, x.shape[0] - start)
        extremes(x, start, n, low, high)
        flags |= affine_scales(low, high, n, float32(31), scales)
        for b in range(n):
            put_half(out, start + b, 0, ds[b])
            put_half(out, start + b, 2, ms[b])
            put_five_bits(x, start + b, (low[b], ids[b], float32(0.5)), out, 4)
    return flags
