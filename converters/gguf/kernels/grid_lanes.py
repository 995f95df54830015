"""What the kernels of iq2 and iq3 do around the search: signs, weights, and the scales of a super-block.

`room` is what make_room returns; see grid_search for `lanes` and `groups`, grids for `cells` and `codes`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, int32, uint8

from converters.gguf.kernels import grid_search as on_grid
from converters.gguf.kernels import weighted_lanes as weighted
from converters.gguf.kernels.grid_search import PEAK, SCALE
from converters.gguf.kernels.grids import Ints
from converters.gguf.kernels.kq_lanes import (
    LANES,
    ONE,
    ORDER,
    SUPER,
    ZERO,
    Bytes,
    Floats,
    W,
    clip,
    gather,
    nearest_int,
)
from converters.gguf.kernels.kq_pack import store_half
from dsconvert.compile import inlined


@inlined
def take_signs(x: Floats, weights: Floats, values: Floats, even: Any, signs: Bytes) -> None:
    """Magnitudes of a sub-block, and their signs: a bit a value, a byte for 8; `even` as said above."""
    for k in range(len(signs)):
        bits, count = 0, 0
        for j in range(8 * k, 8 * k + 8):
            negative = x[j] < ZERO
            values[j] = -x[j] if negative else x[j]
            bits |= (1 if negative else 0) << j % 8
            count += 1 if negative else 0
        if even and count % 2:
            turned = 8 * k
            least = weights[turned] * x[turned] * x[turned]
            for j in range(8 * k + 1, 8 * k + 8):
                size = weights[j] * x[j] * x[j]
                turned = j if size < least else turned
                least = size if size < least else least
            values[turned] = -values[turned]
            bits ^= 1 << turned % 8
        signs[k] = bits & 127 if even else bits


@inlined
def lay_out(
    part: Floats, importance: Floats, first: Any, rule: Any, even: Any, room: Any, signs: Bytes, lanes: Floats
) -> None:
    """The values and weights of the sub-blocks `part`, from `first` on, both ways; their peaks.

    `rule` is (twice, spread): the mean square counts `twice`, and without a matrix `spread` times.
    """
    values, weights, roots, sums, blocks = room
    size = part.shape[1]
    per, per_row = SUPER // size, max(1, importance.size // size)
    weighted.sum_squares(part.reshape(-1, SUPER), sums)
    values[:] = ZERO
    weights[:] = ZERO
    for lane in range(len(part)):
        mean = rule[0] * sums[lane // per] / float32(SUPER)
        start = (first + lane) % per_row * size
        for j in range(size):
            x = part[lane, j]
            if importance.size:
                weights[lane, j] = importance[start + j] * np.sqrt(mean + x * x)
            else:
                weights[lane, j] = rule[1] * mean + x * x
        take_signs(part[lane], weights[lane], values[lane], even, signs[lane])
    for lane in range(LANES):
        peak = values[lane, 0]
        for j in range(size):
            roots[lane, j] = np.sqrt(weights[lane, j])
            peak = max(peak, values[lane, j])
        lanes[PEAK, lane] = peak
    gather(values, ORDER, blocks)
    gather(weights, ORDER, blocks[W:])


@inlined
def guess(lanes: Floats, groups: Ints, cells: Ints, codes: Ints, cell: Any, largest: Any) -> None:
    """What stays where no try fits: all levels 0, the peak as the largest number, and `cell`."""
    groups[on_grid.BEST_CODE] = codes[cells[0, 0]]
    groups[on_grid.BEST_CELL] = cell
    for lane in range(LANES):
        lanes[SCALE, lane] = lanes[PEAK, lane] / largest


@inlined
def ask_again(lanes: Floats, groups: Ints, cells: Ints) -> None:
    """Mark the sub-blocks that have a group off the grid in their best try."""
    for lane in range(LANES):
        off = on_grid.off_grid(groups, lane, cells) > 0 and lanes[SCALE, lane] > ZERO
        lanes[on_grid.AGAIN, lane] = ONE if off else ZERO


@inlined
def finish(
    lanes: Floats, groups: Ints, cells: Ints, least: Any, mask: Any, shifts: Any, signs: Bytes
) -> None:
    """groups[CELL] becomes the points' numbers; scales below 0 turn the signs; nothing is left of nothing."""
    for lane in range(LANES):
        empty = lanes[PEAK, lane] < least
        for k in range(groups.shape[1]):
            cell = on_grid.cell_of(groups[on_grid.BEST_CODE, k, lane], shifts)
            groups[on_grid.CELL, k, lane] = int32(0) if empty else cells[cell, 2]
        if empty:
            lanes[SCALE, lane] = ZERO
            signs[lane] = 0
        elif lanes[SCALE, lane] < ZERO:
            lanes[SCALE, lane] = -lanes[SCALE, lane]
            for k in range(signs.shape[1]):
                signs[lane, k] = ~signs[lane, k] & mask


@inlined
def put_scales(scales: Floats, fudge: Any, levels: Bytes, out: Bytes) -> Any:
    """Write d, and fill `levels` with those of the scales, 0..15; whether there is a scale above 0."""
    largest = ZERO
    for k in range(len(scales)):
        largest = scales[k] if scales[k] > largest else largest
    if largest == ZERO:
        out[0:2] = 0
        levels[:] = 0
        return False
    d = largest / float32(31)
    store_half(d * fudge, out)
    inverse = ONE / d
    for k in range(len(scales)):
        level = nearest_int(on_grid.HALF * (inverse * scales[k] - ONE))
        levels[k] = uint8(clip(level, int32(0), int32(15)))
    return True


@inlined
def make_room(size: Any) -> Any:
    """Values, weights and their roots by rows; sums of squares; values and weights side by side."""
    return (
        np.empty((LANES, size), np.float32),
        np.empty((LANES, size), np.float32),
        np.empty((LANES, size), np.float32),
        np.empty(LANES, np.float32),
        np.empty((3, size, LANES), np.float32),
    )
