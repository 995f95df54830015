"""Draws the next token from logits: temperature, the k likeliest, the likeliest up to a sum of p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsconvert.chat.model import Floats
from dsconvert.errors import ConversionError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `temperature` 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave none out."""

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95


def draw(logits: Floats, sampling: Sampling, random: np.random.Generator) -> int:
    """A token drawn from logits [vocab], in transformers' order of the steps.

    Raises ConversionError where the model gives no numbers.
    """
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        raise ConversionError(
            "the model gives no numbers",
            why="Its logits are NaN or infinite",
            hint="dsconvert verify OUTPUT --against CHECKPOINT says what is wrong with it",
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept = likeliest(logits, sampling.top_k)
    shares = np.exp((logits[kept].astype(np.float64) - float(logits.max())) / sampling.temperature)
    shares /= shares.sum()
    # As many as it takes to reach the sum: the likeliest one at the least.
    count = int(np.searchsorted(shares.cumsum(), sampling.top_p)) + 1
    shares = shares[:count] / shares[:count].sum()
    return int(random.choice(kept[:count], p=shares))


def likeliest(logits: Floats, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The ids of the `count` greatest logits (0: all), greatest first."""
    chosen = np.arange(len(logits))
    if 0 < count < len(logits):
        chosen = np.argpartition(logits, -count)[-count:]
    return chosen[np.argsort(-logits[chosen], kind="stable")]
