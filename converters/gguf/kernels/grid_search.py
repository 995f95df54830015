"""The search of the iq2 and iq3 types: x ~ scale * (2 level + 1), levels in groups that lie on a grid.

LANES sub-blocks are searched side by side, as in kq_lanes: ranges are tried; in each, every group of values
takes its nearest levels where they are a point of the grid, else the candidate of the least weighted error.
The levels of a try and its sums are vectors over sub-blocks; the error is one over candidates (grid_vectors).
All float32 operations are ggml's (quantize_row_iq2_xxs_impl and its like) in ggml's order.

`shifts` is a tuple: where the level of each value of a group stands in the group's cell; see grids.
"""

from __future__ import annotations

from typing import Any

from numpy import float32, int32

from converters.gguf.kernels.grid_vectors import distances, lane_of, lowest
from converters.gguf.kernels.grids import Ints
from converters.gguf.kernels.kq_lanes import LANES, MAGIC, ONE, ZERO, Floats, W, X, clip
from converters.gguf.kernels.kq_symmetric import NOTHING_FITS
from converters.gguf.kernels.vectors import WIDTH, as_ints, load, select, store, to_floats, vector
from dsconvert.compile import inlined

SHIFTS_OF_8 = (0, 2, 4, 6, 8, 10, 12, 14)  # levels 0..2
SHIFTS_OF_4 = (0, 3, 6, 9)  # levels 0..7

# The rows of `lanes` [ROWS, LANES]: one number for each sub-block.
SCALE, PEAK, BEST = 0, 1, 2  # of the best try; what the largest level stands for in the middle try; its fit
TRY_SCALE, AGAIN = 3, 4  # of the try at hand; 1 where levels are sought anew for the final scale
ROWS = 5
# The parts of `groups` [PARTS, groups, LANES]: cells and codes of the try at hand and of the best one.
CELL, CODE, BEST_CELL, BEST_CODE = 0, 1, 2, 3
PARTS = 4

HALF = float32(0.5)


@inlined
def search(
    rows: Floats,
    roots: Floats,
    blocks: Floats,
    lanes: Floats,
    groups: Ints,
    grid: tuple[Ints, Ints],
    shifts: Any,
    tries: Any,
    step: Any,
) -> None:
    """Find lanes[SCALE], groups[BEST_CELL] and groups[BEST_CODE]; their existing values are the first guess.

    rows [LANES, size] are the values, roots the square roots of their weights; blocks[X] and blocks[W] the
    values and weights side by side. -tries..tries times `step` are added to the largest odd number.
    """
    for i in range(LANES):
        lanes[BEST, i] = ZERO
    for t in range(-tries, tries + 1):
        stretch = float32(2 * _top(shifts) - 1) + float32(t) * step
        for i in range(0, LANES, WIDTH):
            inverse = stretch / load(lanes, (PEAK, i))
            store(lanes, (TRY_SCALE, i), ONE / inverse)
            _find_cells(blocks, i, inverse, groups, shifts)
        for lane in range(LANES):
            for k in range(groups.shape[1]):
                cell = groups[CELL, k, lane]
                at = (lane, k * len(shifts))
                groups[CODE, k, lane] = _nearest(rows, roots, at, lanes[TRY_SCALE, lane], grid, cell, shifts)
        for i in range(0, LANES, WIDTH):
            _keep_better(blocks, i, lanes, groups, shifts)


@inlined
def settle(
    rows: Floats,
    roots: Floats,
    blocks: Floats,
    lanes: Floats,
    groups: Ints,
    grid: tuple[Ints, Ints],
    shifts: Any,
    every: Any,
) -> None:
    """Where lanes[AGAIN] is 1, take levels for the scale found, and the best scale for these.

    Of all groups, or without `every` of those off the grid alone.
    """
    cells = grid[0]
    for i in range(0, LANES, WIDTH):
        _find_cells(blocks, i, ONE / load(lanes, (SCALE, i)), groups, shifts)
    for lane in range(LANES):
        if lanes[AGAIN, lane] == ZERO:
            continue
        for k in range(groups.shape[1]):
            if every or cells[groups[BEST_CELL, k, lane], 2] < 0:
                cell = groups[CELL, k, lane]
                at = (lane, k * len(shifts))
                groups[BEST_CODE, k, lane] = _nearest(rows, roots, at, lanes[SCALE, lane], grid, cell, shifts)
    for i in range(0, LANES, WIDTH):
        lx, ll = _sum_levels(blocks, i, groups, BEST_CODE, shifts)
        changed = (load(lanes, (AGAIN, i)) > ZERO) & (ll > ZERO)
        store(lanes, (SCALE, i), select(changed, lx / ll, load(lanes, (SCALE, i))))


