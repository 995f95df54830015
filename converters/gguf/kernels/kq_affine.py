"""The search for x ~ scale * level + low, level in 0..top and low <= 0: q2_k, q4_k and q5_k.

ggml's make_qkx2_quants: start from the plain range; then, for each of `steps` stretched ranges, level the
values, solve scale and low by weighted least squares, and keep the pair whose error is the smallest. Each
try starts from the best pair so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, int32

from converters.gguf.kernels.compile import inlined
from converters.gguf.kernels.kq_lanes import (
    LANES,
    LEVEL,
    ONE,
    ZERO,
    Floats,
    W,
    X,
    clip,
    nearest,
    nearest_int,
)

# The rows of `lanes` [ROWS, LANES]: one number for each sub-block.
SCALE, LOW, BEST = 0, 1, 2  # the best pair so far, and its error
INVERSE, OFFSET = 3, 4  # its levels are those nearest to INVERSE * (x - OFFSET)
LOWEST, HIGHEST, SUM_W, SUM_WX = 5, 6, 7, 8  # of the values
TRY_INVERSE, SUM_WL, SUM_WLL, SUM_WLX = 9, 10, 11, 12  # of the try at hand
TRY_SCALE, TRY_LOW, ERROR = 13, 14, 15
ROWS = 16

NOT_A_NUMBER = float32(np.nan)
IN_RANGE = float32(4e6)  # below it `nearest` is `nearest_int`


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
    """Find lanes[SCALE] and lanes[LOW] of each sub-block in blocks[X], weighted by blocks[W].

    `top` is the highest level; try number t of `steps` stretches the levels to top + stretch + step * t;
    the error is the weighted sum of |difference| when `absolute`, else of its square. All but `steps` and
    `absolute` float32. blocks[LEVEL] is overwritten.
    """
    _measure(blocks, lanes)
    _start(blocks, lanes, top, absolute)
    for t in range(steps):
        stretched = stretch + step * float32(t) + top
        outside = int32(0)
        for i in range(LANES):
            lanes[TRY_INVERSE, i] = stretched / (lanes[HIGHEST, i] - lanes[LOW, i])
            outside |= int32(0) if _in_range(lanes, i) else int32(1)
        _sum(blocks, lanes, top)
        if outside != 0:
            _sum_exactly(blocks, lanes, top)
        _solve(lanes)
        _sum_error(blocks, lanes, absolute)
        _keep_better(lanes)


@inlined
def level_of(x: Any, lanes: Floats, lane: Any, top: Any) -> Any:
    """The level (int32) that the search gave to value `x` of a sub-block."""
    return clip(nearest_int(lanes[INVERSE, lane] * (x - lanes[OFFSET, lane])), int32(0), int32(top))


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
            lanes[LOWEST, i] = x if x < lanes[LOWEST, i] else lanes[LOWEST, i]
            lanes[HIGHEST, i] = x if x > lanes[HIGHEST, i] else lanes[HIGHEST, i]
            lanes[SUM_W, i] += blocks[W, j, i]
            lanes[SUM_WX, i] += blocks[W, j, i] * x


@inlined
def _start(blocks: Floats, lanes: Floats, top: Any, absolute: Any) -> None:
    """The plain range, from the lowest value (or 0 when all are positive) to the highest, and its error."""
    for i in range(LANES):
        low = ZERO if lanes[LOWEST, i] > ZERO else lanes[LOWEST, i]
        flat = lanes[HIGHEST, i] == low
        # A flat sub-block has scale 0 and levels 0. Any other range keeps its levels at 0 in every try, and
        # sums of 0 make every try unsolvable.
        lanes[HIGHEST, i] = ONE if flat else lanes[HIGHEST, i]
        lanes[SUM_W, i] = ZERO if flat else lanes[SUM_W, i]
        lanes[SUM_WX, i] = ZERO if flat else lanes[SUM_WX, i]
        inverse = top / (lanes[HIGHEST, i] - low)
        lanes[INVERSE, i] = inverse
        lanes[OFFSET, i] = low
        lanes[SCALE, i] = ZERO if flat else ONE / inverse
        lanes[LOW, i] = low
        lanes[BEST, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            x = blocks[X, j, i]
            level = float32(level_of(x, lanes, i, top))
            error = lanes[SCALE, i] * level + lanes[LOW, i] - x
            lanes[BEST, i] += blocks[W, j, i] * (abs(error) if absolute else error * error)


@inlined
def _in_range(lanes: Floats, i: Any) -> Any:
    """Whether every value levels to less than 2^22 before clipping, so that float32 rounds as ggml does."""
    inverse, low = lanes[TRY_INVERSE, i], lanes[LOW, i]
    above = abs(inverse * (lanes[HIGHEST, i] - low))
    below = abs(inverse * (lanes[LOWEST, i] - low))
    return (above < IN_RANGE) & (below < IN_RANGE)


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
            level = clip(nearest(lanes[TRY_INVERSE, i] * (x - lanes[LOW, i])), ZERO, top)
            blocks[LEVEL, j, i] = level
            weighted = blocks[W, j, i] * level
            lanes[SUM_WL, i] += weighted
            lanes[SUM_WLL, i] += weighted * level
            lanes[SUM_WLX, i] += weighted * x


@inlined
def _sum_exactly(blocks: Floats, lanes: Floats, top: Any) -> None:
    """The same for the sub-blocks (of denormals, of huge numbers) that float32 cannot level as ggml does."""
    for i in range(LANES):
        if _in_range(lanes, i):
            continue
        wl = wll = wlx = ZERO
        for j in range(blocks.shape[1]):
            x = blocks[X, j, i]
            v = lanes[TRY_INVERSE, i] * (x - lanes[LOW, i])
            level = float32(clip(nearest_int(v), int32(0), int32(top)))
            blocks[LEVEL, j, i] = level
            weighted = blocks[W, j, i] * level
            wl += weighted
            wll += weighted * level
            wlx += weighted * x
        lanes[SUM_WL, i], lanes[SUM_WLL, i], lanes[SUM_WLX, i] = wl, wll, wlx


@inlined
def _solve(lanes: Floats) -> None:
    """Scale and low by weighted least squares; a low above 0 becomes 0."""
    for i in range(LANES):
        w, wx = lanes[SUM_W, i], lanes[SUM_WX, i]
        wl, wll, wlx = lanes[SUM_WL, i], lanes[SUM_WLL, i], lanes[SUM_WLX, i]
        determinant = w * wll - wl * wl
        scale = (w * wlx - wx * wl) / determinant
        low = (wll * wx - wl * wlx) / determinant
        scale = wlx / wll if low > ZERO else scale
        # Not solvable: the error becomes NaN, which is less than nothing.
        lanes[TRY_SCALE, i] = scale if determinant > ZERO else NOT_A_NUMBER
        lanes[TRY_LOW, i] = ZERO if low > ZERO else low


@inlined
def _sum_error(blocks: Floats, lanes: Floats, absolute: Any) -> None:
    """The weighted error of the try."""
    for i in range(LANES):
        lanes[ERROR, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            error = lanes[TRY_SCALE, i] * blocks[LEVEL, j, i] + lanes[TRY_LOW, i] - blocks[X, j, i]
            lanes[ERROR, i] += blocks[W, j, i] * (abs(error) if absolute else error * error)


@inlined
def _keep_better(lanes: Floats) -> None:
    """Keep the try where its error is the smallest so far; the next try starts from its low."""
    for i in range(LANES):
        better = lanes[ERROR, i] < lanes[BEST, i]
        lanes[INVERSE, i] = lanes[TRY_INVERSE, i] if better else lanes[INVERSE, i]
        lanes[OFFSET, i] = lanes[LOW, i] if better else lanes[OFFSET, i]
        lanes[SCALE, i] = lanes[TRY_SCALE, i] if better else lanes[SCALE, i]
        lanes[LOW, i] = lanes[TRY_LOW, i] if better else lanes[LOW, i]
        lanes[BEST, i] = lanes[ERROR, i] if better else lanes[BEST, i]
