"""The flow of `dsconvert exl2`: plan, calibrate, measure, allocate, solve block by block, write, prove."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.exl2 import measure as measuring
from converters.exl2 import pack as packing
from converters.exl2.measure import Measured
from converters.exl2.output import Choice, write
from converters.exl2.plan import Job, Options, prepare
from converters.exl2.proof import evaluation, prove
from converters.exl2.settings import Group, groups_for, named
from converters.exl2.shapes import HEAD_WEIGHT
from converters.exl2.solver import Solved, solve
from dsconvert import __version__
from dsconvert.calibration.record import Calibration
from dsconvert.calibration.request import CalibrationRequest, calibrate
from dsconvert.checkpoints.safetensors_reader import Stored, values
from dsconvert.checkpoints.safetensors_writer import from_array
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Event, Finished, Planned, Step, TensorPlan, Warn
from dsconvert.quantization.allocate import Option, allocate
from dsconvert.quantization.blocks import Solution, progress, quantize_blocks
from dsconvert.quantization.linears import model_digest
from dsconvert.quantization.run_state import State, open_state

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LinearSolved(Event):
    """A linear is quantized: its loss tr((W-Q) H (W-Q)^T) beside round-to-nearest's, and how it went."""

    name: str
    setting: str
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    fell_back: str | None
    seconds: float


def convert(options: Options) -> Iterator[Event]:
    """Quantize a checkpoint to EXL2 as `options` say, yielding what happens.

    Raises ConversionError before any work for everything that can be known by then. A run that is stopped
    leaves what it measured and the blocks that it finished beside the output, for `resume`, and nothing
    under the final name.
    """
    started = time.monotonic()
    job = prepare(options)
    for note in (*job.model.checkpoint.notes, *job.model.config.notes, *job.tokenizer.notes):
        yield Warn(note)
    calibration = yield from draw(job)
    decoder = open_decoder(job)
    yield Step(f"calibrating on {calibration.report.tokens:,} tokens of {calibration.report.text}")
    with open_state(job.out, identity(job, calibration, decoder), options.resume) as state:
        measured = yield from measured_options(job, decoder, calibration, state)
        choice = choose(job, measured)
        yield from describe(job, choice)
        yield from solve_blocks(job, decoder, calibration, choice, state)
        nbytes = write(job, calibration, measured, choice, state)
    yield Finished(str(job.out), nbytes, time.monotonic() - started)
    yield from prove(job, choice)
    check_unchanged(job.model.checkpoint.seen)  # else something else was proven


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


def open_decoder(job: Job) -> st.Decoder:
    """The language model on the device asked for, in the device's own type."""
    device = st.pick_device(job.options.device)
    return st.open_decoder(job.model.source, job.model.config, device, st.pick_dtype(None, device))