@inlined
def off_grid(groups: Ints, lane: Any, cells: Ints) -> Any:
    """How many groups of the best try of a sub-block were off the grid."""
    found = 0
    for k in range(groups.shape[1]):
        found += 1 if cells[groups[BEST_CELL, k, lane], 2] < 0 else 0
    return found


@inlined
def cell_of(code: Any, shifts: Any) -> Any:
    """The cell of a code."""
    cell = int32(0)
    for j in range(len(shifts)):
        cell |= (code >> int32(4 * j) & _mask(shifts)) << int32(shifts[j])
    return cell


@inlined
def _top(shifts: Any) -> Any:
    """The number of levels."""
    return 3 if len(shifts) == 8 else 8


@inlined
def _mask(shifts: Any) -> Any:
    """The bits of a level in a code."""
    return int32(3) if len(shifts) == 8 else int32(7)


@inlined
def _find_cells(blocks: Floats, i: Any, inverse: Any, groups: Ints, shifts: Any) -> None:
    """The cell of each group of WIDTH sub-blocks: the levels nearest to (inverse * x - 1) / 2."""
    low = int32(0x00400000)
    for k in range(groups.shape[1]):
        cell = as_ints(vector(ZERO))
        for j in range(len(shifts)):
            x = load(blocks, (X, k * len(shifts) + j, i))
            bits = as_ints(HALF * (inverse * x - ONE) + MAGIC) & int32(0x007FFFFF)
            level = clip(bits, low, low + int32(_top(shifts) - 1)) - low
            cell |= level << int32(shifts[j])
        store(groups, (CELL, k, i), cell)


@inlined
def _nearest(
    rows: Floats, roots: Floats, at: Any, scale: Any, grid: tuple[Ints, Ints], cell: Any, shifts: Any
) -> Any:
    """The code of the candidate of a cell with the least weighted error, the first of several."""
    cells, codes = grid
    start = cells[cell, 0]
    best = distances(rows, roots, at, scale, codes, start, shifts)
    chosen = load(codes, (start,))
    for v in range(1, cells[cell, 1]):
        distance = distances(rows, roots, at, scale, codes, start + v * WIDTH, shifts)
        nearer = distance < best
        best = select(nearer, distance, best)
        chosen = select(nearer, load(codes, (start + v * WIDTH,)), chosen)
    return lane_of(chosen, lowest(best))


@inlined
def _sum_levels(blocks: Floats, i: Any, groups: Ints, part: Any, shifts: Any) -> Any:
    """Sum w x q and w q q over the odd numbers q = 2 level + 1 of the codes."""
    lx = ll = vector(ZERO)
    for k in range(groups.shape[1]):
        code = load(groups, (part, k, i))
        for j in range(len(shifts)):
            at = k * len(shifts) + j
            x, w = load(blocks, (X, at, i)), load(blocks, (W, at, i))
            level = code >> int32(4 * j) & _mask(shifts)
            q = to_floats(level + level + int32(1))
            lx += w * x * q
            ll += w * q * q
    return lx, ll


@inlined
def _keep_better(blocks: Floats, i: Any, lanes: Floats, groups: Ints, shifts: Any) -> None:
    """Keep the try at hand where it fits better than the best so far."""
    lx, ll = _sum_levels(blocks, i, groups, CODE, shifts)
    best = load(lanes, (BEST, i))
    better = select(ll > ZERO, lx * lx, NOTHING_FITS) > best * ll
    scale = select(better, lx / ll, load(lanes, (SCALE, i)))
    store(lanes, (SCALE, i), scale)
    store(lanes, (BEST, i), select(better, scale * lx, best))
    for k in range(groups.shape[1]):
        for new, old in ((CELL, BEST_CELL), (CODE, BEST_CODE)):
            kept = select(better, load(groups, (new, k, i)), load(groups, (old, k, i)))
            store(groups, (old, k, i), kept)
