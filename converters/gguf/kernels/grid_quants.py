"""iq3_xxs, iq3_s, iq2_xxs, iq2_xs and iq2_s: signs apart, and groups of 4 or 8 odd numbers from a grid.

    type     bytes  sub-blocks  groups  signs  where the bytes are
    iq3_xxs     98    8 of 32     of 4     28  d, 64 points, 8 times 4 bytes: signs, and the scale on top
    iq3_s      110    8 of 32     of 4     32  d, 64 points, 8 of their ninth bits, 32 signs, 4 scales
    iq2_xxs     66    8 of 32     of 8     28  d, 8 times 4 points and 4 bytes: signs, and the scale on top
    iq2_xs      74   16 of 16     of 8     14  d, 32 times 9 bits of a point and 7 signs, 8 scales
    iq2_s       82   16 of 16     of 8     16  d, 32 points, 32 signs, 8 of their high bits, 8 scales

A value is d (2 scale + 1) q times a constant of the type, the scale of 4 bits. Where 7 signs are stored for
8 values the eighth makes the number of minus signs even: the value that counts least is turned for it.

Every kernel takes float32 [n_rows, n_cols], `importance` float32 [n_cols] or [0] for none, a Grid's arrays,
and fills uint8 [n_rows, bytes]; ggml's quantize_row_*_impl. Pure, and free of locks. Importing this module
imports numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import float32, int32, uint8

from converters.gguf.kernels import grid_search as on_grid
from converters.gguf.kernels import weighted_lanes as weighted
from converters.gguf.kernels.grid_lanes import ask_again, finish, guess, lay_out, make_room, put_scales
from converters.gguf.kernels.grid_search import PEAK, SCALE, SHIFTS_OF_4, SHIFTS_OF_8
from converters.gguf.kernels.grids import Ints, grid
from converters.gguf.kernels.kq_lanes import (
    LANES,
    NOTHING,
    ONE,
    ZERO,
    Bytes,
    Floats,
)
from dsconvert.compile import inlined, kernel

Grid = tuple[Ints, Ints]
LITTLE = float32(1e-8)  # ggml's GROUP_MAX_EPS_IQ3_XXS and _IQ2_S
LEAST = float32(1e-45)  # iq3_s takes nothing but zeros for nothing


@kernel
def quantize_iq3_xxs(x: Floats, importance: Floats, cells: Ints, codes: Ints, out: Bytes) -> None:
    """8 sub-blocks, 31 tries."""
    rows, packed = x.reshape(-1, 32), out.reshape(-1, 98)
    room = make_room(32)
    values, roots, blocks = room[0], room[2], room[4]
    lanes = np.empty((on_grid.ROWS, LANES), np.float32)
    groups = np.empty((on_grid.PARTS, 8, LANES), np.int32)
    signs, levels = np.empty((LANES, 4), np.uint8), np.empty(8, np.uint8)
    for first in range(0, len(rows), LANES):
        part, group = rows[first : first + LANES], packed[first // 8 : (first + LANES) // 8]
        lay_out(part, importance, first, (float32(2), ZERO), True, room, signs, lanes)
        guess(lanes, groups, cells, codes, 0, float32(15))
        on_grid.search(values, roots, blocks, lanes, groups, (cells, codes), SHIFTS_OF_4, 15, float32(0.2))
        ask_again(lanes, groups, cells)
        on_grid.settle(values, roots, blocks, lanes, groups, (cells, codes), SHIFTS_OF_4, False)
        finish(lanes, groups, cells, LITTLE, 127, SHIFTS_OF_4, signs)
        for n in range(len(group)):
            above = put_scales(lanes[SCALE, 8 * n : 8 * n + 8], float32(1.0125), levels, group[n, 0:2])
            for k in range(8):
                for j in range(8):
                    group[n, 2 + 8 * k + j] = groups[on_grid.CELL, j, 8 * n + k]
                put_28_signs(signs[8 * n + k], levels[k], group[n, 66 + 4 * k : 70 + 4 * k])
            if not above:
                group[n, 2:] = 0


@inlined
def put_28_signs(signs: Bytes, level: Any, out: Bytes) -> None:
    """4 bytes: 4 times 7 signs, the level of the scale on top."""
    bits = int32(level) << int32(28)
    for k in range(4):
        bits |= int32(signs[k]) << int32(7 * k)
    for k in range(4):
        out[k] = uint8(bits >> int32(8 * k) & int32(255))


@kernel
def quantize_iq3_s(x: Floats, importance: Floats, cells: Ints, codes: Ints, out: Bytes) -> None:
    """8 sub-blocks, 19 tries, all signs."""
    rows, packed = x.reshape(-1, 32), out.reshape(-1, 110)
    room = make_room(32)
    values, roots, blocks = room[0], room[2], room[4]
    lanes = np.empty((on_grid.ROWS, LANES), np.float32)
    groups = np.empty((on_grid.PARTS, 8, LANES), np.int32)
    signs, levels = np.empty((LANES, 4), np.uint8), np.empty(8, np.uint8)
    off = 0
    while cells[off, 2] >= 0:
        off += 1
    for first in range(0, len(rows), LANES):
        part, group = rows[first : first + LANES], packed[first // 8 : (first + LANES) // 8]
        lay_out(part, importance, first, (float32(2), ZERO), False, room, signs, lanes)
        guess(lanes, groups, cells, codes, off, float32(15))
        on_grid.search(values, roots, blocks, lanes, groups, (cells, codes), SHIFTS_OF_4, 9, float32(0.2))
        ask_again(lanes, groups, cells)
        on_grid.settle(values, roots, blocks, lanes, groups, (cells, codes), SHIFTS_OF_4, True)
        finish(lanes, groups, cells, LEAST, 255, SHIFTS_OF_4, signs)
        for n in range(len(group)):
            put_scales(lanes[SCALE, 8 * n : 8 * n + 8], float32(1.033), levels, group[n, 0:2])
            group[n, 2:106] = 0
            at = 0
            for k in range(8):
                # As in ggml a sub-block of zeros takes no room, and those behind it move up: but for their
                # ninth bits and scales, so that they are read wrongly.
                if lanes[PEAK, 8 * n + k] < LEAST:
                    continue
                for j in range(8):
                    number = groups[on_grid.CELL, j, 8 * n + k]
                    group[n, 2 + 8 * at + j] = number & 255
                    group[n, 66 + k] |= number >> 8 << j
                group[n, 74 + 4 * at : 78 + 4 * at] = signs[8 * n + k]
                at += 1
            for k in range(4):
                group[n, 106 + k] = levels[2 * k] | levels[2 * k + 1] << 4


@kernel
def quantize_iq2_xxs(x: Floats, importance: Floats, cells: Ints, codes: Ints, out: Bytes) -> None:
    """8 sub-blocks, 13 tries around the best of make_qp_quants."""
    rows, packed = x.reshape(-1, 32), out.reshape(-1, 66)
    room = make_room(32)
    values, roots, blocks = room[0], room[2], room[4]
    lanes, few = np.empty((on_grid.ROWS, LANES), np.float32), np.empty((weighted.FEW_ROWS, LANES), np.float32)
    groups = np.empty((on_grid.PARTS, 4, LANES), np.int32)
    signs, levels = np.empty((LANES, 4), np.uint8), np.empty(8, np.uint8)
    for first in range(0, len(rows), LANES):
        part, group = rows[first : first + LANES], packed[first // 8 : (first + LANES) // 8]
        lay_out(part, importance, first, (ONE, ZERO), True, room, signs, lanes)
        weighted.search_positive(blocks, few, float32(4))
        guess(lanes, groups, cells, codes, 0, ONE)
        for lane in range(LANES):
            reach = few[weighted.SCALE, lane] * float32(3)
            empty = lanes[PEAK, lane] < NOTHING or reach <= ZERO
            lanes[PEAK, lane] = ZERO if empty else reach
            lanes[SCALE, lane] = few[weighted.SCALE, lane]
        on_grid.search(values, roots, blocks, lanes, groups, (cells, codes), SHIFTS_OF_8, 6, float32(0.1))
        for lane in range(LANES):
            lanes[on_grid.AGAIN, lane] = ONE if lanes[SCALE, lane] > ZERO else ZERO
        on_grid.settle(values, roots, blocks, lanes, groups, (cells, codes), SHIFTS_OF_8, True)
        finish(lanes, groups, cells, LEAST, 127, SHIFTS_OF_8, signs)
        for n in range(len(group)):
            above = put_scales(lanes[SCALE, 8 * n : 8 * n + 8], ONE, levels, group[n, 0:2])
            for k in range(8):
                for j in range(4):
                    group[n, 2 + 8 * k + j] = groups[on_grid.CELL, j, 8 * n + k]
                put_28_signs(signs[8 * n + k], levels[k], group[n, 6 + 8 * k : 10 + 8 * k])
            if not above:
                group[n, 2:] = 0


@inlined
def search_16(
    part: Floats, importance: Floats, first: Any, grid: Grid, rule: Any, even: Any, room: Any, found: Any
) -> None:
    """What iq2_xs and iq2_s share: sub-blocks of 16, 19 tries."""
    values, roots, blocks = room[0], room[2], room[4]
    lanes, groups, signs = found
    lay_out(part, importance, first, rule, even, room, signs, lanes)
    guess(lanes, groups, grid[0], grid[1], 0, float32(5))
    on_grid.search(values, roots, blocks, lanes, groups, grid, SHIFTS_OF_8, 9, float32(0.1))
    ask_again(lanes, groups, grid[0])
    on_grid.settle(values, roots, blocks, lanes, groups, grid, SHIFTS_OF_8, False)
    least, mask = (NOTHING, 127) if even else (LITTLE, 255)
    finish(lanes, groups, grid[0], least, mask, SHIFTS_OF_8, signs)


@kernel
def quantize_iq2_xs(x: Floats, importance: Floats, cells: Ints, codes: Ints, out: Bytes) -> None:
    """16 sub-blocks, 7 signs stored of 8."""
    rows, packed = x.reshape(-1, 16), out.reshape(-1, 74)
    room = make_room(16)
    lanes = np.empty((on_grid.ROWS, LANES), np.float32)
    groups = np.empty((on_grid.PARTS, 2, LANES), np.int32)
    signs, levels = np.empty((LANES, 2), np.uint8), np.empty(16, np.uint8)
    for first in range(0, len(rows), LANES):
        part, group = rows[first : first + LANES], packed[first // 16 : (first + LANES) // 16]
        found = lanes, groups, signs
        search_16(part, importance, first, (cells, codes), (ONE, ZERO), True, room, found)
        for n in range(len(group)):
            put_scales(lanes[SCALE, 16 * n : 16 * n + 16], ONE, levels, group[n, 0:2])
            for k in range(32):
                number = groups[on_grid.CELL, k % 2, 16 * n + k // 2]
                bits = number | int32(signs[16 * n + k // 2, k % 2]) << int32(9)
                group[n, 2 + 2 * k] = bits & 255
                group[n, 3 + 2 * k] = bits >> 8
            for k in range(8):
                group[n, 66 + k] = levels[2 * k] | levels[2 * k + 1] << 4
            if not levels.any() and group[n, 0] == 0 and group[n, 1] == 0:
                group[n, 2:66] = 0


@kernel
def quantize_iq2_s(x: Floats, importance: Floats, cells: Ints, codes: Ints, out: Bytes) -> None:
    """16 sub-blocks, all signs."""
    rows, packed = x.reshape(-1, 16), out.reshape(-1, 82)
    room = make_room(16)
    lanes = np.empty((on_grid.ROWS, LANES), np.float32)
    groups = np.empty((on_grid.PARTS, 2, LANES), np.int32)
    signs, levels = np.empty((LANES, 2), np.uint8), np.empty(16, np.uint8)
    for first in range(0, len(rows), LANES):
        part, group = rows[first : first + LANES], packed[first // 16 : (first + LANES) // 16]
        found = lanes, groups, signs
        search_16(part, importance, first, (cells, codes), (float32(2), float32(0.25)), False, room, found)
        for n in range(len(group)):
            put_scales(lanes[SCALE, 16 * n : 16 * n + 16], float32(0.9875), levels, group[n, 0:2])
            group[n, 66:74] = 0
            for k in range(32):
                number = groups[on_grid.CELL, k % 2, 16 * n + k // 2]
                group[n, 2 + k] = number & 255
                group[n, 34 + k] = signs[16 * n + k // 2, k % 2]
                group[n, 66 + k // 4] |= number >> 8 << k % 4 * 2
            for k in range(8):
                group[n, 74 + k] = levels[2 * k] | levels[2 * k + 1] << 4


def _with_grid(name: str, quantize: Any) -> Callable[[Floats, Floats, Bytes], None]:
    def run(x: Floats, importance: Floats, out: Bytes) -> None:
        found = grid(name)
        quantize(x, importance, found.cells, found.codes, out)

    return run


KERNELS: dict[str, Callable[[Floats, Floats, Bytes], None]] = {
    name: _with_grid(name, quantize)
    for name, quantize in (
        ("iq3_xxs", quantize_iq3_xxs),
        ("iq3_s", quantize_iq3_s),
        ("iq2_xxs", quantize_iq2_xxs),
        ("iq2_xs", quantize_iq2_xs),
        ("iq2_s", quantize_iq2_s),
    )
}
