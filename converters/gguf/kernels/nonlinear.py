"""iq4_nl and iq4_xs: 16 fixed values, closer to each other near zero, times a scale.

    iq4_nl   18 bytes   32 values: f16 d; 16 bytes of levels       x = d * VALUES[level]
    iq4_xs  136 bytes  256 values: f16 d; 2 bytes with the high 2 bits of 8 scales, 4 with the low 4 bits;
                       128 bytes of levels                         x = d * (scale - 32) * VALUES[level]

ggml's quantize_row_iq4_nl_impl: 15 ranges are tried for each sub-block of 32, weighted by x * x or by an
importance matrix. Every kernel takes float32 [n_rows, n_cols], `importance` float32 [n_cols] or [0] for none,
and fills uint8 [n_rows, bytes]. Pure, and free of locks. Importing this module imports numba.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy import float32, int32, uint8

from converters.gguf.kernels import weighted_lanes as weighted
from converters.gguf.kernels.kq_lanes import (
    LANES,
    NOTHING,
    ONE,
    ORDER,
    SUPER,
    ZERO,
    Bytes,
    Floats,
    W,
    X,
    clip,
    gather,
    nearest_int,
)
from converters.gguf.kernels.kq_pack import store_half
from converters.gguf.kernels.kq_symmetric import NOTHING_FITS, SCALE, peak_of
from converters.gguf.kernels.vectors import WIDTH, load, magnitude, select, store, vector
from converters.gguf.kernels.weighted_blocks import put_nibbles
from dsconvert.compile import inlined, kernel

SIZE = 32  # values in a sub-block
VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
TRIES = (-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)  # added to the first of VALUES


def _edges(values: Floats) -> Floats:
    """The least float32 that ggml takes to the upper of each two neighbours, by float32 distances.

    A bisection: its own comparison of rounded distances is monotone, but changes a little off the middle.
    """
    edges = []
    for low, high in pairwise(values):
        below, above = low, high
        while (middle := float32((below + above) / 2)) not in (below, above):
            below, above = (middle, above) if middle - low < high - middle else (below, middle)
        edges.append(above)
    return np.array(edges, dtype=np.float32)


EDGES = _edges(VALUES)


@inlined
def nearest_value(v: Any) -> Any:
    """The one of VALUES nearest to each number of a vector; the last for what is not a number."""
    value = vector(VALUES[0])
    for k in range(len(EDGES)):
        value = select(v < EDGES[k], value, VALUES[k + 1])
    return value


@inlined
def nearest_level(v: Any) -> Any:
    """The number of the nearest of VALUES; the last for what is not a number."""
    level = 0
    for k in range(len(EDGES)):
        level += 0 if v < EDGES[k] else 1
    return level


@inlined
def weigh(rows: Floats, importance: Floats, first: Any, count: Any, sums: Floats, blocks: Floats) -> None:
    """The weights of the sub-blocks in blocks[X], of `count` those from `first` on, `rows` their blocks."""
    if importance.size == 0:
        for j in range(SIZE):
            for i in range(LANES):
                blocks[W, j, i] = blocks[X, j, i] * blocks[X, j, i]
        return
    weighted.sum_squares(rows, sums)
    weighted.gather_importance(importance, first, count, blocks)
    per = rows.shape[1] // SIZE
    for lane in range(min(LANES, len(rows) * per)):
        spread = sums[lane // per] * float32(float32(2) / float32(rows.shape[1]))
        for j in range(SIZE):
            x = blocks[X, j, lane]
            blocks[W, j, lane] *= np.sqrt(spread + x * x)


@inlined
def search_scale(blocks: Floats, lanes: Floats) -> None:
    """Find lanes[SCALE] with x ~ scale * value for each sub-block blocks[X], weighted by blocks[W]."""
    for i in range(0, LANES, WIDTH):
        peak = peak_of(blocks, i)
        lx, ll = _sum_values(blocks, i, ONE / (peak / -VALUES[0]))
        scale = select(ll > ZERO, lx / ll, ZERO)
        best = scale * lx
        for t in TRIES:
            lx, ll = _sum_values(blocks, i, (VALUES[0] + float32(t)) / peak)
            better = select(ll > ZERO, lx * lx, NOTHING_FITS) > best * ll
            scale = select(better, lx / ll, scale)
            best = select(better, scale * lx, best)
        store(lanes, (SCALE, i), select(magnitude(peak) < NOTHING, ZERO, scale))


@inlined
def _sum_values(blocks: Floats, i: Any, inverse: Any) -> Any:
    """Sum w v x and w v v over the values nearest to inverse * x."""
    lx = ll = vector(ZERO)
    for j in range(SIZE):
        x, w = load(blocks, (X, j, i)), load(blocks, (W, j, i))
        value = nearest_value(inverse * x)
        lx += w * value * x
        ll += w * value * value
    return lx, ll


@inlined
def put_levels(x: Floats, scale: Any, levels: Bytes, out: Bytes) -> None:
    """16 bytes: the levels of a sub-block's values as they will be read."""
    inverse = ONE / scale if scale != ZERO else ZERO
    for j in range(SIZE):
        levels[j] = uint8(nearest_level(inverse * x[j]))
    put_nibbles(levels, out)


