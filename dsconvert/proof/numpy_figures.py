"""The figures of the quick comparison in numpy; `figures` has them in torch, the oracle of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.proof.figures import TOP

Floats = npt.NDArray[np.float32]


def length(x: Floats) -> npt.NDArray[np.float64]:
    """The Euclidean length of each row."""
    found: npt.NDArray[np.float64] = np.sqrt(np.einsum("...d,...d->...", x, x, dtype=np.float64))
    return found


def hidden_error(base: Floats, candidate: Floats) -> tuple[float, float]:
    """The means over tokens of |q - base| / |base| and of the cosine; see figures.BlockError."""
    sizes, error = np.maximum(length(base), 1e-38), length(candidate - base)
    dots = np.einsum("...d,...d->...", base, candidate, dtype=np.float64)
    cosine = np.where(error == 0, 1.0, dots / (sizes * np.maximum(length(candidate), 1e-38)))
    return float(np.mean(error / sizes)), float(np.mean(cosine))


def token_figures(base: Floats, candidate: Floats, targets: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Logits [tokens, vocab] of both and the tokens that follow: the measured columns of TokenFigures."""
    logs = [_log_softmax(base), _log_softmax(candidate)]
    count = min(TOP, base.shape[1])
    best = [np.argpartition(-x, count - 1, 1)[:, :count] for x in logs]
    rows = np.arange(len(targets))
    return {
        "nll_base": -logs[0][rows, targets],
        "nll": -logs[1][rows, targets],
        "kld": _kld(*logs),
        "top_base": base.argmax(1),
        "top": candidate.argmax(1),
        "overlap": (best[0][:, :, None] == best[1][:, None, :]).any(2).mean(1),
    }


def kld(base: Floats, candidate: Floats) -> npt.NDArray[np.float64]:
    """KL(base || candidate) of logits [tokens, vocab], in nats [tokens]."""
    return _kld(_log_softmax(base), _log_softmax(candidate))


def _kld(base: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.maximum(np.sum(np.exp(base) * (base - candidate), 1), 0.0)
    return found


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x
