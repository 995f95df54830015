"""The searches for x ~ scale * level, level in -top..top-1: q6_k and q3_k.

ggml's make_qx_quants and make_q3_quants. Both weigh a value by its square and start from the range in which
the value of the largest magnitude becomes level -top. q6_k tries 18 ranges around it; q3_k moves one level
at a time, as long as the fit improves. All variables but sizes are vectors: one number for each sub-block.
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
    ORDER,
    ZERO,
    Bytes,
    Floats,
    Numbers,
    W,
    X,
    clip,
    gather,
    nearest_ints,
    nearest_level_of_small,
    nearest_levels,
)
from converters.gguf.kernels.vectors import WIDTH, lanes_of, load, magnitude, select, store, vector

# The rows of `lanes` [ROWS, n]: one number for each sub-block.
SCALE = 0
INVERSE = 1  # its levels are those nearest to INVERSE * x; 0 where they are in their place already
STEP = 2  # what the packed bytes say: a value is STEP * (level - top)
ROWS = 3

TRIES = (-9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9)  # tenths of a level
ROUNDS = 5
LX, LL, MOVED = 0, 1, 2  # rows of the sums of q3_k; MOVED is not 0 where the last round moved a level
NOTHING_FITS = float32(-np.inf)


@inlined
def weigh_by_square(blocks: Floats) -> None:
    """The weights of q6_k and q3_k: x * x."""
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
        peak = _peak(blocks, i)
        inverse = -top / peak
        lx, ll = _sum(blocks, i, inverse, top)
        scale = select(ll == ZERO, ZERO, lx / ll)
        best = scale * lx
        for t in TRIES:
            try_inverse = -(top + float32(0.1) * float32(t)) / peak
            lx, ll = _sum(blocks, i, try_inverse, top)
            better = select(ll > ZERO, lx * lx, NOTHING_FITS) > best * ll
            inverse = select(better, try_inverse, inverse)
            scale = select(better, lx / ll, scale)
            best = select(better, scale * lx, best)
        store(lanes, (SCALE, i), scale)
        store(lanes, (INVERSE, i), inverse)


@inlined
def settle(x: Floats, blocks: Floats, lanes: Floats, restless: Numbers) -> Any:
    """The first levels of q3_k and their scale, x [n, 16]; gives how many sub-blocks are `restless`.

    Those are the ones of which a level would move, one in five in a trained model: `move` sees to them. The
    others are done: their first round would be the last.
    """
    top, count = float32(4), 0
    products = np.empty((2, 16, WIDTH), np.float32)
    for first in range(0, x.shape[0], LANES):
        part = x[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        for i in range(0, LANES, WIDTH):
            peak = _peak(blocks, i)
            inverse = -top / peak
            sum_lx = sum_ll = vector(ZERO)
            for j in range(16):
                value = load(blocks, (X, j, i))
                level = nearest_level_of_small(inverse * value, -top, top - ONE)
                w = value * value
                lx, ll = w * value * level, w * level * level
                sum_lx += lx
                sum_ll += ll
                store(blocks, (LEVEL, j, i), level)
                store(products, (LX, j, 0), lx)
                store(products, (LL, j, 0), ll)
            moves = select(peak == INFINITE, ONE, vector(ZERO))
            for j in range(16):
                value, level = load(blocks, (X, j, i)), load(blocks, (LEVEL, j, i))
                lx, ll = sum_lx - load(products, (LX, j, 0)), sum_ll - load(products, (LL, j, 0))
                target = nearest_levels(value * ll / lx, -top, top - ONE)
                moves += magnitude(select(lx > ZERO, target - level, ZERO))
            store(lanes, (SCALE, first + i), select(sum_ll > ZERO, sum_lx / sum_ll, ZERO))
            store(lanes, (INVERSE, first + i), inverse)
            found = lanes_of(moves != ZERO)
            for lane in range(WIDTH):
                restless[count] = first + i + lane
                count += (found >> lane) & 1
    while count and restless[count - 1] >= x.shape[0]:
        count -= 1
    return count


@inlined
def move(x: Floats, restless: Numbers, blocks: Floats, lanes: Floats, levels: Bytes) -> None:
    """Move levels of the sub-blocks x[restless] as long as their fit improves; sets lanes[SCALE], `levels`.

    Five rounds at most; in each, a level moves where the other levels' best scale would have it elsewhere
    and the fit, (sum w l x)^2 / sum w l l, improves.
    """
    top = float32(4)
    sums = np.empty((3, LANES), np.float32)
    active = np.empty(LANES // WIDTH, np.int64)
    for first in range(0, restless.size, LANES):
        which = restless[first : first + LANES]
        gather(x, which, blocks)
        weigh_by_square(blocks)
        count = 0
        for i in range(0, which.size, WIDTH):
            active[count] = i
            count += 1
            inverse = -top / _peak(blocks, i)
            for j in range(16):
                level = nearest_level_of_small(inverse * load(blocks, (X, j, i)), -top, top - ONE)
                store(blocks, (LEVEL, j, i), level)
            lx, ll = _sum(blocks, i, inverse, top)
            store(sums, (LX, i), lx)
            store(sums, (LL, i), ll)
        for _ in range(ROUNDS):
            count = _round(blocks, sums, top, active[:count])
        for lane in range(which.size):
            n = which[lane]
            lx, ll = sums[LX, lane], sums[LL, lane]
            lanes[SCALE, n] = lx / ll if ll > ZERO else ZERO
            if lanes[INVERSE, n] != ZERO:
                lanes[INVERSE, n] = ZERO
                for j in range(16):
                    levels[n, j] = int32(blocks[LEVEL, j, lane] + top)


@inlined
def _round(blocks: Floats, sums: Floats, top: Any, active: Numbers) -> Any:
    """Move each level where it pays, in the vectors that begin at the lanes `active`.

    Those in which any moved come first in `active` then; gives how many they are.
    """
    for i in active:
        store(sums, (MOVED, i), vector(ZERO))
    for j in range(16):
        for i in active:
            x, w, level = load(blocks, (X, j, i)), load(blocks, (W, j, i)), load(blocks, (LEVEL, j, i))
            sum_lx, sum_ll = load(sums, (LX, i)), load(sums, (LL, i))
            lx = sum_lx - w * x * level
            ll = sum_ll - w * level * level
            target = nearest_levels(x * ll / lx, -top, top - ONE)
            # Sums and not blends of levels: a store that depends on a condition is slow on some processors.
            step = select(lx > ZERO, target - level, ZERO)
            lx += w * x * target
            ll += w * target * target
            step = select(ll > ZERO, step, ZERO)
            step = select(lx * lx * sum_ll > sum_lx * sum_lx * ll, step, ZERO)
            moves = step != ZERO
            store(blocks, (LEVEL, j, i), level + step)
            store(sums, (LX, i), select(moves, lx, sum_lx))
            store(sums, (LL, i), select(moves, ll, sum_ll))
            store(sums, (MOVED, i), load(sums, (MOVED, i)) + magnitude(step))
    count = 0
    for i in active:
        moved = lanes_of(load(sums, (MOVED, i)) != ZERO) != 0
        active[count] = i
        count += 1 if moved else 0
    return count


@inlined
def _peak(blocks: Floats, i: Any) -> Any:
    """The value of the largest magnitude, the first of several.

    An all-zero sub-block gets an infinite one: its levels, and so its sums, are 0 in every try.
    """
    peak = size = vector(ZERO)
    for j in range(blocks.shape[1]):
        x = load(blocks, (X, j, i))
        larger = magnitude(x) > size
        peak = select(larger, x, peak)
        size = select(larger, magnitude(x), size)
    return select(size < NOTHING, INFINITE, peak)


@inlined
def _sum(blocks: Floats, i: Any, inverse: Any, top: Any) -> Any:
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
