"""The error of every output with each of several scales, on a grid symmetric but for its lowest code."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import float64

from dsconvert.compile import kernel
from dsconvert.quantization.kernels import LANES

Floats = npt.NDArray[Any]


@kernel
def errors(
    w: Floats,
    scale: Floats,
    cost: Floats,
    zero: int,
    total: npt.NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Write what rounding `w` [rows, N] to each of `scale` [P, N] costs, the `total` [P, N].

    Codes go from -zero to zero - 1; a squared error in row i costs `cost` [rows].
    """
    rows, low, high = len(w), w.dtype.type(-zero), w.dtype.type(zero - 1)
    tile, inverse, sums = np.zeros((rows, LANES), w.dtype), np.zeros(LANES, w.dtype), np.zeros(LANES, w.dtype)
    for n in range(start, stop, LANES):
        width = min(LANES, stop - n)
        for i in range(rows):
            for lane in range(width):
                tile[i, lane] = w[i, n + lane]
        for p in range(len(scale)):
            for lane in range(width):
                inverse[lane] = w.dtype.type(1) / scale[p, n + lane]
                sums[lane] = w.dtype.type(0)
            for i in range(rows):
                c = cost[i]
                for lane in range(LANES):
                    x = tile[i, lane] * inverse[lane]
                    miss = min(max(np.rint(x), low), high) - x
                    sums[lane] += c * (miss * miss)
            for lane in range(width):
                s = float64(scale[p, n + lane])
                total[p, n + lane] = s * s * sums[lane]
