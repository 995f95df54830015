"""What the kernels with an importance matrix share: weights, and the searches for the scales of scales.

`importance` is float32 [n_cols], one number for each column of the weight matrix: how much its input varies.
A value x counts importance * sqrt(s + x * x), with s the mean square of its super-block or row. Sub-blocks
are searched side by side as in kq_lanes; the scales of a super-block are then searched the same way, one
super-block a lane, with the sums of their sub-blocks' weights as weights.
"""

from __future__ import annotations

from typing import Any

from numpy import float32, int32, uint8

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
    nearest_int,
    nearest_level_of_small,
)
from converters.gguf.kernels.vectors import WIDTH, load, root, select, store, vector
from dsconvert.compile import inlined

# Rows of `lanes` [ROWS, LANES] behind those of kq_affine: the mean square, the sum of the weights.
SPREAD, TOTAL = 6, 7
ROWS = 8

# The rows of `few` [FEW_ROWS, lanes]: one number for each super-block's scales.
SCALE, BEST, INVERSE, PEAK = 0, 1, 2, 3  # the best scale so far, its error or fit, its 1 / step; the largest
TRY_INVERSE, TRY_SCALE, ERROR = 4, 5, 6  # of the try at hand
SUM_LX, SUM_LL, NONE = 7, 8, 9  # the sums are weighted; NONE is 1 where all values are 0 or no numbers
FEW_ROWS = 10

POSITIVE_TRIES = (-4, -3, -2, -1, 1, 2, 3, 4)  # tenths of a level
SIGNED_TRIES = (-9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9)


@inlined
def sum_squares(x: Floats, sums: Floats) -> None:
    """The sum of squares of each row, in the order of its values; four rows at once, since sums wait."""
    rows, size = x.shape
    whole = rows // 4 * 4
    for r in range(0, whole, 4):
        a = b = c = d = ZERO
        for j in range(size):
            a += x[r, j] * x[r, j]
            b += x[r + 1, j] * x[r + 1, j]
            c += x[r + 2, j] * x[r + 2, j]
            d += x[r + 3, j] * x[r + 3, j]
        sums[r], sums[r + 1], sums[r + 2], sums[r + 3] = a, b, c, d
    for r in range(whole, rows):
        a = ZERO
        for j in range(size):
            a += x[r, j] * x[r, j]
        sums[r] = a


@inlined
def gather_importance(importance: Floats, first: Any, count: Any, blocks: Floats) -> None:
    """The importance of the columns of each sub-block from `first` on into blocks[W]; 0 past `count`."""
    size = blocks.shape[1]
    per_row = importance.size // size
    for lane in range(LANES):
        start = (first + lane) % per_row * size
        for j in range(size):
            blocks[W, j, lane] = importance[start + j] if first + lane < count else ZERO


@inlined
def weigh(blocks: Floats, lanes: Floats) -> None:
    """Importance in blocks[W] to weights, with the mean squares lanes[SPREAD]; sets lanes[TOTAL]."""
    for i in range(0, LANES, WIDTH):
        spread, total = load(lanes, (SPREAD, i)), vector(ZERO)
        for j in range(blocks.shape[1]):
            x = load(blocks, (X, j, i))
            weight = load(blocks, (W, j, i)) * root(spread + x * x)
            store(blocks, (W, j, i), weight)
            total += weight
        store(lanes, (TOTAL, i), total)


