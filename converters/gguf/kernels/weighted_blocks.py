"""q4_0, q4_1, q5_0 and q5_1 with an importance matrix (ggml's quantize_row_*_impl); see blocks for the types.

Unlike the plain ones they search the scale of each block: q4_0 and q5_0 as q6_k does, q4_1 and q5_1 as q4_k.
Every kernel takes float32 [n_rows, n_cols], `importance` float32 [n_cols], n_cols a multiple of 32, and
fills uint8 [n_rows, n_cols // 32 * bytes]. Pure, and free of locks. Importing this module imports numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import float32, uint8

from converters.gguf.kernels import kq_affine as affine
from converters.gguf.kernels import kq_symmetric as symmetric
from converters.gguf.kernels import weighted_lanes as weighted
from converters.gguf.kernels.kq_lanes import LANES, ORDER, Bytes, Floats, gather
from converters.gguf.kernels.kq_pack import store_half
from dsconvert.compile import inlined, kernel


@inlined
def mean_squares(x: Floats) -> Floats:
    """The mean square of each row."""
    sums = np.empty(x.shape[0], np.float32)
    weighted.sum_squares(x, sums)
    for r in range(x.shape[0]):
        sums[r] = sums[r] / float32(x.shape[1])
    return sums


@inlined
def lay_out(
    x: Floats, means: Floats, importance: Floats, first: Any, blocks: Floats, lanes: Floats
) -> Floats:
    """The blocks from `first` on side by side, and their weights; returns the blocks as rows of 32."""
    rows, per_row = x.reshape(-1, 32), x.shape[1] // 32
    part = rows[first : first + LANES]
    gather(part, ORDER[: len(part)], blocks)
    weighted.gather_importance(importance, first, len(rows), blocks)
    for lane in range(LANES):
        lanes[weighted.SPREAD, lane] = means[min(first + lane, len(rows) - 1) // per_row]
    weighted.weigh(blocks, lanes)
    return part


@inlined
def put_nibbles(levels: Bytes, out: Bytes) -> None:
    """16 bytes: the low 4 bits of levels j and 16 + j."""
    for j in range(16):
        out[j] = (levels[j] & 15) | (levels[j + 16] & 15) << 4


@inlined
def put_fifth_bits(levels: Bytes, out: Bytes) -> None:
    """4 bytes: bit j is the fifth of level j."""
    for k in range(4):
        bits = 0
        for j in range(8):
            bits |= (levels[8 * k + j] >> 4 & 1) << j
        out[k] = uint8(bits)


@kernel
def q4_0(x: Floats, importance: Floats, out: Bytes) -> None:
    """x = d * (q - 8)."""
    packed = out.reshape(-1, 18)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    levels = np.empty((LANES, 32), np.uint8)
    means = mean_squares(x)
    for first in range(0, len(packed), LANES):
        part = lay_out(x, means, importance, first, blocks, lanes)
        symmetric.search_scale(blocks, lanes, float32(8))
        levels[:] = 0
        symmetric.level_as_searched(part, lanes, float32(8), levels)
        group = packed[first : first + LANES]
        for n in range(len(group)):
            store_half(lanes[symmetric.SCALE, n], group[n, 0:2])
            put_nibbles(levels[n], group[n, 2:18])


@kernel
def q5_0(x: Floats, importance: Floats, out: Bytes) -> None:
    """x = d * (q - 16)."""
    packed = out.reshape(-1, 22)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    levels = np.empty((LANES, 32), np.uint8)
    means = mean_squares(x)
    for first in range(0, len(packed), LANES):
        part = lay_out(x, means, importance, first, blocks, lanes)
        symmetric.search_scale(blocks, lanes, float32(16))
        levels[:] = 0
        symmetric.level_as_searched(part, lanes, float32(16), levels)
        group = packed[first : first + LANES]
        for n in range(len(group)):
            store_half(lanes[symmetric.SCALE, n], group[n, 0:2])
            put_fifth_bits(levels[n], group[n, 2:6])
            put_nibbles(levels[n], group[n, 6:22])


@kernel
def q4_1(x: Floats, importance: Floats, out: Bytes) -> None:
    """x = d * q + m."""
    packed = out.reshape(-1, 20)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    levels = np.empty((LANES, 32), np.uint8)
    means = mean_squares(x)
    for first in range(0, len(packed), LANES):
        part = lay_out(x, means, importance, first, blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(15), float32(-0.9), float32(0.05), 37, False)
        affine.level_as_searched(part, lanes, float32(15), levels)
        group = packed[first : first + LANES]
        for n in range(len(group)):
            store_half(lanes[affine.SCALE, n], group[n, 0:2])
            store_half(lanes[affine.LOW, n], group[n, 2:4])
            put_nibbles(levels[n], group[n, 4:20])


@kernel
def q5_1(x: Floats, importance: Floats, out: Bytes) -> None:
    """x = d * q + m."""
    packed = out.reshape(-1, 24)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    levels = np.empty((LANES, 32), np.uint8)
    means = mean_squares(x)
    for first in range(0, len(packed), LANES):
        part = lay_out(x, means, importance, first, blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(31), float32(-0.9), float32(0.05), 37, False)
        affine.level_as_searched(part, lanes, float32(31), levels)
        group = packed[first : first + LANES]
        for n in range(len(group)):
            store_half(lanes[affine.SCALE, n], group[n, 0:2])
            store_half(lanes[affine.LOW, n], group[n, 2:4])
            put_fifth_bits(levels[n], group[n, 4:8])
            put_nibbles(levels[n], group[n, 8:24])


KERNELS: dict[str, Callable[[Floats, Floats, Bytes], None]] = {
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q5_0": q5_0,
    "q5_1": q5_1,
}