def identity(job: Job, calibration: Calibration, decoder: st.Decoder) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began."""
    options = job.options
    known = "made here" if job.known is None else measuring.digest(job.known)
    settings = (
        f"{options.bpw:g} bits per weight, head {options.head_bits}, damp {options.damp:g}, seed "
        f"{options.seed}, {decoder.device.type} {decoder.dtype}"
    )
    return {
        "model": model_digest(job.model.checkpoint),
        "options": settings,
        "measurement": known,
        "calibration": calibration.report.fingerprint,
        "version": __version__,
    }


def measured_options(
    job: Job, decoder: st.Decoder, calibration: Calibration, state: State
) -> Generator[Event, None, Measured]:
    """What every setting of every linear costs: as the file given says, or measured now."""
    if job.known is not None:
        yield Step(f"taking the measurement in {job.options.measurement}")
        return job.known
    biased = {name: job.biased(name) for name in job.model.linears}
    options = job.options
    measured = yield from measuring.measure(
        decoder, calibration.tokens, state, options.damp, options.seed, biased
    )
    if options.measurement is not None:
        measuring.save(options.measurement, measured, job.model.linears)
        yield Step(f"wrote the measurement to {options.measurement}")
    return measured


def choose(job: Job, measured: Measured) -> Choice:
    """The setting of every linear, within the budget."""
    names = list(job.model.linears)
    slots = [[Option(one.bits, one.error) for one in measured[name]] for name in names]
    found = allocate(slots, job.budget, job.weights)
    options = {name: measured[name][at] for name, at in zip(names, found.choice, strict=True)}
    return Choice(
        settings={name: option.setting for name, option in options.items()},
        groups={
            name: groups_for(job.shape(name)[1], named(option.setting)) for name, option in options.items()
        }
        | ({HEAD_WEIGHT: job.head_groups()} if job.head else {}),
        bpw=found.bits / job.weights,
        expected=found.error,
    )


def describe(job: Job, choice: Choice) -> Iterator[Event]:
    """What will be written, to the byte."""
    model, stored = job.model, job.model.checkpoint.tensors
    rows = [
        TensorPlan(f"{choice.stem(job, name)}.weight", name, job.shape(name), model.source.dtype(source),
                   choice.text(name), job.nbytes(name, groups))
        for name, groups in choice.groups.items()
        for source in [name if name in model.source.shapes() else st.EMBED]
    ]  # fmt: skip
    for out, name in job.kept.items():
        nbytes = job.half_nbytes(name)
        rows.append(TensorPlan(out, name, stored[name].shape, stored[name].dtype, "f16", nbytes))
    for name in job.vision:
        part = stored[name]
        rows.append(TensorPlan(name, name, part.shape, part.dtype, part.dtype, part.nbytes))
    total = sum(row.nbytes for row in rows)
    quant = f"exl2 {choice.bpw:.3f} bits per weight, head {job.options.head_bits}"
    yield Planned((str(job.out),), quant, tuple(rows), (total,), model.checkpoint.nbytes, "as it is")
    yield Step(
        f"{choice.bpw:.3f} bits per weight of {job.options.bpw:g}; the blocks' expected share of the mean "
        f"KL divergence: {choice.expected:.4f}"
    )


def solve_blocks(
    job: Job, decoder: st.Decoder, calibration: Calibration, choice: Choice, state: State
) -> Generator[Event, None, None]:
    """Quantize every block that `state` does not hold yet, then the head."""
    nbytes = {name: job.nbytes(name, groups) for name, groups in choice.groups.items()}

    def solve_one(name: str, W: torch.Tensor, H: torch.Tensor) -> Generator[Event, None, Solution]:
        started = time.monotonic()
        solved = solve(W, H, choice.groups[name], job.options.damp)
        packed = packed_of(solved, choice.groups[name])
        figures = (solved.loss, solved.rtn_loss, solved.damp, solved.dead, solved.fell_back)
        event = LinearSolved(name, choice.text(name), *figures, time.monotonic() - started)
        yield event
        yield progress(nbytes, name, choice.text(name))
        if solved.fell_back:
            yield Warn(f"{name} is rounded to nearest: {solved.fell_back}")
        pieces = {n: from_array(a) for n, a in packed.tensors(choice.stem(job, name)).items()}
        record = {key: value for key, value in event.as_dict().items() if key != "seconds"}
        return pieces, record, solved.weight

    def restore(name: str, stored: Mapping[str, Stored]) -> torch.Tensor:
        import torch

        stem = choice.stem(job, name)
        packed = packing.Packed(*(values(stored[f"{stem}.{part}"]) for part in packing.PARTS))
        return torch.from_numpy(packing.dequantize(packed, job.shape(name)[0]))

    yield from quantize_blocks(decoder, calibration.tokens, state, solve_one, restore, head=job.head)


def packed_of(solved: Solved, groups: tuple[Group, ...]) -> packing.Packed:
    """The tensors of the file."""
    parts = (solved.codes, solved.scales, solved.largest, solved.order)
    codes, scales, largest, order = (part.cpu().numpy() for part in parts)
    return packing.pack(codes, groups, scales, largest, order)
