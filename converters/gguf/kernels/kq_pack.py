"""The second half of a k-quant: the sub-blocks' scales as integers, the final levels, the bytes.

With the scales rounded, every value is levelled anew. Only where a sub-block's scale rounds to 0 do the
levels of the search stay, as in ggml: they have no meaning, but they are in the file.
"""

from __future__ import annotations

from typing import Any

from numpy import float32, int8, int32, uint8

from converters.gguf.kernels import kq_affine as affine
from converters.gguf.kernels import kq_symmetric as symmetric
from converters.gguf.kernels.compile import inlined
from converters.gguf.kernels.kq_lanes import (
    LEVEL,
    NOTHING,
    ONE,
    SUPER,
    ZERO,
    Bytes,
    Floats,
    clip,
    half_value,
    nearest_int,
)
from converters.gguf.kernels.widen import half


@inlined
def store_half(value: Any, out: Bytes, at: Any) -> Any:
    """Write float32 `value` as float16 at out[at], low byte first; gives the value that a reader finds."""
    bits = half(value)
    out[at] = uint8(bits & 0xFF)
    out[at + 1] = uint8(bits >> 8)
    return half_value(bits)


@inlined
def largest_scale_and_min(lanes: Floats, lane: Any, count: Any) -> Any:
    """The largest scale and the largest min, which is -low, of `count` sub-blocks; 0 when none is above."""
    scale = least = ZERO
    for j in range(lane, lane + count):
        scale = lanes[affine.SCALE, j] if lanes[affine.SCALE, j] > scale else scale
        least = -lanes[affine.LOW, j] if -lanes[affine.LOW, j] > least else least
    return scale, least


@inlined
def level_affine(x: Floats, lanes: Floats, lane: Any, d: Any, least: Any, top: Any, levels: Bytes) -> None:
    """The levels of one sub-block `x`, whose values will be read as d * level - least."""
    if d == ZERO:
        for j in range(levels.size):
            levels[j] = affine.level_of(x[j], lanes, lane, top)
    else:
        for j in range(levels.size):
            levels[j] = clip(nearest_int((x[j] + least) / d), int32(0), int32(top))


@inlined
def affine_6_bit(x: Floats, lanes: Floats, lane: Any, top: Any, levels: Bytes, block: Bytes) -> None:
    """The head of a q4_k or q5_k super-block `x` [256]: d, dmin, 8 scales and 8 mins of 6 bits in 12 bytes.

    Scales 0..3 and mins 0..3 are the low 6 bits of bytes 0..3 and 4..7; scale and min 4 + k have their low
    4 bits in byte 8 + k, their high 2 bits on top of bytes k and 4 + k. Fills `levels` [256].
    """
    max_scale, max_min = largest_scale_and_min(lanes, lane, 8)
    per_scale = float32(63) / max_scale if max_scale > ZERO else ZERO
    per_min = float32(63) / max_min if max_min > ZERO else ZERO
    d = store_half(max_scale / float32(63), block, 0)
    dmin = store_half(max_min / float32(63), block, 2)
    head = block[4:16]
    for j in range(8):
        scale = min(63, nearest_int(per_scale * lanes[affine.SCALE, lane + j]) & 0xFF)
        least = min(63, nearest_int(per_min * -lanes[affine.LOW, lane + j]) & 0xFF)
        if j < 4:
            head[j] = scale
            head[j + 4] = least
        else:
            head[j + 4] = (scale & 15) | (least & 15) << 4
            head[j - 4] |= scale >> 4 << 6
            head[j] |= least >> 4 << 6
        part = slice(32 * j, 32 * j + 32)
        level_affine(x[part], lanes, lane + j, d * float32(scale), dmin * float32(least), top, levels[part])


@inlined
def affine_4_bit(x: Floats, lanes: Floats, lane: Any, top: Any, levels: Bytes, block: Bytes) -> None:
    """The scales of a q2_k super-block `x` [256]: 16 bytes, scale in the low 4 bits, min in the high 4;
    d and dmin in bytes 80..83. Fills `levels` [256]."""
    max_scale, max_min = largest_scale_and_min(lanes, lane, 16)
    per_scale = float32(15) / max_scale if max_scale > ZERO else ZERO
    per_min = float32(15) / max_min if max_min > ZERO else ZERO
    d = store_half(max_scale / float32(15), block, 80)
    dmin = store_half(max_min / float32(15), block, 82)
    for j in range(16):
        scale = nearest_int(per_scale * lanes[affine.SCALE, lane + j])
        least = nearest_int(per_min * -lanes[affine.LOW, lane + j])
        both = uint8((scale | least << 4) & 0xFF)
        block[j] = both
        part = slice(16 * j, 16 * j + 16)
        level_affine(
            x[part], lanes, lane + j, d * float32(both & 15), dmin * float32(both >> 4), top, levels[part]
        )


