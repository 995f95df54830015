"""GPTQ's inner loop: the columns of a run one by one, each error made up for by the columns after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import float64, uint8

from dsconvert.compile import kernel
from dsconvert.quantization.kernels import LANES
from dsconvert.quantization.kernels.half import to_half

Floats = npt.NDArray[Any]


@kernel
def sweep(
    W1: Floats,
    W: Floats,
    U: Floats,
    D: Floats,
    shift: float,
    scale: Floats,
    zero: Floats,
    group: npt.NDArray[np.int64],
    maxq: int,
    half: bool,
    codes: npt.NDArray[np.uint8],
    Err: Floats,
    losses: npt.NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Round W1 [B, N], which is W with the errors before the run made up for, to the grid of each column.

    Writes `codes` and Err = W - Q, and adds D_i (W1_i - Q_i)^2 - shift Err_i^2 to the `losses` [N]. Column i
    is on row group[i] of `scale` and `zero` [G, N]; with `half` its values are rounded to float16.
    """
    rows, none, top = len(W), W.dtype.type(0), W.dtype.type(maxq)
    w1, err = np.zeros((rows, LANES), W.dtype), np.zeros(LANES, W.dtype)
    for n in range(start, stop, LANES):
        width = min(LANES, stop - n)
        for i in range(rows):
            for lane in range(width):
                w1[i, lane] = W1[i, n + lane]
        for i in range(rows):
            g = group[i]
            for lane in range(width):
                w, s, z = w1[i, lane], scale[g, n + lane], zero[g, n + lane]
                q = min(max(np.rint(w / s) + z, none), top)
                codes[i, n + lane] = uint8(q)
                value = (q - z) * s
                if half:
                    value = W.dtype.type(to_half(value))
                err[lane] = W[i, n + lane] - value
                Err[i, n + lane] = err[lane]
                miss = float64(w - value)
                losses[n + lane] += D[i] * miss * miss - shift * float64(err[lane]) * float64(err[lane])
            for k in range(i + 1, rows):
                u = U[i, k]
                for lane in range(LANES):
                    w1[k, lane] += u * err[lane]
