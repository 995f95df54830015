"""The search for x ~ scale * level + low, level in 0..top and low <= 0: q2_k, q4_k and q5_k.

ggml's make_qkx2_quants: start from the plain range; then, for each of `steps` stretched ranges, level the
values, solve scale and low by weighted least squares, and keep the pair whose error is the smallest. Each
try starts from the best pair so far. All variables but sizes are vectors: one number for each sub-block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, int32

from converters.gguf.kernels.kq_lanes import (
    LANES,
    LEVEL,
    ONE,
    ZERO,
    Bytes,
    Floats,
    W,
    X,
    clip,
    nearest_ints,
    nearest_levels,
)
from converters.gguf.kernels.vectors import WIDTH, load, magnitude, root, select, store, vector
from dsconvert.compile import inlined

# The rows of `lanes` [ROWS, LANES]: one number for each sub-block.
SCALE, LOW = 0, 1  # the best pair
INVERSE, OFFSET = 2, 3  # its levels are those nearest to INVERSE * (x - OFFSET)
STEP, LEAST = 4, 5  # what the packed bytes say: a value is STEP * level - LEAST
ROWS = 6

NOT_A_NUMBER = float32(np.nan)


@inlined
def weigh_by_size(blocks: Floats) -> None:
    """The weights of q2_k: |x|."""
    for j in range(blocks.shape[1]):
        for i in range(0, LANES, WIDTH):
            store(blocks, (W, j, i), magnitude(load(blocks, (X, j, i))))


@inlined
def weigh_by_mean_and_size(blocks: Floats) -> None:
    """The weights of q4_k and q5_k: the root mean square of the sub-block, plus |x|."""
    size = blocks.shape[1]
    for i in range(0, LANES, WIDTH):
        squares = vector(ZERO)
        for j in range(size):
            x = load(blocks, (X, j, i))
            squares += x * x
        mean = root(squares / float32(size))
        for j in range(size):
            store(blocks, (W, j, i), mean + magnitude(load(blocks, (X, j, i))))


@inlined
def search_scale_and_low(
    blocks: Floats, lanes: Floats, top: Any, stretch: Any, step: Any, steps: Any, absolute: Any
) -> None:
    """Find lanes[SCALE] and lanes[LOW] of each sub-block blocks[X], weighted by blocks[W].

    `top` is the highest level; try number t of `steps` stretches the levels to top + stretch + step * t;
    the error is the weighted sum of |difference| when `absolute`, else of its square. All but `steps` and
    `absolute` float32. lanes[INVERSE] and lanes[OFFSET] then say the levels.
    """
    for i in range(0, LANES, WIDTH):
        lowest, highest, w, wx = _measure(blocks, i)
        # The plain range, from the lowest value (or 0 when all are positive) to the highest.
        low = select(lowest > ZERO, ZERO, lowest)
        flat = highest == low
        # A flat sub-block has scale 0 and levels 0. Any other range keeps its levels at 0 in every try, and
        # sums of 0 make every try unsolvable.
        highest, w, wx = select(flat, ONE, highest), select(flat, ZERO, w), select(flat, ZERO, wx)
        inverse, offset = top / (highest - low), low
        scale = select(flat, ZERO, ONE / inverse)
        _sum(blocks, i, inverse, low, top)
        best = _error(blocks, i, scale, low, absolute)
        for t in range(steps):
            stretched = stretch + step * float32(t) + top
            try_inverse = stretched / (highest - low)
            try_scale, try_low = _solve(w, wx, *_sum(blocks, i, try_inverse, low, top))
            error = _error(blocks, i, try_scale, try_low, absolute)
            better = error < best
            best = select(better, error, best)
            inverse, offset = select(better, try_inverse, inverse), select(better, low, offset)
            scale, low = select(better, try_scale, scale), select(better, try_low, low)
        store(lanes, (SCALE, i), scale)
        store(lanes, (LOW, i), low)
        store(lanes, (INVERSE, i), inverse)
        store(lanes, (OFFSET, i), offset)


@inlined
def _measure(blocks: Floats, i: Any) -> Any:
    """The lowest and highest value, the sum of weights and the weighted sum of values."""
    lowest = highest = load(blocks, (X, 0, i))
    w = load(blocks, (W, 0, i))
    wx = w * lowest
    for j in range(1, blocks.shape[1]):
        x, weight = load(blocks, (X, j, i)), load(blocks, (W, j, i))
        lowest = select(x < lowest, x, lowest)
        highest = select(x > highest, x, highest)
        w += weight
        wx += weight * x
    return lowest, highest, w, wx


@inlined
def _sum(blocks: Floats, i: Any, inverse: Any, low: Any, top: Any) -> Any:
    """Level the values into blocks[LEVEL], and sum w l, w l l and w l x."""
    wl = wll = wlx = vector(ZERO)
    for j in range(blocks.shape[1]):
        x = load(blocks, (X, j, i))
        level = nearest_levels(inverse * (x - low), ZERO, top)
        store(blocks, (LEVEL, j, i), level)
        weighted = load(blocks, (W, j, i)) * level
        wl += weighted
        wll += weighted * level
        wlx += weighted * x
    return wl, wll, wlx


@inlined
def _solve(w: Any, wx: Any, wl: Any, wll: Any, wlx: Any) -> Any:
    """Scale and low by weighted least squares; a low above 0 becomes 0."""
    determinant = w * wll - wl * wl
    scale = (w * wlx - wx * wl) / determinant
    low = (wll * wx - wl * wlx) / determinant
    scale = select(low > ZERO, wlx / wll, scale)
    # Not solvable: the error becomes NaN, which is less than nothing.
    return select(determinant > ZERO, scale, NOT_A_NUMBER), select(low > ZERO, ZERO, low)


@inlined
def _error(blocks: Floats, i: Any, scale: Any, low: Any, absolute: Any) -> Any:
    """The weighted error of the levels blocks[LEVEL]."""
    total = vector(ZERO)
    for j in range(blocks.shape[1]):
        error = scale * load(blocks, (LEVEL, j, i)) + low - load(blocks, (X, j, i))
        total += load(blocks, (W, j, i)) * (magnitude(error) if absolute else error * error)
    return total


@inlined
def level_as_searched(x: Floats, lanes: Floats, top: Any, levels: Bytes) -> None:
    """The levels of the search: x [n, size] to bytes [n, size], a row for each sub-block."""
    for n in range(x.shape[0]):
        _level_row(x, n, lanes, top, levels)


@inlined
def level_anew(x: Floats, lanes: Floats, top: Any, levels: Bytes) -> None:
    """The levels of the values as they will be read, lanes[STEP] * level - lanes[LEAST]: [n, size] to bytes.

    Where a step rounded to 0, the levels of the search stay, as in ggml: they have no meaning, but they are
    in the file.
    """
    for n in range(x.shape[0]):
        step, least = lanes[STEP, n], lanes[LEAST, n]
        if step == ZERO:
            _level_row(x, n, lanes, top, levels)
            continue
        for j in range(0, x.shape[1], WIDTH):
            level = nearest_ints((load(x, (n, j)) + least) / step)
            store(levels, (n, j), clip(level, int32(0), int32(top)))


@inlined
def _level_row(x: Floats, n: Any, lanes: Floats, top: Any, levels: Bytes) -> None:
    for j in range(0, x.shape[1], WIDTH):
        level = nearest_ints(lanes[INVERSE, n] * (load(x, (n, j)) - lanes[OFFSET, n]))
        store(levels, (n, j), clip(level, int32(0), int32(top)))