@inlined
def search_positive(blocks: Floats, few: Floats, top: Any) -> None:
    """Find few[SCALE] and blocks[LEVEL] with x ~ scale * level, level in 0..top (ggml's make_qp_quants).

    Nine ranges are tried, then levels move one at a time as long as the fit improves. Levels are kept as
    ggml's bytes: one below 0, which only rounding can make, wraps. `top` is float32.
    """
    for i in range(blocks.shape[2]):
        few[PEAK, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            few[PEAK, i] = select(few[PEAK, i] > blocks[X, j, i], few[PEAK, i], blocks[X, j, i])
    for i in range(blocks.shape[2]):
        # Nothing above 0: an infinite peak makes all levels, and so the sums and the scale, 0.
        few[PEAK, i] = select(few[PEAK, i] < NOTHING, INFINITE, few[PEAK, i])
        few[INVERSE, i] = top / few[PEAK, i]
        few[TRY_SCALE, i] = ONE / few[INVERSE, i]
        few[BEST, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            x = blocks[X, j, i]
            error = x - few[TRY_SCALE, i] * _byte(nearest_int(few[INVERSE, i] * x))
            few[BEST, i] += blocks[W, j, i] * error * error
    for t in POSITIVE_TRIES:
        _try_positive(blocks, few, top, float32(0.1) * float32(t))
    _sum_positive(blocks, few, top)
    for _ in range(5):
        if not _move_positive(blocks, few, top):
            break
    for i in range(blocks.shape[2]):
        lx, ll = few[SUM_LX, i], few[SUM_LL, i]
        few[SCALE, i] = select(ll > ZERO, lx / ll, ZERO)


@inlined
def _byte(level: Any) -> Any:
    """An int32 as float32, by way of a byte."""
    return float32(int32(level & int32(0xFF)))


@inlined
def _up_to(level: Any, top: Any) -> Any:
    """An int32 level, at most `top`, as float32."""
    limit = int32(top)
    return float32(select(level < limit, level, limit))


@inlined
def _try_positive(blocks: Floats, few: Floats, top: Any, stretch: Any) -> None:
    """Keep the range of top + stretch levels where its error is the smallest so far."""
    for i in range(blocks.shape[2]):
        few[TRY_INVERSE, i] = (stretch + top) / few[PEAK, i]
        few[TRY_SCALE, i] = ONE / few[TRY_INVERSE, i]
        few[ERROR, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            x = blocks[X, j, i]
            error = x - few[TRY_SCALE, i] * _up_to(nearest_int(few[TRY_INVERSE, i] * x), top)
            few[ERROR, i] += blocks[W, j, i] * error * error
    for i in range(blocks.shape[2]):
        better = few[ERROR, i] < few[BEST, i]
        few[BEST, i] = select(better, few[ERROR, i], few[BEST, i])
        few[INVERSE, i] = select(better, few[TRY_INVERSE, i], few[INVERSE, i])


@inlined
def _sum_positive(blocks: Floats, few: Floats, top: Any) -> None:
    """The levels of the best range; sum w l x and w l l."""
    for i in range(blocks.shape[2]):
        few[SUM_LX, i] = ZERO
        few[SUM_LL, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            x, w = blocks[X, j, i], blocks[W, j, i]
            level = _up_to(nearest_int(few[INVERSE, i] * x), top)
            few[SUM_LX, i] += w * x * level
            few[SUM_LL, i] += w * level * level
            blocks[LEVEL, j, i] = _byte(int32(level))


@inlined
def _move_positive(blocks: Floats, few: Floats, top: Any) -> Any:
    """Move each level where the other levels' best scale would have it elsewhere and the fit improves."""
    moved = int32(0)
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            x, w, level = blocks[X, j, i], blocks[W, j, i], blocks[LEVEL, j, i]
            sum_lx, sum_ll = few[SUM_LX, i], few[SUM_LL, i]
            lx = sum_lx - w * x * level
            ll = sum_ll - w * level * level
            target = _up_to(nearest_int(x * ll / lx), top)
            worth = (lx > ZERO) & (ll > ZERO) & (target != level)
            lx += w * x * target
            ll += w * target * target
            better = worth & (lx * lx * sum_ll > sum_lx * sum_lx * ll)
            blocks[LEVEL, j, i] = select(better, _byte(int32(target)), level)
            few[SUM_LX, i] = select(better, lx, sum_lx)
            few[SUM_LL, i] = select(better, ll, sum_ll)
            moved |= select(better, int32(1), int32(0))
    return moved != 0


@inlined
def search_signed(blocks: Floats, few: Floats, top: Any) -> None:
    """Find few[SCALE] and blocks[LEVEL] with x ~ scale * (level - top), level in 0..2 top - 1.

    ggml's make_qx_quants, as kq_symmetric.search_scale for fewer lanes. Where there is nothing, levels are 0.
    """
    for i in range(blocks.shape[2]):
        few[PEAK, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            x = blocks[X, j, i]
            few[PEAK, i] = select(abs(x) > abs(few[PEAK, i]), x, few[PEAK, i])
    for i in range(blocks.shape[2]):
        few[NONE, i] = select(abs(few[PEAK, i]) < NOTHING, ONE, ZERO)
        few[PEAK, i] = select(few[NONE, i] == ONE, INFINITE, few[PEAK, i])
        few[INVERSE, i] = -top / few[PEAK, i]
        few[TRY_INVERSE, i] = few[INVERSE, i]
    _sum_signed(blocks, few, top)
    for i in range(blocks.shape[2]):
        lx, ll = few[SUM_LX, i], few[SUM_LL, i]
        few[SCALE, i] = select(ll == ZERO, ZERO, lx / ll)
        few[BEST, i] = few[SCALE, i] * lx
    for t in SIGNED_TRIES:
        for i in range(blocks.shape[2]):
            few[TRY_INVERSE, i] = -(top + float32(0.1) * float32(t)) / few[PEAK, i]
        _sum_signed(blocks, few, top)
        for i in range(blocks.shape[2]):
            lx, ll = few[SUM_LX, i], few[SUM_LL, i]
            better = (ll > ZERO) & (lx * lx > few[BEST, i] * ll)
            few[INVERSE, i] = select(better, few[TRY_INVERSE, i], few[INVERSE, i])
            few[SCALE, i] = select(better, lx / ll, few[SCALE, i])
            few[BEST, i] = select(better, few[SCALE, i] * lx, few[BEST, i])
    for i in range(blocks.shape[2]):
        few[SCALE, i] = select(few[NONE, i] == ONE, ZERO, few[SCALE, i])
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            level = nearest_level_of_small(few[INVERSE, i] * blocks[X, j, i], -top, top - ONE) + top
            blocks[LEVEL, j, i] = select(few[NONE, i] == ONE, ZERO, level)


@inlined
def _sum_signed(blocks: Floats, few: Floats, top: Any) -> None:
    """Sum w l x and w l l over the levels of the try."""
    for i in range(blocks.shape[2]):
        few[SUM_LX, i] = ZERO
        few[SUM_LL, i] = ZERO
    for j in range(blocks.shape[1]):
        for i in range(blocks.shape[2]):
            x, w = blocks[X, j, i], blocks[W, j, i]
            level = nearest_level_of_small(few[TRY_INVERSE, i] * x, -top, top - ONE)
            few[SUM_LX, i] += w * x * level
            few[SUM_LL, i] += w * level * level


@inlined
def level_byte(blocks: Floats, j: Any, lane: Any) -> Any:
    """The level of one scale as a byte."""
    return uint8(int32(blocks[LEVEL, j, lane]))
