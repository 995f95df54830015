"""q3_k's search for x ~ scale * level, level in -4..3: ggml's make_q3_quants.

A value weighs its square. The search starts from the range in which the peak, the value of the largest
magnitude, becomes level -4. Then levels move one at a time, as long as the fit improves: a round looks at the
16 levels in turn, and a round in which none moved is the last, as is the fifth.

In a trained model four sub-blocks of five have no level that moves. `guess` sets those aside, `move` lays the
restless ones side by side, and after each round keeps those in front that may still move.
"""

from __future__ import annotations

from typing import Any

from numpy import float32

from converters.gguf.kernels.kq_lanes import (
    INFINITE,
    LANES,
    LEVEL,
    MAGIC,
    ORDER,
    ZERO,
    Floats,
    Numbers,
    W,
    X,
    clip,
    gather,
    nearest_levels,
)
from converters.gguf.kernels.kq_symmetric import INVERSE, SCALE, STEP, peak_or_infinite
from converters.gguf.kernels.vectors import (
    WIDTH,
    lanes_of,
    load,
    magnitude,
    select,
    store,
    store_turned,
    vector,
)
from dsconvert.compile import inlined

# The rows of `lanes` behind those of kq_symmetric, and of the sums of the sub-blocks that move:
# sum w l x, sum w l l; not 0 where the last round moved a level.
LX, LL, MOVED = 4, 5, 6
ROWS = 7
SHARE = W  # the part of `blocks` that holds |w l x|

Room = tuple[Floats, Floats, Numbers]
LOWEST, HIGHEST = float32(-4), float32(3)
ROUNDS = 5


@inlined
def guess(x: Floats, blocks: Floats, lanes: Floats, restless: Numbers) -> Any:
    """The first levels of x [n, 16]: their INVERSE, SCALE, LX and LL. Lists the `restless`; returns how many.

    With a positive peak every w l x is 0 or below, for a level has the sign of -x: so is any sum of them, and
    no level ever moves.
    """
    count = 0
    for first in range(0, x.shape[0], LANES):
        part = x[first : first + LANES]
        gather(part, ORDER[: len(part)], blocks)
        for i in range(0, len(part), WIDTH):
            store(lanes, (INVERSE, first + i), LOWEST / peak_or_infinite(blocks, i))
        for i in range(0, len(part), WIDTH):
            _sum_first_levels(blocks, lanes, first, i)
        for i in range(0, len(part), WIDTH):
            settled = _settled(blocks, i, load(lanes, (LX, first + i)), load(lanes, (LL, first + i)))
            found = lanes_of(select(settled, ZERO, load(lanes, (INVERSE, first + i))) > ZERO)
            for lane in range(WIDTH):
                restless[count] = first + i + lane
                count += (found >> lane) & 1
    return count


@inlined
def _first_level(inverse: Any, x: Any) -> Any:
    """The level nearest to inverse * x, which is -4 or more."""
    level = inverse * x + MAGIC - MAGIC
    return select(level > HIGHEST, HIGHEST, level)


@inlined
def _sum_first_levels(blocks: Floats, lanes: Floats, first: Any, i: Any) -> None:
    """The first levels and what they make: blocks[LEVEL] and [SHARE], lanes[LX], [LL] and [SCALE]."""
    inverse = load(lanes, (INVERSE, first + i))
    sum_lx = sum_ll = vector(ZERO)
    for j in range(16):
        x = load(blocks, (X, j, i))
        w, level = x * x, _first_level(inverse, x)
        lx = w * x * level
        sum_lx += lx
        sum_ll += w * level * level
        store(blocks, (LEVEL, j, i), level)
        store(blocks, (SHARE, j, i), lx)
    store(lanes, (LX, first + i), sum_lx)
    store(lanes, (LL, first + i), sum_ll)
    store(lanes, (SCALE, first + i), select(sum_ll > ZERO, sum_lx / sum_ll, ZERO))


@inlined
def _settled(blocks: Floats, i: Any, sum_lx: Any, sum_ll: Any) -> Any:
    """Where no level would move, found without a division; where it is close, it says no.

    A level l stays when x LL' / LX' is within half of it, where LX' = LX - w l x and LL' = LL - w l l. Times
    2 LX', and without the w l l x on both sides, that is 2 |x LL - l LX| < LX - w l x. The margins of 2.0004
    and 0.99998 are far above what rounding does to either side, unless LX is near the ends of float32. A
    value beyond the last level counts as being there: it stays.
    """
    scale = sum_lx / sum_ll
    twice_lx, twice_ll = float32(2.0004) * sum_lx, float32(2.0004) * sum_ll
    worst = vector(ZERO)
    for j in range(16):
        x = clip(load(blocks, (X, j, i)), LOWEST * scale, HIGHEST * scale)
        off = magnitude(x * twice_ll - load(blocks, (LEVEL, j, i)) * twice_lx)
        off += load(blocks, (SHARE, j, i))
        worst = select(worst < off, off, worst)
    room = select(sum_lx > float32(1e-25), float32(0.99998) * sum_lx, ZERO)
    return worst < select(sum_lx * sum_ll < INFINITE, room, ZERO)


