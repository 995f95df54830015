"""What a tensor of an output lost: its signal to noise, the rows that are wrong, and why."""

from __future__ import annotations

from dsconvert.models.weights import WeightSource, widened
from dsconvert.proof.figures import TensorError
from dsconvert.proof.nearest_rows import lost
from dsconvert.proof.row_faults import Floats, faults, fed
from dsconvert.proof.row_sums import Matrix

LITTLE = 0.5  # dB that a matrix loses without any reason to ask why


def tensor_error(
    sources: tuple[WeightSource, WeightSource], names: tuple[str, str], matrix: Matrix, head_dim: int
) -> TensorError:
    """What the sums over a tensor of both sources say; its rows count where it is a matrix."""
    kind, shape = sources[1].dtype(names[1]), sources[1].shapes()[names[1]]
    if len(shape) != 2:
        return TensorError(names[1], kind, shape, matrix.decibel)
    rounded = matrix.against_nearest()

    def again(row: int) -> tuple[Floats, Floats]:
        base, candidate = (widened(s.rows(n, row, row + 1)) for s, n in zip(sources, names, strict=True))
        return base[0], candidate[0]

    less = None if rounded is None else lost(rounded, kind)
    by_feedback = less is not None and less > LITTLE and fed(shape[0], kind, again)
    found = faults(matrix, names[1], kind, head_dim, again, by_feedback)
    return TensorError(names[1], kind, shape, matrix.decibel, matrix.count, found, less, fed=by_feedback)
