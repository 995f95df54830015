"""The search for x ~ scale * level, level in -top..top-1: q6_k, and others with an importance matrix.

ggml's make_qx_quants: start from the range in which the peak, the value of the largest magnitude, becomes
level -top, and try 18 ranges around it. All variables but sizes are vectors: one number for each sub-block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, int32

from converters.gguf.kernels.kq_lanes import (
    INFINITE,
    LANES,
    NOTHING,
    ONE,
    ZERO,
    Bytes,
    Floats,
    W,
    X,
    clip,
    nearest_ints,
    nearest_level_of_small,
)
from converters.gguf.kernels.vectors import WIDTH, load, magnitude, select, store, vector
from dsconvert.compile import inlined

# The rows of `lanes` [ROWS, n]: one number for each sub-block.
SCALE = 0
INVERSE = 1  # its levels are those nearest to INVERSE * x; 0 where all is zero, and so are the levels' bytes
STEP = 2  # what the packed bytes say: a value is STEP * (level - top)
LARGEST = 3  # one for each super-block: of its scales, that of the largest magnitude
ROWS = 4

TRIES = (-9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9)  # tenths of a level
NOTHING_FITS = float32(-np.inf)


@inlined
def weigh_by_square(blocks: Floats) -> None:
    """The weights of q6_k: x * x."""
    for j in range(blocks.shape[1]):
        for i in range(0, LANES, WIDTH):
            x = load(blocks, (X, j, i))
            store(blocks, (W, j, i), x * x)


@inlined
def search_scale(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Find lanes[SCALE] and lanes[INVERSE] of each sub-block blocks[X], weighted by blocks[W].

    `top` is float32.
    """
    for i in range(0, LANES, WIDTH):
        peak = peak_or_infinite(blocks, i)
        inverse = -top / peak
        lx, ll = _sum_levels(blocks, i, inverse, top)
        scale = select(ll == ZERO, ZERO, lx / ll)
        best = scale * lx
        for t in TRIES:
            try_inverse = -(top + float32(0.1) * float32(t)) / peak
            lx, ll = _sum_levels(blocks, i, try_inverse, top)
            better = select(ll > ZERO, lx * lx, NOTHING_FITS) > best * ll
            inverse = select(better, try_inverse, inverse)
            scale = select(better, lx / ll, scale)
            best = select(better, scale * lx, best)
        store(lanes, (SCALE, i), scale)
        store(lanes, (INVERSE, i), inverse)


@inlined
def peak_or_infinite(blocks: Floats, i: Any) -> Any:
    """The peak; of an all-zero sub-block an infinite one: its levels, and so its sums, are 0 in every try."""
    peak = peak_of(blocks, i)
    return select(magnitude(peak) < NOTHING, INFINITE, peak)


@inlined
def peak_of(blocks: Floats, i: Any) -> Any:
    """The value of the largest magnitude, the first of several; searched in both halves at once."""
    half = blocks.shape[1] // 2
    peak = late_peak = size = late_size = vector(ZERO)
    for j in range(half):
        x, late = load(blocks, (X, j, i)), load(blocks, (X, half + j, i))
        larger, later = magnitude(x) > size, magnitude(late) > late_size
        peak, late_peak = select(larger, x, peak), select(later, late, late_peak)
        size, late_size = select(larger, magnitude(x), size), select(later, magnitude(late), late_size)
    return select(late_size > size, late_peak, peak)


@inlined
def _sum_levels(blocks: Floats, i: Any, inverse: Any, top: Any) -> Any:
    """Sum w l x and w l l over the levels of a try."""
    lx = ll = vector(ZERO)
    for j in range(blocks.shape[1]):
        x, w = load(blocks, (X, j, i)), load(blocks, (W, j, i))
        level = nearest_level_of_small(inverse * x, -top, top - ONE)
        lx += w * x * level
        ll += w * level * level
    return lx, ll


@inlined
def level_as_searched(x: Floats, lanes: Floats, top: Any, levels: Bytes) -> None:
    """The levels of the search, `top` added: x [n, size] to bytes [n, size]; `levels` were 0."""
    for n in range(x.shape[0]):
        _level_row(x, n, lanes, top, levels)


@inlined
def level_anew(x: Floats, lanes: Floats, top: Any, levels: Bytes) -> None:
    """The levels of the values as they will be read, lanes[STEP] * (level - top): x [n, size] to bytes.

    Where a step rounded to 0, the levels of the search stay, as in ggml, and 0 in an all-zero sub-block:
    they have no meaning, but they are in the file. `levels` were 0.
    """
    for n in range(x.shape[0]):
        step = lanes[STEP, n]
        if step == ZERO:
            _level_row(x, n, lanes, top, levels)
            continue
        for j in range(0, x.shape[1], WIDTH):
            level = clip(nearest_ints(load(x, (n, j)) / step), int32(-top), int32(top - ONE))
            store(levels, (n, j), level + int32(top))


@inlined
def _level_row(x: Floats, n: Any, lanes: Floats, top: Any, levels: Bytes) -> None:
    if lanes[INVERSE, n] == ZERO:
        return
    for j in range(0, x.shape[1], WIDTH):
        level = nearest_ints(lanes[INVERSE, n] * load(x, (n, j)))
        store(levels, (n, j), clip(level, int32(-top), int32(top - ONE)) + int32(top))