@kernel
def iq4_nl(x: Floats, importance: Floats, out: Bytes) -> None:
    """x = d * VALUES[level]."""
    rows, packed = x.reshape(-1, SIZE), out.reshape(-1, 18)
    blocks = np.empty((3, SIZE, LANES), np.float32)
    lanes = np.empty((1, LANES), np.float32)
    sums, levels = np.empty(LANES, np.float32), np.empty(SIZE, np.uint8)
    for first in range(0, len(rows), LANES):
        part, group = rows[first : first + LANES], packed[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        weigh(part, importance, first, len(rows), sums, blocks)
        search_scale(blocks, lanes)
        for n in range(len(group)):
            store_half(lanes[SCALE, n], group[n, 0:2])
            put_levels(part[n], lanes[SCALE, n], levels, group[n, 2:18])


@kernel
def iq4_xs(x: Floats, importance: Floats, out: Bytes) -> None:
    """x = d * (scale - 32) * VALUES[level]."""
    rows, packed = x.reshape(-1, SIZE), out.reshape(-1, 136)
    blocks = np.empty((3, SIZE, LANES), np.float32)
    lanes = np.empty((1, LANES), np.float32)
    sums, levels = np.empty(LANES, np.float32), np.empty(SIZE, np.uint8)
    for first in range(0, len(rows), LANES):
        part, group = rows[first : first + LANES], packed[first // 8 : (first + LANES) // 8]
        gather(part, ORDER[: len(part)], blocks)
        weigh(part.reshape(-1, SUPER), importance, first, len(rows), sums, blocks)
        search_scale(blocks, lanes)
        for n in range(len(group)):
            _pack_super(part[8 * n : 8 * n + 8], lanes[SCALE, 8 * n : 8 * n + 8], levels, group[n])


@inlined
def _pack_super(x: Floats, scales: Floats, levels: Bytes, out: Bytes) -> None:
    """d, the scales of 6 bits and the levels of a super-block x [8, 32]."""
    largest = ZERO
    for k in range(8):
        largest = scales[k] if abs(scales[k]) > abs(largest) else largest
    d = -largest / float32(32)
    store_half(d, out[0:2])
    inverse = ONE / d if d != ZERO else ZERO
    out[2:8] = 0
    for k in range(8):
        scale = clip(nearest_int(inverse * scales[k]), int32(-32), int32(31))
        put_levels(x[k], d * float32(scale), levels, out[8 + 16 * k : 24 + 16 * k])
        stored = int32(scale) + int32(32)
        out[2 + k // 4] |= uint8(stored >> 4 << k % 4 * 2)
        out[4 + k // 2] |= uint8((stored & 15) << k % 2 * 4)


KERNELS: dict[str, Callable[[Floats, Floats, Bytes], None]] = {"iq4_nl": iq4_nl, "iq4_xs": iq4_xs}
