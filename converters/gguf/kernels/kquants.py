"""The k-quants: super-blocks of 256 values whose sub-blocks have integer scales of their own.

    type  bytes  sub-blocks  a value is                  where the bytes are
    q2_k     84   16 of 16   d scale level - dmin min    16 scales and mins, 64 levels, d, dmin
    q3_k    110   16 of 16   d scale (level - 4)         32 high bits, 64 low 2 bits, 12 scales, d
    q4_k    144    8 of 32   d scale level - dmin min    d, dmin, 12 scales and mins, 128 levels
    q5_k    176    8 of 32   d scale level - dmin min    d, dmin, 12 scales and mins, 32 high bits, 128 levels
    q6_k    210   16 of 16   d scale (level - 32)        128 low 4 bits, 64 high 2 bits, 16 scales, d

d and dmin are float16. Every kernel takes `x`, bits [n, 256] (uint16: bf16, uint32: float32), fills `out`,
uint8 [n, bytes], with the bytes of ggml's quantize_row_*_ref, and returns flags; both C-contiguous. Pure, and
free of locks. Importing this module imports numba; a kernel is compiled at its first call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import float32

from converters.gguf.kernels import kq_affine as affine
from converters.gguf.kernels import kq_moves as moves
from converters.gguf.kernels import kq_pack as pack
from converters.gguf.kernels import kq_symmetric as symmetric
from converters.gguf.kernels.kq_lanes import LANES, ORDER, SUPER, Bytes, gather
from converters.gguf.kernels.widen import Bits, widen_rows
from dsconvert.compile import kernel

# q3_k settles MANY sub-blocks before it gathers the restless among them, MOVERS at a time.
MANY, MOVERS = 16 * LANES, 2 * LANES


@kernel
def quantize_q2_k(x: Bits, out: Bytes) -> int:
    """16 sub-blocks, levels 0..3, scales and mins of 4 bits."""
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((affine.ROWS, LANES), np.float32)
    values, levels = np.empty((LANES // 16, SUPER), np.float32), np.empty((LANES, 16), np.uint8)
    rows = values.reshape(-1, 16)
    by_super = levels.reshape(-1, SUPER)
    flags = 0
    for first in range(0, len(x), len(values)):
        group = out[first : first + len(values)]
        flags |= widen_rows(x[first : first + len(values)], values)
        part = rows[: 16 * len(group)]
        gather(part, ORDER[: len(part)], blocks)
        affine.weigh_by_size(blocks)
        affine.search_scale_and_low(blocks, lanes, float32(3), float32(-0.5), float32(0.1), 16, True)
        for n in range(len(group)):
            pack.pack_affine_4_bit(lanes, 16 * n, group[n, 0:16], group[n, 80:84])
        affine.level_anew(part, lanes, float32(3), levels)
        for n in range(len(group)):
            pack.pack_2_bits(by_super[n], 0, group[n, 16:80])
    return flags


@kernel
def quantize_q3_k(x: Bits, out: Bytes) -> int:
    """16 sub-blocks, levels -4..3, scales of 6 bits."""
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((moves.ROWS, MANY), np.float32)
    movers = np.empty((3, 16, MOVERS), np.float32)
    moved = np.empty((MANY, 16), np.float32)
    restless = np.empty(MANY, np.int64)
    turned, numbers = np.empty((MOVERS, 16), np.float32), np.empty(2, np.int64)
    room = np.empty((moves.ROWS, MOVERS), np.float32), turned, np.empty(MOVERS, np.int64)
    values = np.empty((MANY // 16, SUPER), np.float32)
    rows = values.reshape(-1, 16)
    flags = 0
    for first in range(0, len(x), len(values)):
        group = out[first : first + len(values)]
        flags |= widen_rows(x[first : first + len(values)], values)
        part = rows[: 16 * len(group)]
        count = moves.guess(part, blocks, lanes, restless)
        moves.move(part, restless[:count], movers, lanes, room, moved)
        pack.find_largest_scales(lanes, len(group), turned, blocks)
        for n in range(len(group)):
            pack.pack_symmetric_6_bit(lanes, n, numbers, group)
        moves.keep_levels(part, restless[:count], moved, lanes)
        for n in range(len(group)):
            pack.pack_3_bit_levels(part, lanes, n, group)
    return flags


@kernel
def quantize_q4_k(x: Bits, out: Bytes) -> int:
    """8 sub-blocks, levels 0..15, scales and mins of 6 bits."""
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((affine.ROWS, LANES), np.float32)
    values, levels = np.empty((LANES // 8, SUPER), np.float32), np.empty((LANES, 32), np.uint8)
    rows = values.reshape(-1, 32)
    by_super = levels.reshape(-1, SUPER)
    flags = 0
    for first in range(0, len(x), len(values)):
        group = out[first : first + len(values)]
        flags |= widen_rows(x[first : first + len(values)], values)
        part = rows[: 8 * len(group)]
        gather(part, ORDER[: len(part)], blocks)
        affine.weigh_by_mean_and_size(blocks)
        affine.search_scale_and_low(blocks, lanes, float32(15), float32(-1), float32(0.1), 21, False)
        for n in range(len(group)):
            pack.pack_affine_6_bit(lanes, 8 * n, group[n, 0:4], group[n, 4:16])
        affine.level_anew(part, lanes, float32(15), levels)
        for n in range(len(group)):
            pack.pack_low_4_bits(by_super[n], group[n, 16:144])
    return flags


@kernel
def quantize_q5_k(x: Bits, out: Bytes) -> int:
    """8 sub-blocks, levels 0..31, scales and mins of 6 bits."""
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((affine.ROWS, LANES), np.float32)
    values, levels = np.empty((LANES // 8, SUPER), np.float32), np.empty((LANES, 32), np.uint8)
    rows = values.reshape(-1, 32)
    by_super = levels.reshape(-1, SUPER)
    flags = 0
    for first in range(0, len(x), len(values)):
        group = out[first : first + len(values)]
        flags |= widen_rows(x[first : first + len(values)], values)
        part = rows[: 8 * len(group)]
        gather(part, ORDER[: len(part)], blocks)
        affine.weigh_by_mean_and_size(blocks)
        affine.search_scale_and_low(blocks, lanes, float32(31), float32(-0.5), float32(0.1), 16, False)
        for n in range(len(group)):
            pack.pack_affine_6_bit(lanes, 8 * n, group[n, 0:4], group[n, 4:16])
        affine.level_anew(part, lanes, float32(31), levels)
        for n in range(len(group)):
            pack.pack_1_bit(by_super[n], 4, group[n, 16:48])
            pack.pack_low_4_bits(by_super[n], group[n, 48:176])
    return flags


@kernel
def quantize_q6_k(x: Bits, out: Bytes) -> int:
    """16 sub-blocks, levels -32..31, scales of 8 bits."""
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((symmetric.ROWS, LANES), np.float32)
    values, levels = np.empty((LANES // 16, SUPER), np.float32), np.empty((LANES, 16), np.uint8)
    rows = values.reshape(-1, 16)
    by_super = levels.reshape(-1, SUPER)
    flags = 0
    for first in range(0, len(x), len(values)):
        group = out[first : first + len(values)]
        flags |= widen_rows(x[first : first + len(values)], values)
        part = rows[: 16 * len(group)]
        gather(part, ORDER[: len(part)], blocks)
        symmetric.weigh_by_square(blocks)
        symmetric.search_scale(blocks, lanes, float32(32))
        for n in range(len(group)):
            pack.pack_symmetric_8_bit(lanes, 16 * n, group[n, 192:208], group[n, 208:210])
        levels[:] = 0
        symmetric.level_anew(part, lanes, float32(32), levels)
        for n in range(len(group)):
            pack.pack_low_4_bits_of_halves(by_super[n], group[n, 0:128])
            pack.pack_2_bits(by_super[n], 4, group[n, 128:192])
    return flags


KERNELS: dict[str, Callable[[Bits, Bytes], int]] = {
    "q2_k": quantize_q2_k,
    "q3_k": quantize_q3_k,
    "q4_k": quantize_q4_k,
    "q5_k": quantize_q5_k,
    "q6_k": quantize_q6_k,
}
