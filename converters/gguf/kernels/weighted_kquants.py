"""The k-quants with an importance matrix (ggml's quantize_row_*_impl); see kquants for the types.

Every kernel takes float32 [n_rows, n_cols], `importance` float32 [n_cols], n_cols a multiple of 256, and
fills uint8 [n_rows, n_cols // 256 * bytes]. Pure, and free of locks. Importing this module imports numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import float32, int32

from converters.gguf.kernels import kq_affine as affine
from converters.gguf.kernels import kq_pack as pack
from converters.gguf.kernels import kq_symmetric as symmetric
from converters.gguf.kernels import weighted_lanes as weighted
from converters.gguf.kernels.kq_lanes import LANES, ORDER, SUPER, Bytes, Floats, W, X, gather
from dsconvert.compile import inlined, kernel


@inlined
def weigh(
    part: Floats, importance: Floats, first: Any, count: Any, twice: Any, blocks: Floats, lanes: Floats
) -> None:
    """Weights of the gathered sub-blocks `part`, of `count` those from `first` on; `twice` is 2 where ggml
    doubles the mean square."""
    per = SUPER // part.shape[1]
    sums = np.zeros(LANES // per, np.float32)
    weighted.sum_squares(part.reshape(-1, SUPER), sums)
    for lane in range(LANES):
        lanes[weighted.SPREAD, lane] = twice * sums[lane // per] / float32(SUPER)
    weighted.gather_importance(importance, first, count, blocks)
    weighted.weigh(blocks, lanes)


@inlined
def search_scales_and_mins(lanes: Floats, scales: Floats, few: Floats, top: Any) -> None:
    """Levels of the scales, and beside them of the mins, of each super-block of the group."""
    per, n_super = scales.shape[1], scales.shape[2] // 2
    for n in range(n_super):
        for j in range(per):
            lane = n * per + j
            scales[X, j, n] = lanes[affine.SCALE, lane]
            scales[X, j, n_super + n] = -lanes[affine.LOW, lane]
            scales[W, j, n] = lanes[weighted.TOTAL, lane]
            scales[W, j, n_super + n] = lanes[weighted.TOTAL, lane]
    weighted.search_positive(scales, few, top)


@inlined
def pack_affine_4_bit(lanes: Floats, scales: Floats, few: Floats, n: Any, out: Bytes, ds: Bytes) -> None:
    """16 bytes, scale in the low 4 bits and min in the high 4; d and dmin. Sets STEP and LEAST."""
    n_super = scales.shape[2] // 2
    d = pack.store_half(few[weighted.SCALE, n], ds[0:2])
    dmin = pack.store_half(few[weighted.SCALE, n_super + n], ds[2:4])
    for j in range(16):
        scale = int32(weighted.level_byte(scales, j, n))
        both = (scale | int32(weighted.level_byte(scales, j, n_super + n)) << 4) & 0xFF
        out[j] = both
        lanes[affine.STEP, 16 * n + j] = d * float32(both & 15)
        lanes[affine.LEAST, 16 * n + j] = dmin * float32(both >> 4)


@inlined
def pack_affine_6_bit(
    lanes: Floats, scales: Floats, few: Floats, n: Any, limit: Any, ds: Bytes, out: Bytes
) -> None:
    """d and dmin; 8 scales and 8 mins of 6 bits, `limit` at most, as kq_pack. Sets STEP and LEAST."""
    n_super = scales.shape[2] // 2
    d = pack.store_half(few[weighted.SCALE, n], ds[0:2])
    dmin = pack.store_half(few[weighted.SCALE, n_super + n], ds[2:4])
    for j in range(8):
        scale = min(limit, int32(weighted.level_byte(scales, j, n)))
        least = min(limit, int32(weighted.level_byte(scales, j, n_super + n)))
        if j < 4:
            out[j] = scale
            out[j + 4] = least
        else:
            out[j + 4] = (scale & 15) | (least & 15) << 4
            out[j - 4] |= (scale >> 4 << 6) & 0xFF
            out[j] |= (least >> 4 << 6) & 0xFF
    # Read back from the bytes, as ggml does: a level that wrapped has more than its 6 bits.
    for j in range(8):
        if j < 4:
            scale, least = out[j] & 63, out[j + 4] & 63
        else:
            scale = (out[j + 4] & 15) | (out[j - 4] >> 6) << 4
            least = (out[j + 4] >> 4) | (out[j] >> 6) << 4
        lanes[affine.STEP, 8 * n + j] = d * float32(scale)
        lanes[affine.LEAST, 8 * n + j] = dmin * float32(least)


@inlined
def pack_symmetric_6_bit(lanes: Floats, scales: Floats, few: Floats, n: Any, out: Bytes, ds: Bytes) -> None:
    """16 scales of 6 bits, 32 added, in 12 bytes as kq_pack; d. Sets STEP."""
    d = pack.store_half(few[weighted.SCALE, n], ds)
    out[:] = 0
    for j in range(16):
        stored = int32(weighted.level_byte(scales, j, n))
        out[j % 8] |= (stored & 15) << (j // 8 * 4)
        out[8 + j % 4] |= stored >> 4 << (j // 4 * 2)
        lanes[symmetric.STEP, 16 * n + j] = d * float32(stored - 32)


@kernel
def quantize_q2_k(x: Floats, importance: Floats, out: Bytes) -> None:
    """16 sub-blocks, levels 0..3, scales and mins of 4 bits."""
    rows, packed = x.reshape(-1, 16), out.reshape(-1, 84)
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    scales = np.empty((3, 16, LANES // 8), np.float32)
    few = np.empty((weighted.FEW_ROWS, LANES // 8), np.float32)
    levels = np.empty((LANES, 16), np.uint8)
    by_super = levels.reshape(-1, SUPER)
    for first in range(0, len(rows), LANES):
        part = rows[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        weigh(part, importance, first, len(rows), float32(1), blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(3), float32(-0.9), float32(0.05), 37, False)
        search_scales_and_mins(lanes, scales, few, float32(15))
        group = packed[first // 16 : (first + LANES) // 16]
        for n in range(len(group)):
            pack_affine_4_bit(lanes, scales, few, n, group[n, 0:16], group[n, 80:84])
        affine.level_anew(part, lanes, float32(3), levels)
        for n in range(len(group)):
            pack.pack_2_bits(by_super[n], 0, group[n, 16:80])


@kernel
def quantize_q3_k(x: Floats, importance: Floats, out: Bytes) -> None:
    """16 sub-blocks, levels -4..3, scales of 6 bits."""
    rows, packed = x.reshape(-1, 16), out.reshape(-1, 110)
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    scales = np.empty((3, 16, LANES // 16), np.float32)
    few = np.empty((weighted.FEW_ROWS, LANES // 16), np.float32)
    levels = np.empty((LANES, 16), np.uint8)
    by_super = levels.reshape(-1, SUPER)
    for first in range(0, len(rows), LANES):
        part = rows[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        weigh(part, importance, first, len(rows), float32(2), blocks, lanes)
        symmetric.search_scale(blocks, lanes, float32(4))
        for lane in range(LANES):
            scales[X, lane % 16, lane // 16] = lanes[symmetric.SCALE, lane]
            scales[W, lane % 16, lane // 16] = lanes[weighted.TOTAL, lane]
        weighted.search_signed(scales, few, float32(32))
        group = packed[first // 16 : (first + LANES) // 16]
        for n in range(len(group)):
            pack_symmetric_6_bit(lanes, scales, few, n, group[n, 96:108], group[n, 108:110])
        levels[:] = 0
        symmetric.level_anew(part, lanes, float32(4), levels)
        for n in range(len(group)):
            pack.pack_1_bit(by_super[n], 2, group[n, 0:32])
            pack.pack_2_bits(by_super[n], 0, group[n, 32:96])


@kernel
def quantize_q4_k(x: Floats, importance: Floats, out: Bytes) -> None:
    """8 sub-blocks, levels 0..15, scales and mins of 6 bits."""
    rows, packed = x.reshape(-1, 32), out.reshape(-1, 144)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    scales = np.empty((3, 8, LANES // 4), np.float32)
    few = np.empty((weighted.FEW_ROWS, LANES // 4), np.float32)
    levels = np.empty((LANES, 32), np.uint8)
    by_super = levels.reshape(-1, SUPER)
    for first in range(0, len(rows), LANES):
        part = rows[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        weigh(part, importance, first, len(rows), float32(2), blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(15), float32(-0.9), float32(0.05), 37, False)
        search_scales_and_mins(lanes, scales, few, float32(63))
        group = packed[first // 8 : (first + LANES) // 8]
        for n in range(len(group)):
            pack_affine_6_bit(lanes, scales, few, n, 255, group[n, 0:4], group[n, 4:16])
        affine.level_anew(part, lanes, float32(15), levels)
        for n in range(len(group)):
            pack.pack_low_4_bits(by_super[n], group[n, 16:144])


@kernel
def quantize_q5_k(x: Floats, importance: Floats, out: Bytes) -> None:
    """8 sub-blocks, levels 0..31, scales and mins of 6 bits."""
    rows, packed = x.reshape(-1, 32), out.reshape(-1, 176)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    scales = np.empty((3, 8, LANES // 4), np.float32)
    few = np.empty((weighted.FEW_ROWS, LANES // 4), np.float32)
    levels = np.empty((LANES, 32), np.uint8)
    by_super = levels.reshape(-1, SUPER)
    for first in range(0, len(rows), LANES):
        part = rows[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        weigh(part, importance, first, len(rows), float32(2), blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(31), float32(-0.9), float32(0.05), 37, False)
        search_scales_and_mins(lanes, scales, few, float32(63))
        group = packed[first // 8 : (first + LANES) // 8]
        for n in range(len(group)):
            pack_affine_6_bit(lanes, scales, few, n, 63, group[n, 0:4], group[n, 4:16])
        affine.level_anew(part, lanes, float32(31), levels)
        for n in range(len(group)):
            pack.pack_1_bit(by_super[n], 4, group[n, 16:48])
            pack.pack_low_4_bits(by_super[n], group[n, 48:176])


@kernel
def quantize_q6_k(x: Floats, importance: Floats, out: Bytes) -> None:
    """16 sub-blocks, levels -32..31, scales of 8 bits; the weights are the importance alone."""
    rows, packed = x.reshape(-1, 16), out.reshape(-1, 210)
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((weighted.ROWS, LANES), np.float32)
    levels = np.empty((LANES, 16), np.uint8)
    by_super = levels.reshape(-1, SUPER)
    for first in range(0, len(rows), LANES):
        part = rows[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        weighted.gather_importance(importance, first, len(rows), blocks)
        symmetric.search_scale(blocks, lanes, float32(32))
        group = packed[first // 16 : (first + LANES) // 16]
        for n in range(len(group)):
            pack.pack_symmetric_8_bit(lanes, 16 * n, group[n, 192:208], group[n, 208:210])
        levels[:] = 0
        symmetric.level_anew(part, lanes, float32(32), levels)
        for n in range(len(group)):
            pack.pack_low_4_bits_of_halves(by_super[n], group[n, 0:128])
            pack.pack_2_bits(by_super[n], 4, group[n, 128:192])


KERNELS: dict[str, Callable[[Floats, Floats, Bytes], None]] = {
    "q2_k": quantize_q2_k,
    "q3_k": quantize_q3_k,
    "q4_k": quantize_q4_k,
    "q5_k": quantize_q5_k,
    "q6_k": quantize_q6_k,
}
