"""The second half of a k-quant: the sub-blocks' scales as integers, and the bytes.

`block` is the bytes of one super-block, or the part of them that is named; `lane` its first sub-block's lane.
"""

from __future__ import annotations

from typing import Any

from numpy import float32, int8, int32, uint8

from converters.gguf.kernels import kq_affine as affine
from converters.gguf.kernels import kq_symmetric as symmetric
from converters.gguf.kernels.kq_lanes import (
    NOTHING,
    ONE,
    ORDER,
    ZERO,
    Bytes,
    Floats,
    Numbers,
    clip,
    gather,
    half_value,
    nearest_int,
    nearest_ints,
)
from converters.gguf.kernels.vectors import WIDTH, as_ints, load, store, to_floats, vector
from converters.gguf.kernels.widen import half
from dsconvert.compile import inlined

LOW_HALVES = 0x0F0F0F0F0F0F0F0F  # of the bytes of a word


@inlined
def store_half(value: Any, out: Bytes) -> Any:
    """Write float32 `value` as float16, low byte first; returns the value that a reader finds."""
    bits = half(value)
    out[0] = uint8(bits & 0xFF)
    out[1] = uint8(bits >> 8)
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
def largest_scale(lanes: Floats, lane: Any) -> Any:
    """Of 16 sub-blocks, the scale of the largest magnitude, with its sign."""
    largest = ZERO
    for j in range(lane, lane + 16):
        scale = lanes[symmetric.SCALE, j]
        largest = scale if abs(scale) > abs(largest) else largest
    return largest


@inlined
def pack_affine_4_bit(lanes: Floats, lane: Any, scales: Bytes, ds: Bytes) -> None:
    """16 bytes, scale in the low 4 bits and min in the high 4; d and dmin. Sets STEP and LEAST."""
    max_scale, max_min = largest_scale_and_min(lanes, lane, 16)
    per_scale = float32(15) / max_scale if max_scale > ZERO else ZERO
    per_min = float32(15) / max_min if max_min > ZERO else ZERO
    d = store_half(max_scale / float32(15), ds[0:2])
    dmin = store_half(max_min / float32(15), ds[2:4])
    for j in range(16):
        scale = nearest_int(per_scale * lanes[affine.SCALE, lane + j])
        least = nearest_int(per_min * -lanes[affine.LOW, lane + j])
        both = uint8((scale | least << 4) & 0xFF)
        scales[j] = both
        lanes[affine.STEP, lane + j] = d * float32(both & 15)
        lanes[affine.LEAST, lane + j] = dmin * float32(both >> 4)


@inlined
def pack_affine_6_bit(lanes: Floats, lane: Any, ds: Bytes, scales: Bytes) -> None:
    """d and dmin; 8 scales and 8 mins of 6 bits in 12 bytes. Sets STEP and LEAST.

    Scales 0..3 and mins 0..3 are the low 6 bits of bytes 0..3 and 4..7; scale and min 4 + k have their low
    4 bits in byte 8 + k, their high 2 bits on top of bytes k and 4 + k.
    """
    max_scale, max_min = largest_scale_and_min(lanes, lane, 8)
    per_scale = float32(63) / max_scale if max_scale > ZERO else ZERO
    per_min = float32(63) / max_min if max_min > ZERO else ZERO
    d = store_half(max_scale / float32(63), ds[0:2])
    dmin = store_half(max_min / float32(63), ds[2:4])
    for j in range(8):
        scale = min(63, nearest_int(per_scale * lanes[affine.SCALE, lane + j]) & 0xFF)
        least = min(63, nearest_int(per_min * -lanes[affine.LOW, lane + j]) & 0xFF)
        if j < 4:
            scales[j] = scale
            scales[j + 4] = least
        else:
            scales[j + 4] = (scale & 15) | (least & 15) << 4
            scales[j - 4] |= scale >> 4 << 6
            scales[j] |= least >> 4 << 6
        lanes[affine.STEP, lane + j] = d * float32(scale)
        lanes[affine.LEAST, lane + j] = dmin * float32(least)


@inlined
def find_largest_scales(lanes: Floats, count: Any, scales: Floats, blocks: Floats) -> None:
    """lanes[LARGEST]: of each of `count` super-blocks, the scale of the largest magnitude with its sign."""
    for n in range(count):
        for j in range(0, 16, WIDTH):
            store(scales, (n, j), load(lanes, (symmetric.SCALE, 16 * n + j)))
    gather(scales, ORDER[:count], blocks)
    for i in range(0, count, WIDTH):
        store(lanes, (symmetric.LARGEST, i), symmetric.peak_of(blocks, i))


