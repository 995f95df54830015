"""Coordinate descent on codes: each moves to where the loss is least while all others stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import uint8

from dsconvert.compile import inlined, kernel
from dsconvert.quantization.kernels import LANES

Floats = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
PASSES = 64  # at the most over a run of columns; last bits could move two codes to and fro for ever
MARGIN = 1e-6  # of a move's own cost: what it must gain at the least


@inlined
def _nearest(values: Floats, code: Any, wanted: Any) -> Any:
    """The number of the one of the rising `values` that is nearest to `wanted`, on the way from `code`."""
    half, to = values.dtype.type(0.5), code
    while to + 1 < len(values) and wanted > (values[to] + values[to + 1]) * half:
        to += 1
    while to > 0 and wanted < (values[to - 1] + values[to]) * half:
        to -= 1
    return to


@inlined
def _move(
    g: Floats, h: Any, steps: Floats, values: Floats, n: Any, codes: Codes, moves: Counts, delta: Floats
) -> bool:
    """Move the codes of a column for the outputs from n on; `delta` is what their weights grow by."""
    none, more, moved = g.dtype.type(0), g.dtype.type(1 + MARGIN), False
    for lane in range(min(LANES, len(steps) - n)):
        delta[lane] = none
        step, code = steps[n + lane], int(codes[n + lane])
        if step != none and h > none:
            to = _nearest(values, code, values[code] + g[lane] / (h * step))
            change = (values[to] - values[code]) * step
            if to != code and change * (change * h * more - (g[lane] + g[lane])) < none:
                codes[n + lane], delta[lane], moved = uint8(to), change, True
                moves[n + lane] += 1
    return moved


@kernel
def descend(
    G: Floats,
    H: Floats,
    steps: Floats,
    values: Floats,
    group: Counts,
    codes: Codes,
    moves: Counts,
    start: int,
    stop: int,
) -> None:
    """Move the `codes` [B, N] of a run of columns until none moves, for G = H E [B, N] of all columns.

    H [B, B] is the run's own part. Column i is on row group[i] of `steps` [G, N], a code stands for a step
    times one of the rising `values`. Changes `codes` and G, and adds each output's moves to `moves` [N].
    """
    rows = len(G)
    g, delta = np.zeros((rows, LANES), G.dtype), np.zeros(LANES, G.dtype)
    for n in range(start, stop, LANES):
        width = min(LANES, stop - n)
        for i in range(rows):
            for lane in range(width):
                g[i, lane] = G[i, n + lane]
        for _ in range(PASSES):
            moved = False
            for i in range(rows):
                if _move(g[i], H[i, i], steps[group[i], :stop], values, n, codes[i], moves, delta):
                    moved = True
                    for k in range(rows):
                        u = H[k, i]
                        for lane in range(LANES):
                            g[k, lane] -= u * delta[lane]
            if not moved:
                break
        for i in range(rows):
            for lane in range(width):
                G[i, n + lane] = g[i, lane]
