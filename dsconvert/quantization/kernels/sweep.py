"""GPTQ's inner loop: the columns of a run one by one, each error made up for by the columns after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import float64, uint8

from dsconvert.compile import inlined, kernel
from dsconvert.quantization.kernels import LANES
from dsconvert.quantization.kernels.half import to_half

Floats = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]


@inlined
def _nearest(w1: Floats, scale: Floats, zero: Floats, low: Floats, n: Any, top: Any, codes: Codes) -> None:
    """The codes of w1 [LANES], and w1 as scale * (code - zero) + low; all from output n on."""
    none, width = w1.dtype.type(0), min(LANES, len(scale) - n)
    for lane in range(width):
        w, s, z = w1[lane], scale[n + lane], zero[n + lane]
        m = low[n + lane] if len(low) else none
        q = min(max(np.rint((w - m) / s) + z, none), top)
        q = q if s != none else z  # where a scale is 0 all codes are alike
        codes[n + lane] = uint8(q)
        w1[lane] = (q - z) * s + m


@inlined
def _nearest_value(w1: Floats, scale: Floats, values: Floats, n: Any, codes: Codes, space: Floats) -> None:
    """The codes of w1 [LANES], and w1 as scale * values[code]; `space` is room for [2, LANES]."""
    none, half, width = w1.dtype.type(0), w1.dtype.type(0.5), min(LANES, len(scale) - n)
    for lane in range(width):
        s = scale[n + lane]
        w1[lane] = w1[lane] / s if s != none else none
        space[0, lane], space[1, lane] = none, values[0]
    for k in range(1, len(values)):
        edge, value = (values[k - 1] + values[k]) * half, values[k]
        for lane in range(width):
            above = w1[lane] >= edge
            space[0, lane] += w1.dtype.type(1) if above else none
            space[1, lane] = value if above else space[1, lane]
    for lane in range(width):
        codes[n + lane] = uint8(space[0, lane])
        w1[lane] = space[1, lane] * scale[n + lane]


@kernel
def sweep(
    W1: Floats,
    W: Floats,
    U: Floats,
    D: Floats,
    shift: float,
    scale: Floats,
    zero: Floats,
    low: Floats,
    values: Floats,
    group: npt.NDArray[np.int64],
    maxq: int,
    half: bool,
    codes: Codes,
    Err: Floats,
    losses: npt.NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Round W1 [B, N], which is W with the errors before the run made up for, to the grid of each column.

    Writes `codes` and Err = W - Q, and adds D_i (W1_i - Q_i)^2 - shift Err_i^2 to the `losses` [N]. Column i
    is on row group[i] of `scale`, `zero` and `low` [G, N], or [G, 0] for none; with `values`, scale times one
    of these. With `half` what is stored is rounded to float16.
    """
    rows, top = len(W), W.dtype.type(maxq)
    w1, err = np.zeros((rows, LANES), W.dtype), np.zeros(LANES, W.dtype)
    value, space = np.zeros(LANES, W.dtype), np.zeros((2, LANES), W.dtype)
    for n in range(start, stop, LANES):
        width = min(LANES, stop - n)
        for i in range(rows):
            for lane in range(width):
                w1[i, lane] = W1[i, n + lane]
        for i in range(rows):
            g = group[i]
            for lane in range(width):
                value[lane] = w1[i, lane]
            if len(values):
                _nearest_value(value, scale[g, :stop], values, n, codes[i], space)
            else:
                _nearest(value, scale[g, :stop], zero[g], low[g], n, top, codes[i])
            for lane in range(width):
                q = W.dtype.type(to_half(value[lane])) if half else value[lane]
                err[lane] = W[i, n + lane] - q
                Err[i, n + lane] = err[lane]
                miss = float64(w1[i, lane] - q)
                losses[n + lane] += D[i] * miss * miss - shift * float64(err[lane]) * float64(err[lane])
            for k in range(i + 1, rows):
                u = U[i, k]
                for lane in range(LANES):
                    w1[k, lane] += u * err[lane]
