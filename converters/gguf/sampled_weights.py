"""Sampled rows of the tensors of a written file, dequantized, against the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from converters.gguf.parse import GGUFFile, StoredTensor
from converters.gguf.rounding import nearest
from dsconvert.events import Check
from dsconvert.models.stored_rows import stored_rows
from dsconvert.models.tensor_table import Spec
from dsconvert.models.weights import WeightSource, widened
from dsconvert.proof import thresholds
from dsconvert.proof.block_sample import sampled_rows
from dsconvert.proof.figures import RowFault
from dsconvert.proof.row_faults import faults, told
from dsconvert.proof.row_sums import Matrix


def check_weights(
    checkpoint: WeightSource, file: GGUFFile, specs: Sequence[Spec], head_dim: int = 0
) -> Iterator[Check]:
    """Sampled rows of every matrix, and every vector, dequantized, against the source.

    Together they have the signal to noise of their type, and each row on its own is the checkpoint's.
    """
    worst: tuple[float, str, str] | None = None
    rows = 0
    for spec in specs:
        stored = file.tensors[spec.gguf]
        kind, matrix = stored.qtype.name, sampled(spec, checkpoint, stored)
        snr, floor = matrix.decibel, thresholds.snr_floor(kind)
        wrong = row_faults(spec, head_dim, matrix, stored)
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


def sampled(spec: Spec, source: WeightSource, stored: StoredTensor) -> Matrix:
    """Sampled rows of a matrix, or all of a vector, of source and file; numbered as the source's."""
    if len(stored.shape) == 1:
        exact = widened(stored_rows(spec, source.rows, 0, spec.rows))
        return Matrix().add(exact.reshape(1, -1), stored.rows(0, 1))
    matrix, rows, labels = Matrix(), spec.rows, numbers(spec)
    for chosen in sampled_rows(rows):
        first, end = chosen.start, chosen.stop
        exact = widened(stored_rows(spec, source.rows, first, end))
        rounded = nearest(exact, stored.qtype) if not first else None  # a call costs what 8 rows cost
        matrix.add(exact, stored.rows(first, end), rounded, labels=labels[first:end])
    return matrix


def row_faults(spec: Spec, head_dim: int, matrix: Matrix, stored: StoredTensor) -> tuple[RowFault, ...]:
    """What is wrong with the sampled rows of a matrix."""
    if len(stored.shape) != 2:
        return ()
    return faults(matrix, spec.hf, stored.qtype.name, head_dim)


def numbers(spec: Spec) -> npt.NDArray[np.int64]:
    """The number in the source's own order of each stored row of a matrix."""
    if spec.rows != spec.source[0]:
        return np.arange(spec.rows)
    return stored_rows(spec, lambda name, start, stop: np.arange(start, stop), 0, spec.rows).reshape(-1)
