"""The flow of `dsconvert gptq`: plan, calibrate, solve block by block, write the folder, prove it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.gptq import pack as packing
from converters.gptq.plan import Job, Options, prepare
from converters.gptq.proof import evaluation, prove
from converters.gptq.settings import quantization_settings
from converters.gptq.shapes import HEAD_RULE, refusing_runtimes
from dsconvert import __version__
from dsconvert.calibration.record import Calibration
from dsconvert.calibration.request import CalibrationRequest, calibrate
from dsconvert.checkpoints.output_folder import write_folder
from dsconvert.checkpoints.safetensors_reader import Stored, values
from dsconvert.checkpoints.safetensors_writer import from_array, from_stored
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Event, Finished, Planned, Step, TensorPlan, Warn
from dsconvert.quantization.blocks import Solution, collected, progress, quantize_blocks
from dsconvert.quantization.gptq_solver import Solved, solve
from dsconvert.quantization.linears import model_digest
from dsconvert.quantization.ranks import ALONE, Ranks
from dsconvert.quantization.run_state import State, open_state, state_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LinearSolved(Event):
    """A linear is quantized: its loss tr((W-Q) H (W-Q)^T) beside round-to-nearest's, and how it went."""

    name: str
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    fell_back: str | None
    seconds: float


def convert(options: Options, ranks: Ranks = ALONE) -> Iterator[Event]:
    """Quantize a checkpoint by GPTQ as `options` say, yielding what happens.

    Of several `ranks`, processes that all call this, the first draws the text, writes and proves.
    Raises ConversionError before any work for everything that can be known by then. A run that is stopped
    leaves the blocks that it finished beside the output, for `resume`, and nothing under the final name.
    """
    started = time.monotonic()
    with ranks.together():
        job = prepare(options)
    yield from describe(job)
    drawn: Calibration | None = None
    with ranks.together():
        decoder = open_decoder(job, ranks)
        if ranks.first:
            drawn = yield from draw(job)
    calibration = ranks.shared(drawn)
    assert calibration is not None  # an error has ended all
    by = f", {ranks.count} processes" if ranks.count > 1 else ""
    yield Step(f"calibrating on {calibration.report.tokens:,} tokens of {calibration.report.text}{by}")
    with ExitStack() as stack:
        with ranks.together():  # the others read what the first one keeps
            state = State(state_folder(job.out))
            if ranks.first:
                known = identity(job, calibration, decoder, ranks)
                state = stack.enter_context(open_state(job.out, known, options.resume))
        yield from solve_blocks(job, decoder, calibration, state, ranks)
        if not ranks.first:
            return
        nbytes = write(job, calibration, state)
    yield Finished(str(job.out), nbytes, time.monotonic() - started)
    yield from prove(job)
    check_unchanged(job.model.checkpoint.seen)  # else something else was proven


def describe(job: Job) -> Iterator[Event]:
    """What will be written, to the byte, and which runtimes will not take it."""
    for note in (*job.model.checkpoint.notes, *job.model.config.notes, *job.tokenizer.notes):
        yield Warn(note)
    if job.model.vision is not None:
        yield Step("written in transformers' layout; what no forward pass uses is left out")
    model, bits = job.model, job.options.bits
    rows = [
        TensorPlan(model.names[name], name, shape, model.source.dtype(name), f"gptq{bits}", job.nbytes(name))
        for name, shape in model.linears.items()
    ]
    for out, name in model.kept.items():
        tensor = model.checkpoint.tensors[name]
        rows.append(
            TensorPlan(out, name, tensor.shape, tensor.dtype, tensor.dtype, from_stored(tensor).nbytes)
        )
    quant = f"gptq {bits} bits, group {job.options.group_size}"
    yield Planned((str(job.out),), quant, tuple(rows), (job.total,), model.checkpoint.nbytes, "as it is")
    for runtime, rule in refusing_runtimes(model.linears, job.layout).items():
        yield Warn(f"{runtime} will not read this: {rule.partition(': ')[2]}")
    if job.options.lm_head:
        yield Warn(f"transformers will not read this: {HEAD_RULE}")


