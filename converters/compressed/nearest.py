"""The tensors of schemes that are rounded to nearest, of every linear, made in a stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from converters.compressed.fused import fused_with
from converters.compressed.plan import Job
from converters.compressed.rounded import Rows, Weight, largest
from dsconvert.checkpoints.fp8 import scale_values
from dsconvert.checkpoints.safetensors_writer import Piece, from_array, from_stored
from dsconvert.models.weights import WeightSource, widened


def rounded_pieces(job: Job) -> dict[str, Piece]:
    """The tensors of every linear, by name; each is made when it is written, from the checkpoint's rows."""
    source, linears = job.model.source, job.model.linears
    shapes = {name: (linear.shape[0], linear.shape[1]) for name, linear in linears.items()}
    together = largest_together(job)
    found: dict[str, Piece] = {}
    for name, linear in linears.items():
        outputs, inputs = shapes[name]
        weight = Weight(outputs, inputs, _rows(source, name), partial(together, name))
        pieces = passed_through(job, name) or job.options.row.pieces(weight)
        found |= {f"{linear.stem}.{part}": piece for part, piece in pieces.items()}
    return found


def passed_through(job: Job, name: str) -> dict[str, Piece]:
    """The tensors of a linear that a checkpoint stores in fp8 with the same blocks, as they are; else none.

    Scales that are powers of two become float32, which holds them.
    """
    stored = job.model.checkpoint.tensors.get(name)
    shapes = job.options.row.shapes(*job.model.linears[name].shape)
    if job.options.row.type != "fp8" or stored is None or not stored.parts:
        return {}
    codes, scales = stored.parts
    if (codes.shape, scales.shape) != (shapes["weight"][1], shapes["weight_scale"][1]):
        return {}
    return {"weight": from_stored(codes), "weight_scale": from_array(scale_values(scales))}


def _rows(source: WeightSource, name: str) -> Rows:
    return lambda start, stop: widened(source.rows(name, start, stop))


def largest_together(job: Job) -> Callable[[str], float]:
    """What gives the largest magnitude of a linear and of those that are fused with it; each is read once."""
    source, linears = job.model.source, job.model.linears

    @cache
    def own(name: str) -> float:
        outputs, inputs = linears[name].shape
        return largest(Weight(outputs, inputs, _rows(source, name)))

    return lambda name: max(map(own, fused_with(name, linears)))
