"""The flow of `dsconvert compressed`: plan, calibrate, solve block by block, write the folder, prove it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.compressed import fed_linears
from converters.compressed.nearest import rounded_pieces
from converters.compressed.opened import open_folder
from converters.compressed.pack import pack
from converters.compressed.plan import Job, Options, prepare
from converters.compressed.schemes import integer_weights, label_of
from converters.compressed.settings import Groups, groups_of, ignored_linears, quantization_settings
from converters.compressed.shapes import refusing_runtimes
from converters.compressed.unpack import integers
from dsconvert.calibration.record import Calibration
from dsconvert.checkpoints.safetensors_reader import Stored, values
from dsconvert.checkpoints.safetensors_writer import Piece
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.events import Event, Finished, Planned, Step, Warn
from dsconvert.quantization.bit_stream import fields
from dsconvert.quantization.blocks import Restore
from dsconvert.quantization.budget import beside_foretold
from dsconvert.quantization.error_feedback import shared_factors
from dsconvert.quantization.folder import write_quantized
from dsconvert.quantization.gptq_solver import Solved, solve
from dsconvert.quantization.plan import notes, rows_of, stored_tensors
from dsconvert.quantization.proof import prove_folder
from dsconvert.quantization.ranks import ALONE, Ranks
from dsconvert.quantization.run import Coded, Format, Run, SolveOne, Solving, fixed, run

if TYPE_CHECKING:
    import torch


def convert(options: Options, ranks: Ranks = ALONE) -> Iterator[Event]:
    """Quantize a checkpoint to a compressed-tensors folder as `options` say, yielding what happens.

    Of several `ranks`, processes that all call this, the first draws the text, writes and proves.
    Raises ConversionError before any work for everything that can be known by then. A run that is stopped
    leaves the blocks that it finished beside the output, for `resume`, and nothing under the final name.

    >>> from pathlib import Path
    >>> from converters.compressed.plan import Options
    >>> from converters.outputs import open_output
    >>> from dsconvert.calibration.request import CalibrationRequest
    >>> from dsconvert.quantization.plan import RunOptions
    >>> few = CalibrationRequest("builtin", samples=2, length=32)
    >>> run = RunOptions("sample:", few, out=Path("sample-w4a16"), effort="off")
    >>> events = list(convert(Options(run, scheme="w4a16", group_size=32)))
    >>> opened = open_output(Path("sample-w4a16"))
    >>> opened.kind, opened.quant
    ('compressed-tensors', 'w4a16-32g')
    """
    started = time.monotonic()
    with ranks.together():
        job = prepare(options)
    if not options.calibrated:
        yield from describe(job)
        yield from convert_rounded(job, started)
        return
    if options.budget is None:
        yield from describe(job)
        yield from run(job, fixed(lambda calibration: format_of(job, calibration)), ranks, started)
        return

    def choose(begun: Run) -> Generator[Event, None, Format]:
        from converters.compressed.mixed import typed

        chosen = yield from typed(job, begun)
        yield from describe(chosen)
        return format_of(chosen, begun.calibration)

    yield from beside_foretold(run(job, choose, ranks, started))


def convert_rounded(job: Job, started: float) -> Iterator[Event]:
    """Write a folder whose weights are rounded to nearest, in a stream, and prove it."""
    yield Step(f"rounding to {job.options.scheme}, and writing")
    nbytes = write(job, {}, rounded_pieces(job))
    yield Finished(str(job.out), nbytes, time.monotonic() - started)
    planned = stored_tensors(job.model, job.kinds)
    yield from prove_folder(job, lambda: open_folder(job.out), planned)
    check_unchanged(job.model.checkpoint.seen)  # else something else was proven


def describe(job: Job) -> Iterator[Event]:
    """What will be written, to the byte, and which runtimes will not take it."""
    yield from notes(job)
    if job.model.vision is not None:
        yield Step("written in transformers' layout; what no forward pass uses is left out")
    model, options = job.model, job.options
    rows = tuple(rows_of(model, job.kinds, job.nbytes))
    quant = options.scheme
    if options.budget is not None:
        bits = 8 * sum(map(job.nbytes, job.schemes)) / job.weights
        schemes = sorted(set(job.schemes.values()), key=lambda one: (one.bits, -one.group_size))
        quant = f"{bits:.3f} bits per weight, {', '.join(map(label_of, schemes))}"
    elif options.row.bits:
        quant += f", group {options.group_size}" + ("" if options.sym else ", asymmetric")
    yield Planned((str(job.out),), quant, rows, (job.total,), model.checkpoint.nbytes, "as it is")
    if model.config.experts:
        yield Warn("transformers will not read this: it fuses experts, and cannot fuse compressed ones")
    if not options.row.bits:
        return
    for runtime, rule in refusing_runtimes(model.shapes, job.schemes).items():
        yield Warn(f"{runtime} will not read this: {rule.partition(': ')[2]}")
    if not all(scheme.sym for scheme in job.schemes.values()):
        yield Warn("transformers reads this with CompressedTensorsConfig(dequantize=True) only: asymmetric")


def format_of(job: Job, calibration: Calibration) -> Format:
    """What a compressed-tensors folder adds to the run."""
    integers = bool(job.options.row.bits)
    solving = Solving(
        settings=job.kinds,
        nbytes={name: job.nbytes(name) for name in job.model.linears},
        solve=integer_solver(job) if integers else fed_linears.solver(job),
        restore=integer_restorer(job) if integers else fed_linears.restorer(job),
        head=job.options.lm_head,
        passes=job.options.solver(job.options.grid).passes if integers else 1.0,
    )
    return Format(
        solving,
        write=lambda pieces, fell_back: write(job, provenance(job, calibration, fell_back), pieces),
        opened=lambda: open_folder(job.out),
        planned=stored_tensors(job.model, job.kinds),
    )


def integer_solver(job: Job) -> SolveOne:
    """Solves a linear in its scheme."""
    factorize = shared_factors()

    def solved(name: str, W: torch.Tensor, H: torch.Tensor, few: str | None) -> Coded:
        scheme = job.schemes[name]
        found = solve(W, H, job.options.solver(scheme), factorize, few)
        stem = job.model.linears[name].stem
        parts = packed_of(found, scheme.bits, scheme.sym)
        return found, {f"{stem}.{part}": array for part, array in parts.items()}, found.dequantized()

    return solved


def integer_restorer(job: Job) -> Restore:
    """The weights of a finished linear."""

    def restored(name: str, stored: Mapping[str, Stored]) -> torch.Tensor:
        import torch

        linear, scheme = job.model.linears[name], job.schemes[name]
        (outputs, inputs), bits = linear.shape, scheme.bits
        parts = {key.removeprefix(f"{linear.stem}."): one for key, one in stored.items()}
        codes = fields(values(parts["weight_packed"]), bits, inputs)
        zeros = None if scheme.sym else fields(values(parts["weight_zero_point"]).T, bits, outputs).T
        scales = parts["weight_scale"].rows(0, outputs)
        group = np.arange(inputs) // scheme.width(inputs)
        return torch.from_numpy(integers(codes, scales, zeros, group, bits))

    return restored


def packed_of(solved: Solved, bits: int, sym: bool) -> dict[str, Any]:
    """The tensors of the file, by the last part of their names."""
    codes, scales, zeros = (part.cpu().numpy() for part in (solved.codes, solved.scales, solved.zeros))
    return pack(codes, scales, zeros, bits, sym)


def provenance(job: Job, calibration: Calibration, fell_back: Mapping[str, str]) -> Mapping[str, Any]:
    """What the weights depend on besides the checkpoint, and which linears fell back."""
    options = job.options
    found: dict[str, Any] = {"damp": options.damp, "act_order": options.act_order, "mse": options.mse}
    if rounds := max((options.solver(scheme).rounds for scheme in job.schemes.values()), default=0):
        found["rounds"] = rounds
    found["calibration"] = calibration.report.as_dict()
    found |= {"types": dict(job.told)} if job.told else {}
    return found | ({"round_to_nearest": fell_back} if fell_back else {})


def write(job: Job, provenance: Mapping[str, Any], pieces: Mapping[str, Piece]) -> int:
    """The folder, of what is kept and of the linears' `pieces`; returns the bytes of its weights."""
    row, model = job.options.row, job.model
    groups: Groups = [(["Linear"], row.weights)]
    if job.options.budget is not None:
        groups = groups_of({model.linears[name].stem: scheme for name, scheme in job.schemes.items()})
    elif row.bits:
        groups = [(["Linear"], integer_weights(job.options.grid))]
    else:
        pieces = {**pieces, **_typed(job, pieces)}
    settings = quantization_settings(row, groups, ignored_linears(model), provenance)
    return write_quantized(job, pieces, settings, model.files)


def _typed(job: Job, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """The pieces of the linears in the types of the scheme, which a run's state has bytes for."""
    row, linears = job.options.row, job.model.linears.values()
    types = {
        f"{linear.stem}.{part}": kind
        for linear in linears
        for part, (kind, _) in row.shapes(*linear.shape).items()
    }
    return {name: replace(pieces[name], dtype=kind) for name, kind in types.items()}