def draw(job: Job) -> Generator[Event, None, Calibration]:
    """The calibration windows; a chat file goes through the model's own template."""
    options, data = job.options, job.tokenizer
    wanted = CalibrationRequest(
        options.calib,
        options.calib_samples,
        options.calib_len,
        options.seed,
        data.first_id,
        options.calib_chat,
        options.offline,
        options.calib_column,
    )
    context = job.model.config.context_length
    return (yield from calibrate(wanted, data.encode, context, evaluation(job).tokens, data.render))


def open_decoder(job: Job, ranks: Ranks) -> st.Decoder:
    """The language model on the device asked for, in the device's own type."""
    device = st.pick_device(ranks.device(job.options.device))
    return st.open_decoder(job.model.source, job.model.config, device, st.pick_dtype(None, device))


def identity(job: Job, calibration: Calibration, decoder: st.Decoder, ranks: Ranks) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began."""
    options = job.options
    settings = (
        f"{options.bits} bits, group {options.group_size}, act-order {options.act_order}, dynamic groups "
        f"{options.dynamic_groups}, sym {options.sym}, damp {options.damp:g}, mse {options.mse}, language "
        f"only {options.language_only}, lm_head {options.lm_head}, {decoder.device.type} {decoder.dtype}, "
        f"{ranks.count} processes"
    )
    return {
        "model": model_digest(job.model.checkpoint),
        "options": settings,
        "calibration": calibration.report.fingerprint,
        "version": __version__,
    }


def solve_blocks(
    job: Job, decoder: st.Decoder, calibration: Calibration, state: State, ranks: Ranks
) -> Generator[Event, None, None]:
    """Quantize every block that `state` does not hold yet."""
    nbytes = {name: job.nbytes(name) for name in job.model.linears}

    def solve_one(name: str, W: torch.Tensor, H: torch.Tensor) -> Generator[Event, None, Solution]:
        started = time.monotonic()
        solved = solve(W, H, job.options.solver)
        packed = packed_of(solved, job.options.bits)
        figures = (solved.loss, solved.rtn_loss, solved.damp, solved.dead, solved.fell_back)
        event = LinearSolved(name, *figures, time.monotonic() - started)
        yield event
        yield progress(nbytes, name, f"gptq{job.options.bits}")
        if solved.fell_back:
            yield Warn(f"{name} is rounded to nearest: {solved.fell_back}")
        pieces = {n: from_array(a) for n, a in packed.tensors(job.model.stem(name)).items()}
        record = {key: value for key, value in event.as_dict().items() if key != "seconds"}
        return pieces, record, solved.dequantized()

    def restore(name: str, stored: Mapping[str, Stored]) -> torch.Tensor:
        import torch

        stem = job.model.stem(name)
        packed = packing.Packed(**{p: values(stored[f"{stem}.{p}"]) for p in packing.PARTS})
        return torch.from_numpy(packing.dequantize(packed, job.options.bits))

    yield from quantize_blocks(
        decoder, calibration.tokens, state, solve_one, restore, job.options.lm_head, ranks
    )


def packed_of(solved: Solved, bits: int) -> packing.Packed:
    """The tensors of the file."""
    parts = (solved.codes, solved.scales, solved.zeros, solved.g_idx)
    codes, scales, zeros, g_idx = (part.cpu().numpy() for part in parts)
    return packing.pack(codes, scales, zeros, g_idx, bits)


def write(job: Job, calibration: Calibration, state: State) -> int:
    """The folder, of what is kept and of the blocks in `state`; gives the bytes of its weights."""
    model = job.model
    pieces = {out: from_stored(model.checkpoint.tensors[name]) for out, name in model.kept.items()}
    solved, fell_back = collected(state)
    settings = quantization_settings(job.layout, job.options.damp, job.options.lm_head)
    settings["meta"] = {**settings["meta"], **provenance(job, calibration, fell_back)}
    extra = {**model.files, "quantize_config.json": settings}  # where old readers look
    return write_folder(
        job.out,
        model.checkpoint.folder,
        model.raw,
        pieces | solved,
        settings,
        extra=extra,
        force=job.options.force,
        inputs=job.inputs,
        seen=model.checkpoint.seen,
    )


def provenance(job: Job, calibration: Calibration, fell_back: Mapping[str, str]) -> Mapping[str, Any]:
    """What the weights depend on besides the checkpoint, and which linears fell back."""
    found: dict[str, Any] = {"act_order": job.options.act_order, "mse": job.options.mse}
    found["calibration"] = calibration.report.as_dict()
    return found | ({"round_to_nearest": fell_back} if fell_back else {})
