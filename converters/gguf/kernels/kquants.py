"""The k-quants: super-blocks of 256 values whose sub-blocks have integer scales of their own.

    type  bytes  sub-blocks  a value is                  where the bytes are
    q2_k     84   16 of 16   d scale level - dmin min    16 scales and mins, 64 levels, d, dmin
    q3_k    110   16 of 16   d scale (level - 4)         32 high bits, 64 low 2 bits, 12 scales, d
    q4_k    144    8 of 32   d scale level - dmin min    d, dmin, 12 scales and mins, 128 levels
    q5_k    176    8 of 32   d scale level - dmin min    d, dmin, 12 scales and mins, 32 high bits, 128 levels
    q6_k    210   16 of 16   d scale (level - 32)        128 low 4 bits, 64 high 2 bits, 16 scales, d

d and dmin are float16. Every kernel takes float32 [n_rows, n_cols], n_cols a multiple of 256, and fills
uint8 [n_rows, n_cols // 256 * bytes] with the bytes of ggml's quantize_row_*_ref; both C-contiguous. Pure,
and free of locks. Importing this module imports numba; a kernel is compiled at its first call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import float32

from converters.gguf.kernels import kq_affine as affine
from converters.gguf.kernels import kq_pack as pack
from converters.gguf.kernels import kq_symmetric as symmetric
from converters.gguf.kernels.compile import kernel
from converters.gguf.kernels.kq_lanes import LANES, SUPER, Bytes, Floats, gather


@kernel
def quantize_q2_k(x: Floats, out: Bytes) -> None:
    """16 sub-blocks, levels 0..3, scales and mins of 4 bits."""
    values, packed = x.reshape(-1), out.reshape(-1)
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((affine.ROWS, LANES), np.float32)
    levels = np.empty(SUPER, np.uint8)
    for first in range(0, values.size // 16, LANES):
        gather(values, first, blocks)
        affine.weigh_by_size(blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(3), float32(-0.5), float32(0.1), 16, True)
        for lane in range(0, min(LANES, values.size // 16 - first), 16):
            n = (first + lane) // 16
            block = packed[84 * n : 84 * n + 84]
            pack.affine_4_bit(values[SUPER * n : SUPER * n + SUPER], lanes, lane, float32(3), levels, block)
            pack.pack_2_bits(levels, block[16:80])


@kernel
def quantize_q3_k(x: Floats, out: Bytes) -> None:
    """16 sub-blocks, levels -4..3, scales of 6 bits."""
    values, packed = x.reshape(-1), out.reshape(-1)
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((symmetric.ROWS, LANES), np.float32)
    levels = np.empty(SUPER, np.uint8)
    for first in range(0, values.size // 16, LANES):
        gather(values, first, blocks)
        symmetric.weigh_by_square(blocks)
        symmetric.refine_levels(blocks, lanes, float32(4))
        for lane in range(0, min(LANES, values.size // 16 - first), 16):
            n = (first + lane) // 16
            block = packed[110 * n : 110 * n + 110]
            pack.symmetric_6_bit(values[SUPER * n : SUPER * n + SUPER], blocks, lanes, lane, levels, block)
            pack.pack_2_bits(levels, block[32:96])
            pack.pack_high_bit(levels, 2, block[0:32])


@kernel
def quantize_q4_k(x: Floats, out: Bytes) -> None:
    """8 sub-blocks, levels 0..15, scales and mins of 6 bits."""
    values, packed = x.reshape(-1), out.reshape(-1)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((affine.ROWS, LANES), np.float32)
    levels = np.empty(SUPER, np.uint8)
    for first in range(0, values.size // 32, LANES):
        gather(values, first, blocks)
        affine.weigh_by_mean_and_size(blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(15), float32(-1), float32(0.1), 21, False)
        for lane in range(0, min(LANES, values.size // 32 - first), 8):
            n = (first + lane) // 8
            block = packed[144 * n : 144 * n + 144]
            pack.affine_6_bit(values[SUPER * n : SUPER * n + SUPER], lanes, lane, float32(15), levels, block)
            pack.pack_4_bits(levels, block[16:144])


@kernel
def quantize_q5_k(x: Floats, out: Bytes) -> None:
    """8 sub-blocks, levels 0..31, scales and mins of 6 bits."""
    values, packed = x.reshape(-1), out.reshape(-1)
    blocks = np.empty((3, 32, LANES), np.float32)
    lanes = np.empty((affine.ROWS, LANES), np.float32)
    levels = np.empty(SUPER, np.uint8)
    for first in range(0, values.size // 32, LANES):
        gather(values, first, blocks)
        affine.weigh_by_mean_and_size(blocks, lanes)
        affine.search_scale_and_low(blocks, lanes, float32(31), float32(-0.5), float32(0.1), 16, False)
        for lane in range(0, min(LANES, values.size // 32 - first), 8):
            n = (first + lane) // 8
            block = packed[176 * n : 176 * n + 176]
            pack.affine_6_bit(values[SUPER * n : SUPER * n + SUPER], lanes, lane, float32(31), levels, block)
            pack.pack_high_bit(levels, 4, block[16:48])
            pack.pack_4_bits(levels, block[48:176])


@kernel
def quantize_q6_k(x: Floats, out: Bytes) -> None:
    """16 sub-blocks, levels -32..31, scales of 8 bits."""
    values, packed = x.reshape(-1), out.reshape(-1)
    blocks = np.empty((3, 16, LANES), np.float32)
    lanes = np.empty((symmetric.ROWS, LANES), np.float32)
    levels = np.empty(SUPER, np.uint8)
    for first in range(0, values.size // 16, LANES):
        gather(values, first, blocks)
        symmetric.weigh_by_square(blocks)
        symmetric.search_scale(blocks, lanes, float32(32))
        for lane in range(0, min(LANES, values.size // 16 - first), 16):
            n = (first + lane) // 16
            block = packed[210 * n : 210 * n + 210]
            pack.symmetric_8_bit(values[SUPER * n : SUPER * n + SUPER], lanes, lane, levels, block)
            pack.pack_4_and_2_bits(levels, block[0:128], block[128:192])


KERNELS: dict[str, Callable[[Floats, Bytes], None]] = {
    "q2_k": quantize_q2_k,
    "q3_k": quantize_q3_k,
    "q4_k": quantize_q4_k,
    "q5_k": quantize_q5_k,
    "q6_k": quantize_q6_k,
}
