"""Weights and inputs for error feedback on grids that are known beforehand, and its walk by the formula."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from dsconvert.quantization.static_blocks import Blocks

F64 = npt.NDArray[np.float64]
K, N = 512, 24


@cache
def problem(rows: int = N, columns: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and H of inputs that lie near 40 dimensions and are of very different size."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = normal(2000, 40) @ normal(40, columns) + 0.3 * normal(2000, columns)
    X *= torch.exp(0.7 * normal(columns))
    return normal(rows, columns) * 0.02, 2 / len(X) * X.T @ X


def naive_walk(Wt: F64, H: F64, columns: npt.NDArray[np.int64], blocks: Blocks) -> npt.NDArray[np.uint8]:
    """The codes by the paper: Cholesky of the inverse, a column at a time."""
    kind, W, codes = blocks.kind, Wt.T[:, columns].copy(), np.zeros(Wt.shape, np.uint8)
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(columns, columns)])).T
    steps = blocks.steps.numpy()
    lows = np.zeros_like(steps) if blocks.lows is None else blocks.lows.numpy()
    levels = np.array(kind.values) if kind.values else np.arange(kind.top + 1.0) - kind.zero
    for i, column in enumerate(columns):
        a, c = steps[column // kind.sub], lows[column // kind.sub]
        values = a[:, None] * levels + c[:, None]
        codes[column] = abs(W[:, i, None] - values).argmin(1)
        error = (W[:, i] - np.take_along_axis(values, codes[column][:, None].astype(int), 1)[:, 0]) / U[i, i]
        W[:, i:] -= error[:, None] * U[i, i:]
    return codes
