"""The flow of `dsconvert mlx`: plan, solve block by block or round, write the folder, prove it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from converters.mlx import reader
from converters.mlx.affine import Affine, Floats, grids
from converters.mlx.opened import open_folder
from converters.mlx.pack import pack
from converters.mlx.plan import SPLIT, Job, Options, prepare
from converters.mlx.rounded import rounded_pieces
from converters.mlx.settings import affine_settings, quantization_settings
from converters.mlx.solver import SolverOptions, searched_ranges, solve
from dsconvert.calibration.record import Calibration
from dsconvert.checkpoints.quantized import Linear
from dsconvert.checkpoints.safetensors_reader import Stored
from dsconvert.checkpoints.safetensors_writer import Piece
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.decoder.numpy_decoder import EMBED, HEAD
from dsconvert.events import Event, Finished, Planned, Step
from dsconvert.quantization.error_feedback import shared_factors
from dsconvert.quantization.folder import write_quantized
from dsconvert.quantization.gptq_solver import rounds_for
from dsconvert.quantization.plan import notes, rows_of, stored_tensors
from dsconvert.quantization.proof import prove_folder
from dsconvert.quantization.ranks import ALONE, Ranks
from dsconvert.quantization.run import Coded, Format, Run, Solving, run
from dsconvert.quantization.tied_table import Sensitivities, looked_up_too, of_table

if TYPE_CHECKING:
    import torch


def convert(options: Options, ranks: Ranks = ALONE) -> Iterator[Event]:
    """Quantize a checkpoint to an MLX folder as `options` say, yielding what happens.

    Of several `ranks`, processes that all call this, the first draws the text, writes and proves.
    Raises ConversionError before any work for everything that can be known by then. A run that is stopped
    leaves the blocks that it finished beside the output, for `resume`, and nothing under the final name.

    >>> from pathlib import Path
    >>> from converters.mlx.plan import Options
    >>> from converters.outputs import open_output
    >>> from dsconvert.quantization.plan import RunOptions
    >>> run = RunOptions("sample:", out=Path("sample-mlx"), effort="off")
    >>> events = list(convert(Options(run, bits=4)))
    >>> opened = open_output(Path("sample-mlx"))
    >>> opened.kind, opened.quant
    ('MLX', 'mlx-4bit-64g')
    """
    started = time.monotonic()
    with ranks.together():
        job = prepare(options)
    yield from describe(job)
    if options.calibrated:
        yield from run(job, partial(_chosen, job), ranks, started)
    else:
        yield from convert_rounded(job, started)


def convert_rounded(job: Job, started: float) -> Iterator[Event]:
    """Write a folder whose weights are rounded to nearest, in a stream, and prove it."""
    yield Step(f"rounding to {job.options.bits} bits, and writing")
    pieces = {out: piece for name in job.solved for out, piece in rounded_pieces(job, name).items()}
    nbytes = write(job, {}, pieces)
    yield Finished(str(job.out), nbytes, time.monotonic() - started)
    yield from prove_folder(job, lambda: open_folder(job.out), stored_tensors(job.model, job.kinds))
    check_unchanged(job.model.checkpoint.seen)  # else something else was proven


def describe(job: Job) -> Iterator[Event]:
    """What will be written, to the byte."""
    yield from notes(job)
    model, options = job.model, job.options
    rows = tuple(rows_of(model, job.kinds, job.nbytes))
    quant = f"mlx {options.bits} bits, group {options.group_size}"
    yield Planned((str(job.out),), quant, rows, (job.total,), model.checkpoint.nbytes, "as it is")


def _chosen(job: Job, begun: Run) -> Generator[Event, None, Format]:
    sensitive = (yield from of_table(begun)) if job.of_both else None
    return format_of(job, begun.calibration, sensitive)


def format_of(job: Job, calibration: Calibration, sensitive: Sensitivities | None) -> Format:
    """What an MLX folder adds to the run; a head whose table is the embedding is `sensitive` to both."""
    model, factorize = job.model, shared_factors()

    def solved(name: str, W: torch.Tensor, H: torch.Tensor, few: str | None) -> Coded:
        if name == HEAD and sensitive is not None:
            H = looked_up_too(H, sensitive)
        found = solve(W, H, solver_options(job, name), factorize, few)
        parts = (found.codes, found.scales, found.biases)
        codes, scales, biases = (part.T.contiguous().cpu().numpy() for part in parts)
        packed = pack(codes, scales, biases, job.affine(name), job.dtype(name))
        return found, {f"{job.linear(name).stem}.{p}": a for p, a in packed.items()}, found.dequantized()

    def restored(name: str, stored: Mapping[str, Stored]) -> torch.Tensor:
        import torch

        linear, affine = model.linears[name], job.affine(name)
        parts = {part: stored[f"{linear.stem}.{part}"] for part in reader.PARTS}
        outputs, inputs = linear.shape
        one = Linear(linear.stem, outputs, inputs, affine.type, affine, reader.KIND, parts)
        return torch.from_numpy(one.kind.rows(one, 0, outputs))

    solving = Solving(
        settings={name: job.affine(name).type for name in job.solved},
        nbytes={name: job.nbytes(name) for name in job.solved},
        solve=solved,
        restore=restored,
        head=HEAD in job.solved,
        kept=frozenset(name for name in model.kept.values() if name.endswith(SPLIT)),
        passes=2.0 + 5.0 * rounds_for(job.options.rounds, job.options.bits),
    )
    return Format(
        solving,
        write=lambda pieces, fell_back: write(job, provenance(job, calibration, fell_back), pieces),
        opened=lambda: open_folder(job.out),
        planned=stored_tensors(model, job.kinds),
    )


def solver_options(job: Job, name: str) -> SolverOptions:
    """How a linear is solved."""
    options = job.options
    settings = job.affine(name)
    rounds = rounds_for(options.rounds, settings.bits)
    return SolverOptions(settings, job.dtype(name), options.act_order, options.damp, options.mse, rounds)


def provenance(job: Job, calibration: Calibration, fell_back: Mapping[str, str]) -> Mapping[str, Any]:
    """What the weights depend on besides the checkpoint, and which linears fell back."""
    options = job.options
    found: dict[str, Any] = {"damp": options.damp, "act_order": options.act_order, "mse": options.mse}
    if rounds := rounds_for(options.rounds, options.bits):
        found["rounds"] = rounds
    found["calibration"] = calibration.report.as_dict()
    return found | ({"round_to_nearest": fell_back} if fell_back else {})


def _searched(options: SolverOptions, rows: Floats, settings: Affine) -> tuple[Floats, Floats]:
    return searched_ranges(rows, options)


def write(job: Job, provenance: Mapping[str, Any], pieces: Mapping[str, Piece]) -> int:
    """The folder, of what is kept and of the linears' `pieces`; returns the bytes of its weights.

    An embedding of its own is rounded now: it has no inputs that a calibration could measure. Where the
    others' ranges were searched its own are, too.
    """
    model, options = job.model, job.options
    embedding: dict[str, Piece] = {}
    if EMBED in model.linears and not job.of_both:
        search = options.calibrated and options.mse
        ranges = partial(_searched, solver_options(job, EMBED)) if search else grids
        embedding = rounded_pieces(job, EMBED, ranges)
    raw = {**model.raw, "quantization": affine_settings(job)}
    settings = quantization_settings(job, provenance)
    stated = replace(job, model=replace(model, raw=raw))
    return write_quantized(stated, {**embedding, **pieces}, settings, model.files)
