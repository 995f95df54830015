"""The search for the range of a group of weights, on GPTQ's grid of a scale and a zero point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.compile import inlined, kernel
from dsconvert.quantization.kernels import LANES
from dsconvert.quantization.kernels.half import to_half

Floats = npt.NDArray[Any]


@inlined
def _grid(
    low: Floats, high: Floats, p: Any, maxq: Any, sym: Any, tiny: Any, scale: Floats, zero: Floats
) -> None:
    """The grids of the ranges from `low` to `high` times p, as gptq_grid has them."""
    one = low.dtype.type(1)
    for lane in range(LANES):
        least, most = low[lane] * p, high[lane] * p
        s, z = (most - least) / maxq, (maxq + one) / (one + one)
        if not sym:  # a zero point below 1 is raised to 1: see gptq_grid
            s = s if np.rint(-least / s) >= one else most / (maxq - one)
        s = max(low.dtype.type(to_half(s)), tiny)
        if not sym:
            z = min(max(np.rint(-least / s), one), maxq)
        scale[lane], zero[lane] = s, z


@inlined
def _extremes(w: Floats, n: Any, width: Any, sym: Any, tile: Floats, low: Floats, high: Floats) -> None:
    """Copy a tile of outputs; the range of each holds 0, and is [-1, 1] where all weights are 0."""
    zero, one = low.dtype.type(0), low.dtype.type(1)
    low[:], high[:] = zero, zero
    for i in range(len(w)):
        for lane in range(width):
            x = w[i, n + lane]
            tile[i, lane] = x
            low[lane] = min(low[lane], x)
            high[lane] = max(high[lane], x)
    for lane in range(LANES):
        if sym:
            high[lane] = max(high[lane], -low[lane])
            low[lane] = -high[lane]
        if low[lane] == high[lane]:
            low[lane], high[lane] = -one, one


@inlined
def _cost(tile: Floats, cost: Floats, scale: Floats, zero: Floats, maxq: Any, total: Floats) -> None:
    """What rounding each output's weights to its grid costs: the sum of cost times squared error."""
    total[:] = total.dtype.type(0)
    for i in range(len(tile)):
        c = cost[i]
        for lane in range(LANES):
            x = tile[i, lane] / scale[lane]
            miss = min(max(np.rint(x), -zero[lane]), maxq - zero[lane]) - x
            total[lane] += c * (miss * miss)
    for lane in range(LANES):
        total[lane] *= scale[lane] * scale[lane]


@kernel
def find_ranges(
    w: Floats,
    cost: Floats,
    fractions: Floats,
    maxq: int,
    sym: bool,
    tiny: float,
    scale: Floats,
    zero: Floats,
    start: int,
    stop: int,
) -> None:
    """Write the `scale` and `zero` [N] of a group of weights w [group, N]: of the range that costs least.

    `fractions` of the whole range are tried in turn, and the first of equals is kept; what a squared error of
    each input costs is `cost` [group].
    """
    rows, top, least = len(w), w.dtype.type(maxq), w.dtype.type(tiny)
    tile = np.zeros((rows, LANES), w.dtype)
    space = np.zeros((8, LANES), w.dtype)
    low, high, s, z = space[0], space[1], space[2], space[3]
    total, best, kept_s, kept_z = space[4], space[5], space[6], space[7]
    for n in range(start, stop, LANES):
        width = min(LANES, stop - n)
        _extremes(w, n, width, sym, tile, low, high)
        for t in range(len(fractions)):
            _grid(low, high, fractions[t], top, sym, least, s, z)
            _cost(tile, cost, s, z, top, total)
            for lane in range(LANES):
                better = t == 0 or total[lane] < best[lane]
                best[lane] = total[lane] if better else best[lane]
                kept_s[lane] = s[lane] if better else kept_s[lane]
                kept_z[lane] = z[lane] if better else kept_z[lane]
        for lane in range(width):
            scale[n + lane], zero[n + lane] = kept_s[lane], kept_z[lane]
