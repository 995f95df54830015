"""The model that the errors of an output's weights foretell, which its predictions are held against.

It is run by the checkpoint's own config, with its norms and biases, and with the output's matrices. A matrix
whose error does more to its outputs than its type's may is taken with a smaller error, of plain rounding's
size. A faithful output is that model, or nearly: what its config changes, or a matrix that is wrong, is not
foretold.
"""

from __future__ import annotations

import math
from typing import TypeVar

from dsconvert.proof.nearest_rows import loss_foretold, lost, most_lost
from dsconvert.proof.row_sums import Matrix
from dsconvert.proof.thresholds import snr_floor

Weights = TypeVar("Weights")  # an array of numpy or a tensor of torch


def share(kind: str, snr: float, less: float | None, loss: float | None, fed: bool = False) -> float:
    """How much of the error of a matrix of type `kind` is foretold, 0 to 1.

    `snr` and `less` are its signal to noise and how much of that it loses to plain rounding, in dB, `loss`
    the squared error of its outputs by that of plain rounding. Where it was not run, a matrix that loses more
    than its type may, or is below its type's floor, is judged by its weights. `fed` says that error feedback
    chose its codes.
    """
    if loss is not None and math.isfinite(snr):
        return 1.0 if loss <= loss_foretold(kind, fed) else 1 / math.sqrt(loss)
    if less is None or not math.isfinite(less):
        return 1.0 if snr >= snr_floor(kind) else 0.0
    return 1.0 if less <= most_lost(kind, fed) else float(10 ** (-less / 20))


def share_of(matrix: Matrix, kind: str) -> float:
    """The `share` of a matrix that is not run through a block, as if its codes were by error feedback."""
    rounded = matrix.against_nearest()
    return share(kind, matrix.decibel, None if rounded is None else lost(rounded, kind), None, fed=True)


def between(base: Weights, candidate: Weights, part: float) -> Weights:
    """The base's weights with so much of the candidate's error: one of the two for 0 and 1."""
    if part in (0, 1):
        return candidate if part else base
    return base + part * (candidate - base)  # type: ignore[operator, no-any-return]
