"""The search for x ~ scale * level + low, level in 0..top and low <= 0: q2_k, q4_k and q5_k.

ggml's make_qkx2_quants: start from the plain range; then, for each of `steps` stretched ranges, level the
values, solve scale and low by weighted least squares, and keep the pair whose error is the smallest. Each
try starts from the best pair so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32

from converters.gguf.kernels.compile import inlined
from converters.gguf.kernels.kq_lanes import (
    LANES,
    LEVEL,
    ONE,
    ZERO,
    Floats,
    W,
    X,
    nearest_level,
    select,
)

# The rows of `lanes` [ROWS, LANES]: one number for each sub-block.
SCALE, LOW, BEST = 0, 1, 2  # the best pair so far, and its error
INVERSE, OFFSET = 3, 4  # its levels are those nearest to INVERSE * (x - OFFSET)
LOWEST, HIGHEST, SUM_W, SUM_WX = 5, 6, 7, 8  # of the values
TRY_INVERSE, SUM_WL, SUM_WLL, SUM_WLX = 9, 10, 11, 12  # of the try at hand
TRY_SCALE, TRY_LOW, ERROR = 13, 14, 15
STEP, LEAST = 16, 17  # what the packed bytes say: a value is STEP * level - LEAST
ROWS = 18

NOT_A_NUMBER = float32(np.nan)


@inlined
def weigh_by_size(blocks: Floats, lanes: Floats) -> None:
    """The weights of q2_k: |x|."""
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            blocks[W, j, i] = abs(blocks[X, j, i])


@inlined
def weigh_by_mean_and_size(blocks: Floats, lanes: Floats) -> None:
    """The weights of q4_k and q5_k: the root mean square of the sub-block, plus |x|."""
    size = blocks.shape[1]
    for i in range(LANES):
        lanes[SUM_W, i] = ZERO
    for j in range(size):
        for i in range(LANES):
            lanes[SUM_W, i] += blocks[X, j, i] * blocks[X, j, i]
    for i in range(LANES):
        lanes[SUM_W, i] = np.sqrt(lanes[SUM_W, i] / float32(size))
    for j in range(size):
        for i in range(LANES):
            blocks[W, j, i] = lanes[SUM_W, i] + abs(blocks[X, j, i])


@inlined
def search_scale_and_low(
    blocks: Floats, lanes: Floats, top: Any, stretch: Any, step: Any, steps: Any, absolute: Any
) -> None:
    """Find lanes[SCALE], lanes[LOW] and blocks[LEVEL] of each sub-block blocks[X], weighted by blocks[W].

    `top` is the highest level; try number t of `steps` stretches the levels to top + stretch + step * t;
    the error is the weighted sum of |difference| when `absolute`, else of its square. All but `steps` and
    `absolute` float32.
    """
    _measure(blocks, lanes)
    _start(blocks, lanes, top, absolute)
    for t in range(steps):
        stretched = stretch + step * float32(t) + top
        for i in range(LANES):
            lanes[TRY_INVERSE, i] = stretched / (lanes[HIGHEST, i] - lanes[LOW, i])
        _sum(blocks, lanes, top)
        _solve(lanes)
        _sum_error(blocks, lanes, absolute)
        _keep_better(lanes)
    _level(blocks, lanes, top)


@inlined
def level_anew(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Level the values as they will be read, as lanes[STEP] * level - lanes[LEAST], into blocks[LEVEL].

    Where a step rounded to 0, the levels of the search stay, as in ggml: they have no meaning, but they are
    in the file.
    """
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            level = nearest_level((blocks[X, j, i] + lanes[LEAST, i]) / lanes[STEP, i], ZERO, top)
            blocks[LEVEL, j, i] = select(lanes[STEP, i] == ZERO, blocks[LEVEL, j, i], level)


@inlined
def _measure(blocks: Floats, lanes: Floats) -> None:
    """The lowest and highest value, the sum of weights and the weighted sum of values."""
    for i in range(LANES):
        lanes[LOWEST, i] = blocks[X, 0, i]
        lanes[HIGHEST, i] = blocks[X, 0, i]
        lanes[SUM_W, i] = blocks[W, 0, i]
        lanes[SUM_WX, i] = blocks[W, 0, i] * blocks[X, 0, i]
    for j in range(1, blocks.shape[1]):
        for i in range(LANES):
            x = blocks[X, j, i]
            lanes[LOWEST, i] = select(x < lanes[LOWEST, i], x, lanes[LOWEST, i])
            lanes[HIGHEST, i] = select(x > lanes[HIGHEST, i], x, lanes[HIGHEST, i])
            lanes[SUM_W, i] += blocks[W, j, i]
            lanes[SUM_WX, i] += blocks[W, j, i] * x


