"""The grids of the iq2 and iq3 types: which groups of levels have a code, and what stands for the others.

A group of 8 (iq2) or 4 (iq3) levels is stored as the number of a point of a grid. The points are those of the
`gguf` library's readers. For a group off the grid ggml tries the points nearest to it: those at the 1 to 3
smallest distances, in the order of distance and number (iq2xs_init_impl, iq3xs_init_impl).

A *cell* is the index of a group: the level of value j at bit BITS j. A *code* packs the levels of a
point for the search, 4 bits a value, of which the low ones are the level; see grid_vectors.
Importing this module imports numba.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.kernels.vectors import WIDTH

Ints = npt.NDArray[np.int32]
Levels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.integer[Any]]
BITS, TOPS = {8: 2, 4: 3}, {8: 3, 4: 8}  # by the size of a group: the bits of a level, how many levels
# How many different distances of points ggml tries (its nwant).
DISTANCES = {"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3}


@dataclass(frozen=True)
class Grid:
    """A grid and its neighbours, as arrays for the kernels.

    `cells` [n_cells, 3]: where the codes of a cell's candidates start in `codes`, how many vectors of WIDTH
    they fill, and the number of the point that the cell is, or -1. `codes` is int32: the candidates lane by
    lane, so that of equals the first lane's first counts; the last is repeated to fill the lanes.
    """

    cells: Ints
    codes: Ints


@cache
def grid(name: str) -> Grid:
    """The grid of a type, made once."""
    levels = points(name)
    size = levels.shape[1]
    groups = np.indices((TOPS[size],) * size).reshape(size, -1).T
    at = np.bitwise_or.reduce(groups << BITS[size] * np.arange(size), axis=1)
    order, found = _candidates(groups, levels.astype(np.int64), DISTANCES[name])
    vectors = -(-found // WIDTH)
    starts = np.concatenate([[0], np.cumsum(vectors * WIDTH)])
    cells = np.full((1 << BITS[size] * size, 3), -1, np.int32)
    on_grid = (groups == levels[order[:, 0]]).all(axis=1)
    cells[at] = np.stack([starts[:-1], vectors, np.where(on_grid, order[:, 0], -1)], axis=1)
    cell = np.repeat(np.arange(len(groups)), vectors * WIDTH)
    slot = np.arange(starts[-1]) - starts[cell]
    rank = slot % WIDTH * vectors[cell] + slot // WIDTH
    return Grid(cells, packed(levels)[order[cell, np.minimum(rank, found[cell] - 1)]])


def _candidates(groups: Numbers, levels: Numbers, distances: int) -> tuple[Numbers, Numbers]:
    """The points by distance and number, [n_groups, n], and how many of them are candidates."""
    n = len(levels)
    squares = (groups**2).sum(axis=1)[:, None] + (levels**2).sum(axis=1) - 2 * groups @ levels.T
    by_distance, order = np.divmod(np.sort((squares * n + np.arange(n)).astype(np.int32), axis=1), n)
    steps = np.cumsum(np.diff(by_distance, axis=1) > 0, axis=1)
    count = np.where(by_distance[:, 0] > 0, distances, 1)  # a point stands for itself alone
    return order, 1 + (steps < count[:, None]).sum(axis=1)


def points(name: str) -> Levels:
    """The levels [n, 8 or 4] of the points of a grid, by number."""
    import gguf.quants as readers

    reader: Any = getattr(readers, name.upper())
    reader.init_grid()
    values = np.array(reader.grid_map, dtype=np.float32)
    found = np.asarray(reader.grid).reshape(reader.grid_shape)
    levels = np.searchsorted(values, found)
    if not np.array_equal(values[levels], found):
        raise ValueError(f"the grid of {name} holds other values than its map")
    return levels.astype(np.uint8)


def packed(levels: Levels) -> Ints:
    """The code of each group: value j in the bits from 4 j on, above its level its place in a vector."""
    size = levels.shape[1]
    at = np.arange(size)
    fields = levels.astype(np.uint32) | (at << BITS[size] & 15).astype(np.uint32)
    codes: npt.NDArray[np.uint32] = np.bitwise_or.reduce(fields << (4 * at).astype(np.uint32), axis=1)
    return codes.view(np.int32)