@inlined
def pack_symmetric_6_bit(lanes: Floats, n: Any, numbers: Numbers, out: Bytes) -> None:
    """16 scales of 6 bits, 32 added, in 12 bytes; d. Sets STEP; `numbers` is room for 16 bytes, two words.

    Byte k of the first 8 has the low 4 bits of scales k and 8 + k; byte 8 + k, k < 4, the high 2 bits of
    scales k, 4 + k, 8 + k and 12 + k.
    """
    largest = lanes[symmetric.LARGEST, n]
    per_scale = float32(-32) / largest if largest != ZERO else ZERO
    bits = half(ONE / per_scale if largest != ZERO else ZERO)
    d = half_value(bits)
    # An all-zero super-block has 12 bytes of 0, which read as scales of -32.
    limit = int32(31) if largest != ZERO else int32(-32)
    for j in range(0, 16, WIDTH):
        scale = as_signed_bytes(nearest_ints(per_scale * load(lanes, (symmetric.SCALE, 16 * n + j))))
        scale = clip(scale, int32(-32), limit)
        store(numbers, (j // 8,), scale + int32(32))
        store(lanes, (symmetric.STEP, 16 * n + j), d * to_floats(scale))
    low = numbers[0] & LOW_HALVES | (numbers[1] & LOW_HALVES) << 4
    high = numbers[0] >> 4 & LOW_HALVES | (numbers[1] >> 4 & LOW_HALVES) << 4
    high |= high >> 30  # bits 0, 1, 4, 5 of bytes 4..7 to bits 2, 3, 6, 7 of bytes 0..3
    for k in range(8):
        out[n, 96 + k] = uint8(low >> 8 * k & 0xFF)
    for k in range(4):
        out[n, 104 + k] = uint8(high >> 8 * k & 0xFF)
    out[n, 108] = uint8(bits & 0xFF)
    out[n, 109] = uint8(bits >> 8)


@inlined
def pack_3_bit_levels(x: Floats, lanes: Floats, n: Any, out: Bytes) -> None:
    """The levels of the super-block x[16 n :] [16, 16], 4 added, in 96 bytes; its values are STEP * level.

    Bit 2 of level 32 j + k is bit j of byte k < 32; bits 0 and 1 follow as in pack_2_bits.
    """
    for k in range(0, 32, WIDTH):
        high = as_ints(vector(ZERO))
        for side in range(2):
            low = as_ints(vector(ZERO))
            for q in range(4):
                row = 16 * n + 8 * side + 2 * q + k // 16
                level = nearest_ints(load(x, (row, k % 16)) / lanes[symmetric.STEP, row])
                level = clip(level, int32(-4), int32(3)) + int32(4)
                low |= (level & int32(3)) << int32(2 * q)
                high |= (level & int32(4)) << int32(4 * side + q)
            store(out, (n, 32 + 32 * side + k), low)
        store(out, (n, k), high >> int32(2))


@inlined
def as_signed_bytes(numbers: Any) -> Any:
    """What is left of a vector of ints in signed bytes: -128..127."""
    return ((numbers + int32(128)) & int32(0xFF)) - int32(128)


@inlined
def pack_symmetric_8_bit(lanes: Floats, lane: Any, scales: Bytes, d_bytes: Bytes) -> None:
    """16 scales as signed bytes; d. Sets STEP."""
    largest = largest_scale(lanes, lane)
    nothing = abs(largest) < NOTHING
    per_scale = ZERO if nothing else float32(-128) / largest
    d = store_half(ZERO if nothing else ONE / per_scale, d_bytes)
    for j in range(16):
        scale = int8(min(127, nearest_int(per_scale * lanes[symmetric.SCALE, lane + j])))
        scales[j] = uint8(scale)
        lanes[symmetric.STEP, lane + j] = d * float32(scale)
        if nothing:
            lanes[symmetric.INVERSE, lane + j] = ZERO


@inlined
def pack_low_4_bits(levels: Bytes, out: Bytes) -> None:
    """256 levels to 128 bytes: of each quarter, byte k has the low 4 bits of levels k and 32+k."""
    for quarter in range(4):
        for k in range(32):
            at = 64 * quarter + k
            out[32 * quarter + k] = (levels[at] & 15) | (levels[at + 32] & 15) << 4


@inlined
def pack_2_bits(levels: Bytes, shift: Any, out: Bytes) -> None:
    """2 bits, from `shift` on, of 256 levels to 64 bytes: of each half, byte k has levels k, 32+k, 64+k and
    96+k, the first lowest."""
    for side in range(2):
        for k in range(32):
            at = 128 * side + k
            out[32 * side + k] = (
                (levels[at] >> shift & 3)
                | (levels[at + 32] >> shift & 3) << 2
                | (levels[at + 64] >> shift & 3) << 4
                | (levels[at + 96] >> shift & 3) << 6
            )


@inlined
def pack_1_bit(levels: Bytes, shift: Any, out: Bytes) -> None:
    """Bit `shift` of 256 levels to 32 bytes: bit j of byte k is that of level 32 j + k."""
    for k in range(32):
        packed = 0
        for j in range(8):
            packed |= (levels[32 * j + k] >> shift & 1) << j
        out[k] = packed


@inlined
def pack_low_4_bits_of_halves(levels: Bytes, out: Bytes) -> None:
    """256 levels to 128 bytes: of each half, byte k has the low 4 bits of levels k and 64+k."""
    for side in range(2):
        for k in range(64):
            at = 128 * side + k
            out[64 * side + k] = (levels[at] & 15) | (levels[at + 64] & 15) << 4