@inlined
def _start(blocks: Floats, lanes: Floats, top: Any, absolute: Any) -> None:
    """The plain range, from the lowest value (or 0 when all are positive) to the highest, and its error."""
    for i in range(LANES):
        low = select(lanes[LOWEST, i] > ZERO, ZERO, lanes[LOWEST, i])
        flat = lanes[HIGHEST, i] == low
        # A flat sub-block has scale 0 and levels 0. Any other range keeps its levels at 0 in every try, and
        # sums of 0 make every try unsolvable.
        lanes[HIGHEST, i] = select(flat, ONE, lanes[HIGHEST, i])
        lanes[SUM_W, i] = select(flat, ZERO, lanes[SUM_W, i])
        lanes[SUM_WX, i] = select(flat, ZERO, lanes[SUM_WX, i])
        inverse = top / (lanes[HIGHEST, i] - low)
        lanes[INVERSE, i] = inverse
        lanes[OFFSET, i] = low
        lanes[SCALE, i] = select(flat, ZERO, ONE / inverse)
        lanes[LOW, i] = low
        lanes[BEST, i] = ZERO
    _level(blocks, lanes, top)
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            error = lanes[SCALE, i] * blocks[LEVEL, j, i] + lanes[LOW, i] - blocks[X, j, i]
            lanes[BEST, i] += blocks[W, j, i] * select(absolute, abs(error), error * error)


@inlined
def _level(blocks: Floats, lanes: Floats, top: Any) -> None:
    """The levels of the best pair so far."""
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            v = lanes[INVERSE, i] * (blocks[X, j, i] - lanes[OFFSET, i])
            blocks[LEVEL, j, i] = nearest_level(v, ZERO, top)


@inlined
def _sum(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Level the values, and sum w l, w l l and w l x."""
    for i in range(LANES):
        lanes[SUM_WL, i] = ZERO
        lanes[SUM_WLL, i] = ZERO
        lanes[SUM_WLX, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            x = blocks[X, j, i]
            level = nearest_level(lanes[TRY_INVERSE, i] * (x - lanes[LOW, i]), ZERO, top)
            blocks[LEVEL, j, i] = level
            weighted = blocks[W, j, i] * level
            lanes[SUM_WL, i] += weighted
            lanes[SUM_WLL, i] += weighted * level
            lanes[SUM_WLX, i] += weighted * x


@inlined
def _solve(lanes: Floats) -> None:
    """Scale and low by weighted least squares; a low above 0 becomes 0."""
    for i in range(LANES):
        w, wx = lanes[SUM_W, i], lanes[SUM_WX, i]
        wl, wll, wlx = lanes[SUM_WL, i], lanes[SUM_WLL, i], lanes[SUM_WLX, i]
        determinant = w * wll - wl * wl
        scale = (w * wlx - wx * wl) / determinant
        low = (wll * wx - wl * wlx) / determinant
        scale = select(low > ZERO, wlx / wll, scale)
        # Not solvable: the error becomes NaN, which is less than nothing.
        lanes[TRY_SCALE, i] = select(determinant > ZERO, scale, NOT_A_NUMBER)
        lanes[TRY_LOW, i] = select(low > ZERO, ZERO, low)


@inlined
def _sum_error(blocks: Floats, lanes: Floats, absolute: Any) -> None:
    """The weighted error of the try."""
    for i in range(LANES):
        lanes[ERROR, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            error = lanes[TRY_SCALE, i] * blocks[LEVEL, j, i] + lanes[TRY_LOW, i] - blocks[X, j, i]
            lanes[ERROR, i] += blocks[W, j, i] * select(absolute, abs(error), error * error)


@inlined
def _keep_better(lanes: Floats) -> None:
    """Keep the try where its error is the smallest so far; the next try starts from its low."""
    for i in range(LANES):
        better = lanes[ERROR, i] < lanes[BEST, i]
        lanes[INVERSE, i] = select(better, lanes[TRY_INVERSE, i], lanes[INVERSE, i])
        lanes[OFFSET, i] = select(better, lanes[LOW, i], lanes[OFFSET, i])
        lanes[SCALE, i] = select(better, lanes[TRY_SCALE, i], lanes[SCALE, i])
        lanes[LOW, i] = select(better, lanes[TRY_LOW, i], lanes[LOW, i])
        lanes[BEST, i] = select(better, lanes[ERROR, i], lanes[BEST, i])