@inlined
def largest_scale(lanes: Floats, lane: Any) -> Any:
    """Of 16 sub-blocks, the scale of the largest magnitude, with its sign."""
    largest = ZERO
    for j in range(lane, lane + 16):
        scale = lanes[symmetric.SCALE, j]
        largest = scale if abs(scale) > abs(largest) else largest
    return largest


@inlined
def symmetric_8_bit(x: Floats, lanes: Floats, lane: Any, levels: Bytes, block: Bytes) -> None:
    """The scales of a q6_k super-block `x` [256]: 16 signed bytes from byte 192, then d.

    Fills `levels` [256].
    """
    largest = largest_scale(lanes, lane)
    if abs(largest) < NOTHING:
        block[192:210] = 0
        levels[:] = 0
        return
    per_scale = float32(-128) / largest
    d = store_half(ONE / per_scale, block, 208)
    for j in range(16):
        scale = int8(min(127, nearest_int(per_scale * lanes[symmetric.SCALE, lane + j])))
        block[192 + j] = uint8(scale)
        step = d * float32(scale)
        for k in range(16 * j, 16 * j + 16):
            if step == ZERO:
                levels[k] = symmetric.level_of(x[k], lanes, lane + j, float32(32))
            else:
                levels[k] = clip(nearest_int(x[k] / step), int32(-32), int32(31)) + 32


@inlined
def symmetric_6_bit(x: Floats, blocks: Floats, lanes: Floats, lane: Any, levels: Bytes, block: Bytes) -> None:
    """The scales of a q3_k super-block `x` [256]: 16 of 6 bits, plus 32, in 12 bytes from byte 96, then d.

    Byte k of the first 8 holds the low 4 bits of scales k and 8 + k; byte 8 + k, k < 4, the high 2 bits of
    scales k, 4 + k, 8 + k and 12 + k. Fills `levels` [256].
    """
    largest = largest_scale(lanes, lane)
    per_scale = float32(-32) / largest if largest != ZERO else ZERO
    d = store_half(ONE / per_scale if largest != ZERO else ZERO, block, 108)
    head = block[96:108]
    head[:] = 0
    for j in range(16):
        # ggml leaves the 12 bytes 0, which reads as scale -32, when the super-block is all zero.
        scale = int8(nearest_int(per_scale * lanes[symmetric.SCALE, lane + j]))
        stored = clip(int32(scale), int32(-32), int32(31)) + 32 if largest != ZERO else 0
        head[j % 8] |= (stored & 15) << (j // 8 * 4)
        head[8 + j % 4] |= stored >> 4 << (j // 4 * 2)
        step = d * float32(stored - 32)
        for k in range(16):
            if step == ZERO:
                silent = lanes[symmetric.SIZE, lane + j] < NOTHING
                levels[16 * j + k] = 0 if silent else int32(blocks[LEVEL, k, lane + j]) + 4
            else:
                levels[16 * j + k] = clip(nearest_int(x[16 * j + k] / step), int32(-4), int32(3)) + 4


@inlined
def pack_2_bits(levels: Bytes, out: Bytes) -> None:
    """256 levels to 64 bytes: of each half, byte k holds the low 2 bits of levels k, 32+k, 64+k, 96+k."""
    for half_start in range(0, SUPER, 128):
        for k in range(32):
            at = half_start + k
            out[half_start // 4 + k] = (
                (levels[at] & 3)
                | (levels[at + 32] & 3) << 2
                | (levels[at + 64] & 3) << 4
                | (levels[at + 96] & 3) << 6
            )


@inlined
def pack_4_bits(levels: Bytes, out: Bytes) -> None:
    """256 levels to 128 bytes: of each quarter, byte k holds the low 4 bits of levels k and 32+k."""
    for quarter in range(4):
        for k in range(32):
            at = 64 * quarter + k
            out[32 * quarter + k] = (levels[at] & 15) | (levels[at + 32] & 15) << 4


@inlined
def pack_high_bit(levels: Bytes, bit: Any, out: Bytes) -> None:
    """One bit of each of 256 levels to 32 bytes: bit j of byte k is that of level 32 j + k."""
    for k in range(32):
        packed = uint8(0)
        for j in range(8):
            packed |= (levels[32 * j + k] >> bit & 1) << j
        out[k] = packed


@inlined
def pack_4_and_2_bits(levels: Bytes, low: Bytes, high: Bytes) -> None:
    """256 levels of 6 bits: the low 4 to 128 bytes, the high 2 to 64 bytes.

    Of each half, low byte k holds levels k and 64+k, k < 64; high byte k levels k, 32+k, 64+k, 96+k.
    """
    for side in range(2):
        for k in range(64):
            at = 128 * side + k
            low[64 * side + k] = (levels[at] & 15) | (levels[at + 64] & 15) << 4
        for k in range(32):
            at = 128 * side + k
            high[32 * side + k] = (
                levels[at] >> 4
                | levels[at + 32] >> 4 << 2
                | levels[at + 64] >> 4 << 4
                | levels[at + 96] >> 4 << 6
            )