@inlined
def move(x: Floats, restless: Numbers, blocks: Floats, lanes: Floats, room: Room, moved: Floats) -> None:
    """Move the levels of x[restless]; sets their lanes[SCALE], moved[k] to the levels of x[restless[k]].

    `room` is for as many lanes as `blocks` has: the sums of each, its levels, and which of `restless` it is.
    """
    sums, turned, seats = room
    size = seats.size
    for first in range(0, restless.size, size):
        count = min(size, restless.size - first)
        _lay_out(x, restless[first : first + count], blocks, lanes, sums)
        for lane in range(count):
            seats[lane] = first + lane
        for _ in range(ROUNDS):
            _round(blocks, sums, count)
            _note(blocks, turned, seats[:count], moved)
            for lane in range(count):
                lx, ll = sums[LX, lane], sums[LL, lane]
                lanes[SCALE, restless[seats[lane]]] = lx / ll if ll > ZERO else ZERO
            count = _keep_restless(blocks, sums, seats, count)


@inlined
def _lay_out(x: Floats, which: Numbers, blocks: Floats, lanes: Floats, sums: Floats) -> None:
    """x[which] side by side, with their first levels and sums."""
    gather(x, which, blocks)
    for lane in range(which.size):
        for row in (INVERSE, LX, LL):
            sums[row, lane] = lanes[row, which[lane]]
    for i in range(0, which.size, WIDTH):
        inverse = load(sums, (INVERSE, i))
        for j in range(16):
            store(blocks, (LEVEL, j, i), _first_level(inverse, load(blocks, (X, j, i))))


@inlined
def _round(blocks: Floats, sums: Floats, count: Any) -> None:
    """Move each level of the first `count` lanes where the other levels' best scale would have it elsewhere,
    and the fit, (sum w l x)^2 / sum w l l, improves."""
    for i in range(0, count, WIDTH):
        store(sums, (MOVED, i), vector(ZERO))
    for j in range(16):
        for i in range(0, count, WIDTH):
            x, level = load(blocks, (X, j, i)), load(blocks, (LEVEL, j, i))
            sum_lx, sum_ll = load(sums, (LX, i)), load(sums, (LL, i))
            w = x * x
            share = w * x * level
            lx, ll = sum_lx - share, sum_ll - w * level * level
            target = nearest_levels(x * ll / lx, LOWEST, HIGHEST)
            moves = (lx > ZERO) & (target != level)
            new_share = w * x * target
            lx += new_share
            ll += w * target * target
            moves = moves & (ll > ZERO) & (lx * lx * sum_ll > sum_lx * sum_lx * ll)
            # A sum and no choice of levels: a store that depends on a condition is slow on some processors.
            step = select(moves, target - level, ZERO)
            store(blocks, (LEVEL, j, i), level + step)
            store(blocks, (SHARE, j, i), magnitude(select(moves, new_share, share)))
            store(sums, (LX, i), select(moves, lx, sum_lx))
            store(sums, (LL, i), select(moves, ll, sum_ll))
            store(sums, (MOVED, i), load(sums, (MOVED, i)) + magnitude(step))


@inlined
def _note(blocks: Floats, turned: Floats, seats: Numbers, moved: Floats) -> None:
    """Write the levels of the first lanes down, each to its seat."""
    for lane in range(0, seats.size, WIDTH):
        for j in range(0, 16, WIDTH):
            store_turned(blocks[LEVEL], ORDER[:16], lane, turned, j)
    for lane in range(seats.size):
        for j in range(0, 16, WIDTH):
            store(moved, (seats[lane], j), load(turned, (lane, j)))


@inlined
def _keep_restless(blocks: Floats, sums: Floats, seats: Numbers, count: Any) -> Any:
    """Move to the front those of the first `count` lanes of which a level may still move; their number."""
    kept = 0
    for i in range(0, count, WIDTH):
        settled = _settled(blocks, i, load(sums, (LX, i)), load(sums, (LL, i)))
        found = lanes_of(select(settled, ZERO, load(sums, (MOVED, i))) != ZERO)
        for lane in range(i, min(i + WIDTH, count)):
            if (found >> (lane - i)) & 1:
                seats[kept] = seats[lane]
                sums[LX, kept], sums[LL, kept] = sums[LX, lane], sums[LL, lane]
                for j in range(16):
                    blocks[X, j, kept] = blocks[X, j, lane]
                    blocks[LEVEL, j, kept] = blocks[LEVEL, j, lane]
                kept += 1
    return kept


@inlined
def keep_levels(x: Floats, restless: Numbers, moved: Floats, lanes: Floats) -> None:
    """Where a step rounded to 0, put the levels of the search in the place of the values, and 1 of the step.

    So they stay, as in ggml, and -4 in an all-zero sub-block: they have no meaning, but they are in the file.
    """
    for k in range(restless.size):
        n = restless[k]
        if lanes[STEP, n] == ZERO:
            lanes[STEP, n] = float32(1)
            for j in range(0, 16, WIDTH):
                store(x, (n, j), load(moved, (k, j)))
    for first in range(0, x.shape[0], WIDTH):
        if lanes_of(load(lanes, (STEP, first)) == ZERO):
            for n in range(first, first + WIDTH):
                if lanes[STEP, n] == ZERO:
                    lanes[STEP, n] = float32(1)
                    inverse = lanes[INVERSE, n]
                    for j in range(0, 16, WIDTH):
                        level = _first_level(inverse, load(x, (n, j)))
                        store(x, (n, j), select(inverse == ZERO, vector(LOWEST), level))
