"""The searches for x ~ scale * level, level in -top..top-1: q6_k and q3_k.

ggml's make_qx_quants and make_q3_quants. Both weigh a value by its square and start from the range in which
the value of the largest magnitude becomes level -top. q6_k tries 18 ranges around it; q3_k moves one level
at a time, as long as the fit improves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, int32

from converters.gguf.kernels.compile import inlined
from converters.gguf.kernels.kq_lanes import (
    INFINITE,
    LANES,
    LEVEL,
    NOTHING,
    ONE,
    ZERO,
    Floats,
    W,
    X,
    nearest_level,
    nearest_level_of_small,
    select,
)

# The rows of `lanes` [ROWS, LANES]: one number for each sub-block.
SCALE, BEST = 0, 1  # the best scale so far, and how well it fits
INVERSE = 2  # its levels are those nearest to INVERSE * x
PEAK, SIZE = 3, 4  # the value of the largest magnitude, the first of several; its magnitude
TRY_INVERSE, SUM_LX, SUM_LL = 5, 6, 7  # of the try at hand; the sums are weighted
STEP = 8  # what the packed bytes say: a value is STEP * (level - top)
ROWS = 9

TRIES = (0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9)  # tenths of a level
FEW = 16  # sub-blocks that are looked at together for levels to move
NONE_YET = float32(-np.inf)  # as BEST: the first try is kept, whatever it is


@inlined
def weigh_by_square(blocks: Floats) -> None:
    """The weights of q6_k and q3_k: x * x."""
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            blocks[W, j, i] = blocks[X, j, i] * blocks[X, j, i]


@inlined
def search_scale(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Find lanes[SCALE] and blocks[LEVEL] of each sub-block blocks[X], weighted by blocks[W].

    `top` is float32.
    """
    _measure(blocks, lanes)
    for i in range(LANES):
        lanes[BEST, i] = NONE_YET
    for t in TRIES:
        for i in range(LANES):
            lanes[TRY_INVERSE, i] = -(top + float32(0.1) * float32(t)) / lanes[PEAK, i]
        _sum(blocks, lanes, top)
        for i in range(LANES):
            lx, ll = lanes[SUM_LX, i], lanes[SUM_LL, i]
            scale = select(ll == ZERO, ZERO, lx / ll)
            better = (ll > ZERO) & (lx * lx > lanes[BEST, i] * ll)
            better |= lanes[BEST, i] == NONE_YET
            lanes[INVERSE, i] = select(better, lanes[TRY_INVERSE, i], lanes[INVERSE, i])
            lanes[SCALE, i] = select(better, scale, lanes[SCALE, i])
            lanes[BEST, i] = select(better, scale * lx, lanes[BEST, i])
    _level(blocks, lanes, top)


@inlined
def refine_levels(blocks: Floats, lanes: Floats, top: Any) -> None:
    """The same for q3_k.

    Five rounds at most; in each, a level moves where the other levels' best scale would have it elsewhere
    and the fit, (sum w l x)^2 / sum w l l, improves.
    """
    _measure(blocks, lanes)
    for i in range(LANES):
        lanes[TRY_INVERSE, i] = -top / lanes[PEAK, i]
        lanes[INVERSE, i] = lanes[TRY_INVERSE, i]
    _sum(blocks, lanes, top)
    _level(blocks, lanes, top)
    for _ in range(5):
        if not _move_levels(blocks, lanes, top):
            break
    for i in range(LANES):
        lx, ll = lanes[SUM_LX, i], lanes[SUM_LL, i]
        lanes[SCALE, i] = select(ll > ZERO, lx / ll, ZERO)


@inlined
def level_anew(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Level the values as they will be read, as lanes[STEP] * (level - top), into blocks[LEVEL].

    Where a step rounded to 0, the levels of the search stay, as in ggml, and 0 in an all-zero sub-block:
    they have no meaning, but they are in the file.
    """
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            level = nearest_level(blocks[X, j, i] / lanes[STEP, i], -top, top - ONE) + top
            old = select(lanes[PEAK, i] == INFINITE, ZERO, blocks[LEVEL, j, i] + top)
            blocks[LEVEL, j, i] = select(lanes[STEP, i] == ZERO, old, level)


@inlined
def _move_levels(blocks: Floats, lanes: Floats, top: Any) -> Any:
    """Move each level where it pays; gives whether any moved."""
    moved = int32(0)
    for j in range(blocks.shape[1]):
        for start in range(0, LANES, FEW):
            # Few levels want to move, in the later rounds hardly any: most of the work is to see that.
            restless = int32(0)
            for i in range(start, start + FEW):
                lx, ll, target = _target(blocks, lanes, j, i, top)
                restless |= select((lx > ZERO) & (target != blocks[LEVEL, j, i]), int32(1), int32(0))
            if restless == 0:
                continue
            for i in range(start, start + FEW):
                x, w, level = blocks[X, j, i], blocks[W, j, i], blocks[LEVEL, j, i]
                sum_lx, sum_ll = lanes[SUM_LX, i], lanes[SUM_LL, i]
                lx, ll, target = _target(blocks, lanes, j, i, top)
                worth = (lx > ZERO) & (target != level)
                lx += w * x * target
                ll += w * target * target
                better = worth & (ll > ZERO) & (lx * lx * sum_ll > sum_lx * sum_lx * ll)
                blocks[LEVEL, j, i] = select(better, target, level)
                lanes[SUM_LX, i] = select(better, lx, sum_lx)
                lanes[SUM_LL, i] = select(better, ll, sum_ll)
                moved |= select(better, int32(1), int32(0))
    return moved != 0


@inlined
def _target(blocks: Floats, lanes: Floats, j: Any, i: Any, top: Any) -> Any:
    """The sums without value j, and the level that their best scale gives it."""
    x, w, level = blocks[X, j, i], blocks[W, j, i], blocks[LEVEL, j, i]
    lx = lanes[SUM_LX, i] - w * x * level
    ll = lanes[SUM_LL, i] - w * level * level
    return lx, ll, nearest_level(x * ll / lx, -top, top - ONE)


@inlined
def _measure(blocks: Floats, lanes: Floats) -> None:
    """The value of the largest magnitude.

    An all-zero sub-block gets an infinite one: its levels, and so its sums, are 0 in every try.
    """
    for i in range(LANES):
        lanes[SIZE, i] = ZERO
        lanes[PEAK, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            x = blocks[X, j, i]
            larger = abs(x) > lanes[SIZE, i]
            lanes[PEAK, i] = select(larger, x, lanes[PEAK, i])
            lanes[SIZE, i] = select(larger, abs(x), lanes[SIZE, i])
    for i in range(LANES):
        lanes[PEAK, i] = select(lanes[SIZE, i] < NOTHING, INFINITE, lanes[PEAK, i])


@inlined
def _sum(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Sum w l x and w l l over the levels of the try."""
    for i in range(LANES):
        lanes[SUM_LX, i] = ZERO
        lanes[SUM_LL, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            x, w = blocks[X, j, i], blocks[W, j, i]
            level = nearest_level_of_small(lanes[TRY_INVERSE, i] * x, -top, top - ONE)
            lanes[SUM_LX, i] += w * x * level
            lanes[SUM_LL, i] += w * level * level


@inlined
def _level(blocks: Floats, lanes: Floats, top: Any) -> None:
    """The levels of the best try, or of the first."""
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            v = lanes[INVERSE, i] * blocks[X, j, i]
            blocks[LEVEL, j, i] = nearest_level_of_small(v, -top, top - ONE)
