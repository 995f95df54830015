"""The tensors of matrices that are rounded to nearest as `mx.quantize` does, made in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from converters.mlx.affine import Affine, Floats, codes_of, grids
from converters.mlx.pack import PARTS, pack, stored_shapes
from converters.mlx.plan import Job
from dsconvert.checkpoints.safetensors_writer import Piece
from dsconvert.errors import ConversionError
from dsconvert.models.weights import widened

AT_ONCE = 1 << 22  # weights that are rounded together
Ranges = Callable[[Floats, Affine], tuple[Floats, Floats]]


def rounded_pieces(job: Job, name: str, ranges: Ranges = grids) -> dict[str, Piece]:
    """The tensors of a matrix by name; each is made when it is written, from the checkpoint's rows.

    `ranges` finds scales and biases [n, G] of some rows.
    """
    linear, settings, dtype = job.model.linears[name], job.affine(name), job.dtype(name)
    outputs, inputs = linear.shape
    shapes = stored_shapes(outputs, inputs, settings, dtype)

    def chunks(part: str) -> Iterator[bytes | memoryview]:
        step = max(1, AT_ONCE // inputs)
        for start in range(0, outputs, step):
            rows = widened(job.model.source.rows(name, start, min(start + step, outputs)))
            with np.errstate(invalid="ignore"):  # what is no number is told by name
                scales, biases = ranges(rows, settings)
                codes = codes_of(rows, scales, biases, settings)
            try:
                yield pack(codes, scales, biases, settings, dtype)[part].tobytes()
            except ConversionError as error:
                raise type(error)(error.what, where=name, why=error.why, hint=error.hint) from None

    return {f"{linear.stem}.{part}": Piece(*shapes[part], partial(chunks, part)) for part in PARTS}
