"""Sampled rows of the tensors of a written file, dequantized, against the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.parse import GGUFFile, StoredTensor
from dsconvert import thresholds
from dsconvert.arch import Sizes, Spec
from dsconvert.checkpoint import Checkpoint
from dsconvert.events import Check

SAMPLED = (8, 4)  # rows in a row, places: how much of every tensor is compared with its source


def check_weights(
    checkpoint: Checkpoint, file: GGUFFile, specs: Sequence[tuple[Spec, Sizes]]
) -> Iterator[Check]:
    """Sampled rows of every tensor, dequantized, against the source: the signal to noise of each type."""
    worst: tuple[float, str, str] | None = None
    for spec, config in specs:
        stored = file.tensors[spec.gguf]
        kind = stored.qtype.name
        snr = sampled_snr(spec.forward(checkpoint.raw(spec.hf), config), stored)
        floor = thresholds.snr_floor(kind)
        if not snr >= floor:
            detail = f"{spec.gguf}: signal to noise {snr:.1f} dB, {kind} should reach {floor:g} dB"
            yield Check("weights", False, detail, snr)
            return
        if worst is None or snr - floor < worst[0]:
            worst = (snr - floor, spec.gguf, f"{snr:.1f} dB ({kind})")
    if worst:
        detail = f"{len(specs)} tensors sampled; nearest to its floor {worst[1]}, {worst[2]}"
        yield Check("weights", True, detail, worst[0])


def sampled_snr(view: npt.NDArray[Any], stored: StoredTensor) -> float:
    """Signal to noise in dB of sampled rows against the source's view; infinite when they are equal."""
    if len(stored.shape) == 1:  # a norm or a bias, which RoPE's order gives more axes
        view = view.reshape(1, -1)
    rows = prod(view.shape[:-1])
    length, places = SAMPLED
    starts = {int(at) for at in np.linspace(0, max(rows - length, 0), places)}
    noise = signal = 0.0
    for start in starts:
        index = np.unravel_index(np.arange(start, min(start + length, rows)), view.shape[:-1])
        exact = _widened(view[index])
        error = stored.float32_rows(start, start + len(exact)).reshape(exact.shape) - exact
        noise += float(np.sum(np.square(error, dtype=np.float64)))
        signal += float(np.sum(np.square(exact, dtype=np.float64)))
    if noise == 0.0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal else float("-inf")


def _widened(raw: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
