"""Sampled rows of the tensors of a written file, dequantized, against the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.parse import GGUFFile, StoredTensor
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.events import Check
from dsconvert.models.tensor_table import IDENTITY, ROPE_K, ROPE_Q, Sizes, Spec
from dsconvert.proof import thresholds
from dsconvert.proof.figures import RowFault
from dsconvert.proof.row_faults import faults, told
from dsconvert.proof.row_sums import Matrix

SAMPLED = (8, 4)  # rows in a row, places: how much of every matrix is compared with its source


def check_weights(
    checkpoint: Checkpoint, file: GGUFFile, specs: Sequence[tuple[Spec, Sizes]]
) -> Iterator[Check]:
    """Sampled rows of every matrix, and every vector, dequantized, against the source.

    Together they have the signal to noise of their type, and each row on its own is the checkpoint's.
    """
    worst: tuple[float, str, str] | None = None
    rows = 0
    for spec, config in specs:
        stored = file.tensors[spec.gguf]
        kind, matrix = stored.qtype.name, sampled(spec, config, checkpoint.raw(spec.hf), stored)
        snr, floor = matrix.decibel, thresholds.snr_floor(kind)
        wrong = row_faults(spec, config, matrix, stored)
        if wrong and not (snr < floor and 2 * len(wrong) > matrix.count):
            yield Check("weights", False, f"{spec.gguf} ({spec.hf}): {told(wrong)}", float(len(wrong)))
            return
        if not snr >= floor:
            detail = f"{spec.gguf}: signal to noise {snr:.1f} dB, {kind} should reach {floor:g} dB"
            yield Check("weights", False, detail, snr)
            return
        rows += matrix.count if len(stored.shape) > 1 else 0
        if worst is None or snr - floor < worst[0]:
            worst = (snr - floor, spec.gguf, f"{snr:.1f} dB ({kind})")
    if worst:
        detail = (
            f"{len(specs)} tensors sampled, {rows:,} rows each on its own; nearest to its floor {worst[1]}"
        )
        yield Check("weights", True, f"{detail}, {worst[2]}", worst[0])


def sampled(spec: Spec, config: Sizes, raw: npt.NDArray[Any], stored: StoredTensor) -> Matrix:
    """Sampled rows of a matrix, or all of a vector, of source and file; numbered as the source's."""
    view = spec.forward(raw, config)
    if len(stored.shape) == 1:  # a norm or a bias, which RoPE's order gives more axes
        return Matrix().add(_widened(view).reshape(1, -1), stored.float32_rows(0, 1))
    matrix, (rows, labels) = Matrix(), (prod(view.shape[:-1]), numbers(spec, config, raw.shape[0]))
    length, places = SAMPLED
    starts = {int(at) for at in np.linspace(0, max(rows - length, 0), places)}
    seen = np.zeros(rows, bool)
    for start in sorted(starts):
        chosen = np.arange(start, min(start + length, rows))
        chosen = chosen[~seen[chosen]]
        seen[chosen] = True
        exact = _widened(view[np.unravel_index(chosen, view.shape[:-1])])
        found = stored.float32_rows(int(chosen[0]), int(chosen[-1]) + 1)
        matrix.add(exact, found, labels=labels[chosen])
    return matrix


def row_faults(spec: Spec, config: Sizes, matrix: Matrix, stored: StoredTensor) -> tuple[RowFault, ...]:
    """What is wrong with the sampled rows of a matrix."""
    if len(stored.shape) != 2:
        return ()
    head_dim = getattr(config, "head_dim", 0) if spec.row.transform in (ROPE_Q, ROPE_K, IDENTITY) else 0
    return faults(matrix, spec.hf, stored.qtype.name, head_dim)


def numbers(spec: Spec, config: Sizes, rows: int) -> npt.NDArray[np.int64]:
    """The number in the source's own order of each stored row of a matrix."""
    if spec.row.transform in (ROPE_Q, ROPE_K):
        return spec.forward(np.arange(rows), config).reshape(-1)
    return np.arange(prod(spec.shape[:-1]))


def _widened(raw: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
