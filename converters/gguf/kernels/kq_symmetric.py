"""The searches for x ~ scale * level, level in -top..top-1: q6_k and q3_k.

ggml's make_qx_quants and make_q3_quants. Both weigh a value by its square and start from the range in which
the value of the largest magnitude becomes level -top. q6_k tries 18 ranges around it; q3_k moves one level
at a time, as long as the fit improves.
"""

from __future__ import annotations

from typing import Any

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
    clip,
    nearest,
    nearest_int,
)

# The rows of `lanes` [ROWS, LANES]: one number for each sub-block.
SCALE, BEST = 0, 1  # the best scale so far, and how well it fits
INVERSE = 2  # its levels are those nearest to INVERSE * x (q6_k)
PEAK, SIZE = 3, 4  # the value of the largest magnitude, the first of several; its magnitude
TRY_INVERSE, SUM_LX, SUM_LL = 5, 6, 7  # of the try at hand; the sums are weighted
ROWS = 8


@inlined
def weigh_by_square(blocks: Floats) -> None:
    """The weights of q6_k and q3_k: x * x."""
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            blocks[W, j, i] = blocks[X, j, i] * blocks[X, j, i]


@inlined
def search_scale(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Find lanes[SCALE] of each sub-block in blocks[X], weighted by blocks[W]; `top` is float32."""
    _measure(blocks, lanes)
    for i in range(LANES):
        lanes[TRY_INVERSE, i] = -top / lanes[PEAK, i]
    _sum(blocks, lanes, top)
    for i in range(LANES):
        lx, ll = lanes[SUM_LX, i], lanes[SUM_LL, i]
        lanes[INVERSE, i] = lanes[TRY_INVERSE, i]
        lanes[SCALE, i] = ZERO if ll == ZERO else lx / ll
        lanes[BEST, i] = lanes[SCALE, i] * lx
    for t in range(-9, 10):
        if t == 0:
            continue
        for i in range(LANES):
            lanes[TRY_INVERSE, i] = -(top + float32(0.1) * float32(t)) / lanes[PEAK, i]
        _sum(blocks, lanes, top)
        for i in range(LANES):
            lx, ll = lanes[SUM_LX, i], lanes[SUM_LL, i]
            better = (ll > ZERO) & (lx * lx > lanes[BEST, i] * ll)
            scale = lx / ll
            lanes[INVERSE, i] = lanes[TRY_INVERSE, i] if better else lanes[INVERSE, i]
            lanes[SCALE, i] = scale if better else lanes[SCALE, i]
            lanes[BEST, i] = scale * lx if better else lanes[BEST, i]


@inlined
def level_of(x: Any, lanes: Floats, lane: Any, top: Any) -> Any:
    """The level that `search_scale` gave to value `x`, counted from 0 (int32)."""
    if lanes[PEAK, lane] == INFINITE:
        return int32(0)
    return int32(clip(nearest_int(lanes[INVERSE, lane] * x), int32(-top), int32(top) - 1) + int32(top))


@inlined
def refine_levels(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Find lanes[SCALE] and the levels, blocks[LEVEL], of each sub-block in blocks[X]; `top` is float32.

    Five rounds at most; in each, a level moves where the other levels' best scale would have it elsewhere
    and the fit, (sum w l x)^2 / sum w l l, improves.
    """
    _measure(blocks, lanes)
    for i in range(LANES):
        lanes[TRY_INVERSE, i] = -top / lanes[PEAK, i]
    _sum(blocks, lanes, top)
    for _ in range(5):
        if not _move_levels(blocks, lanes, top):
            break
    for i in range(LANES):
        lx, ll = lanes[SUM_LX, i], lanes[SUM_LL, i]
        lanes[SCALE, i] = lx / ll if ll > ZERO else ZERO


@inlined
def _move_levels(blocks: Floats, lanes: Floats, top: Any) -> Any:
    """Move each level where it pays; gives whether any moved."""
    moved = int32(0)
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            x, w, level = blocks[X, j, i], blocks[W, j, i], blocks[LEVEL, j, i]
            sum_lx, sum_ll = lanes[SUM_LX, i], lanes[SUM_LL, i]
            lx = sum_lx - w * x * level
            ll = sum_ll - w * level * level
            target = float32(clip(nearest_int(x * ll / lx), int32(-top), int32(top) - 1))
            worth = (lx > ZERO) & (target != level)
            lx += w * x * target
            ll += w * target * target
            better = worth & (ll > ZERO) & (lx * lx * sum_ll > sum_lx * sum_lx * ll)
            blocks[LEVEL, j, i] = target if better else level
            lanes[SUM_LX, i] = lx if better else sum_lx
            lanes[SUM_LL, i] = ll if better else sum_ll
            moved |= int32(1) if better else int32(0)
    return moved != 0


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
            lanes[PEAK, i] = x if larger else lanes[PEAK, i]
            lanes[SIZE, i] = abs(x) if larger else lanes[SIZE, i]
    for i in range(LANES):
        lanes[PEAK, i] = INFINITE if lanes[SIZE, i] < NOTHING else lanes[PEAK, i]


@inlined
def _sum(blocks: Floats, lanes: Floats, top: Any) -> None:
    """Level the values, and sum w l x and w l l."""
    for i in range(LANES):
        lanes[SUM_LX, i] = ZERO
        lanes[SUM_LL, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(LANES):
            x, w = blocks[X, j, i], blocks[W, j, i]
            level = clip(nearest(lanes[TRY_INVERSE, i] * x), -top, top - ONE)
            blocks[LEVEL, j, i] = level
            lanes[SUM_LX, i] += w * x * level
            lanes[SUM_LL, i] += w * level * level
