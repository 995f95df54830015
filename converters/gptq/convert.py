"""The flow of `dsconvert gptq`: plan, calibrate, solve block by block, write the folder, prove it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from converters.gptq import pack as packing
from converters.gptq.opened import open_folder
from converters.gptq.plan import Job, Options, prepare
from converters.gptq.settings import quantization_settings
from converters.gptq.shapes import EXPERTS_RULE, HEAD_RULE, refusing_runtimes
from dsconvert.calibration.record import Calibration
from dsconvert.checkpoints.safetensors_reader import Stored, values
from dsconvert.checkpoints.safetensors_writer import Piece
from dsconvert.events import Event, Planned, Step, Warn
from dsconvert.quantization.error_feedback import shared_factors
from dsconvert.quantization.folder import write_quantized
from dsconvert.quantization.gptq_solver import Solved, solve
from dsconvert.quantization.plan import notes, rows_of, stored_tensors
from dsconvert.quantization.ranks import ALONE, Ranks
from dsconvert.quantization.run import Coded, Format, Solving, fixed, run

if TYPE_CHECKING:
    import torch


def convert(options: Options, ranks: Ranks = ALONE) -> Iterator[Event]:
    """Quantize a checkpoint by GPTQ as `options` say, yielding what happens.

    Of several `ranks`, processes that all call this, the first draws the text, writes and proves.
    Raises ConversionError before any work for everything that can be known by then. A run that is stopped
    leaves the blocks that it finished beside the output, for `resume`, and nothing under the final name.

    >>> from pathlib import Path
    >>> from converters.gptq.plan import Options
    >>> from converters.outputs import open_output
    >>> from dsconvert.calibration.request import CalibrationRequest
    >>> from dsconvert.quantization.plan import RunOptions
    >>> few = CalibrationRequest("builtin", samples=2, length=32)
    >>> run = RunOptions("sample:", few, out=Path("sample-gptq"), effort="off")
    >>> events = list(convert(Options(run, bits=4, group_size=32)))
    >>> opened = open_output(Path("sample-gptq"))
    >>> opened.kind, opened.quant
    ('GPTQ', 'gptq-4bit-32g')
    """
    started = time.monotonic()
    with ranks.together():
        job = prepare(options)
    yield from describe(job)

    yield from run(job, fixed(lambda calibration: format_of(job, calibration)), ranks, started)


def describe(job: Job) -> Iterator[Event]:
    """What will be written, to the byte, and which runtimes will not take it."""
    yield from notes(job)
    if job.model.vision is not None:
        yield Step("written in transformers' layout; what no forward pass uses is left out")
    model, bits = job.model, job.options.bits
    rows = rows_of(model, job.kinds, job.nbytes)
    quant = f"gptq {bits} bits, group {job.options.group_size}"
    yield Planned((str(job.out),), quant, tuple(rows), (job.total,), model.checkpoint.nbytes, "as it is")
    for runtime, rule in refusing_runtimes(model.shapes, job.layout).items():
        yield Warn(f"{runtime} will not read this: {rule.partition(': ')[2]}")
    if bits in (2, 3) or not job.options.sym:
        asym = "" if job.options.sym else " --asym"
        yield Warn(f"for vLLM: dsconvert compressed MODEL_PATH --scheme w{bits}a16{asym}")
    if model.config.experts:
        yield Warn(f"transformers will not read this: {EXPERTS_RULE}")
    if job.options.lm_head:
        yield Warn(f"transformers will not read this: {HEAD_RULE}")


def format_of(job: Job, calibration: Calibration) -> Format:
    """What GPTQ adds to the run."""
    model, options, factorize = job.model, job.options, shared_factors()

    def solved(name: str, W: torch.Tensor, H: torch.Tensor, few: str | None) -> Coded:
        found = solve(W, H, options.solver, factorize, few)
        return found, packed_of(found, options.bits).tensors(model.linears[name].stem), found.dequantized()

    def restored(name: str, stored: Mapping[str, Stored]) -> torch.Tensor:
        import torch

        stem = model.linears[name].stem
        packed = packing.Packed(**{p: values(stored[f"{stem}.{p}"]) for p in packing.PARTS})
        return torch.from_numpy(packing.dequantize(packed, options.bits))

    solving = Solving(
        settings=job.kinds,
        nbytes={name: job.nbytes(name) for name in model.linears},
        solve=solved,
        restore=restored,
        head=options.lm_head,
        passes=options.solver.passes,
    )
    return Format(
        solving,
        write=lambda pieces, fell_back: write(job, calibration, pieces, fell_back),
        opened=lambda: open_folder(job.out),
        planned=stored_tensors(model, job.kinds),
    )


def packed_of(solved: Solved, bits: int) -> packing.Packed:
    """The tensors of the file."""
    parts = (solved.codes, solved.scales, solved.zeros, solved.g_idx)
    codes, scales, zeros, g_idx = (part.cpu().numpy() for part in parts)
    return packing.pack(codes, scales, zeros, g_idx, bits)


def write(
    job: Job, calibration: Calibration, solved: Mapping[str, Piece], fell_back: Mapping[str, str]
) -> int:
    """The folder, of what is kept and of the `solved` linears' tensors; returns the bytes of its weights."""
    settings = quantization_settings(job.layout, job.options.damp, job.options.lm_head)
    settings["meta"] = {**settings["meta"], **provenance(job, calibration, fell_back)}
    extra = {**job.model.files, "quantize_config.json": settings}  # where old readers look
    return write_quantized(job, solved, settings, extra)


def provenance(job: Job, calibration: Calibration, fell_back: Mapping[str, str]) -> Mapping[str, Any]:
    """What the weights depend on besides the checkpoint, and which linears fell back."""
    options = job.options
    found: dict[str, Any] = {"act_order": options.act_order, "mse": options.mse}
    if options.solver.rounds:
        found["rounds"] = options.solver.rounds
    found["calibration"] = calibration.report.as_dict()
    return found | ({"round_to_nearest": fell_back} if fell_back else {})
