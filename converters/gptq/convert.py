"""The flow of `dsconvert gptq`: plan, calibrate, solve block by block, write the folder, prove it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.gptq import pack as packing
from converters.gptq.folder import quantization_settings, write_folder
from converters.gptq.job import Job, Options, model_digest, prepare
from converters.gptq.proof import evaluation, prove
from converters.gptq.reader import _values as values
from converters.gptq.resume import State, open_state
from converters.gptq.shapes import refusing_runtimes
from converters.gptq.solver import Solved, solve
from dsconvert import __version__, capture
from dsconvert import streaming as st
from dsconvert.calibrate import Wanted, calibrate
from dsconvert.calibration import Calibration
from dsconvert.errors import ConversionError, UsageError
from dsconvert.events import Event, Finished, Planned, Step, TensorDone, TensorPlan, Warn
from dsconvert.safetensors_writer import Piece, from_array, from_stored
from tokenizer_tools import chat_template
from tokenizer_tools.library import ids as encode

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


def convert(options: Options) -> Iterator[Event]:
    """Quantize a checkpoint by GPTQ as `options` say, yielding what happens.

    Raises ConversionError before any work for everything that can be known by then. A run that is stopped
    leaves the blocks that it finished beside the output, for `resume`, and nothing under the final name.
    """
    started = time.monotonic()
    job = prepare(options)
    yield from describe(job)
    calibration = yield from draw(job)
    decoder = open_decoder(job)
    yield Step(f"calibrating on {calibration.report.tokens:,} tokens of {calibration.report.text}")
    with open_state(job.out, identity(job, calibration, decoder), options.resume) as state:
        yield from solve_blocks(job, decoder, calibration, state)
        nbytes = write(job, calibration, state)
    yield Finished(str(job.out), nbytes, time.monotonic() - started)
    yield from prove(job)


def describe(job: Job) -> Iterator[Event]:
    """What will be written, to the byte, and which runtimes will not take it."""
    for note in job.tokenizer.notes:
        yield Warn(note)
    stored, bits = job.checkpoint, job.options.bits
    rows = [
        TensorPlan(
            job.names[name], name, shape, stored.dtype(job.names[name]), f"gptq{bits}", job.nbytes(name)
        )
        if job.names[name] in stored.tensors
        else TensorPlan(job.names[name], name, shape, job.source.dtype(name), f"gptq{bits}", job.nbytes(name))
        for name, shape in job.linears.items()
    ]
    for out, name in job.kept.items():
        tensor = stored.tensors[name]
        rows.append(
            TensorPlan(out, name, tensor.shape, tensor.dtype, tensor.dtype, from_stored(tensor).nbytes)
        )
    quant = f"gptq {bits} bits, group {job.options.group_size}"
    yield Planned((str(job.out),), quant, tuple(rows), (job.total,), stored.nbytes, "as it is")
    for runtime, rule in refusing_runtimes(job.linears, job.layout).items():
        yield Warn(f"{runtime} will not read this: {rule.partition(': ')[2]}")


def draw(job: Job) -> Generator[Event, None, Calibration]:
    """The calibration windows; a chat file goes through the model's own template."""
    options, data = job.options, job.tokenizer
    if options.calib_chat is not None and not data.chat_template:
        raise UsageError("--calib-chat needs a chat template, and the model has none", where=data.source)

    def render(messages: list[Any]) -> str:
        names = {kind: data.tokens[at] for kind, at in data.special.items()}
        tokens = {f"{kind}_token": names[kind] for kind in ("bos", "eos") if kind in names}
        try:
            return chat_template.render(data.chat_template or "", messages, **tokens)
        except Exception as error:  # a template may raise anything
            raise UsageError("cannot be written with the chat template", why=str(error)[:200]) from None

    chat = options.calib_chat
    bos = None if chat is not None else data.first_id  # a template writes its own
    wanted = Wanted(
        options.calib, options.calib_samples, options.calib_len, options.seed, bos, chat, options.offline
    )
    return (
        yield from calibrate(
            wanted,
            lambda texts: encode(data.tokenizer, texts),
            job.config.context_length,
            evaluation(job).tokens,
            render,
        )
    )


def open_decoder(job: Job) -> st.Decoder:
    """The language model on the device asked for, in the device's own type."""
    device = st.pick_device(job.options.device)
    return st.open_decoder(job.source, job.config, device, st.pick_dtype(None, device))


def identity(job: Job, calibration: Calibration, decoder: st.Decoder) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began."""
    options = job.options
    settings = (
        f"{options.bits} bits, group {options.group_size}, act-order {options.act_order}, dynamic groups "
        f"{options.dynamic_groups}, sym {options.sym}, damp {options.damp:g}, mse {options.mse}, language "
        f"only {options.language_only}, {decoder.device.type} {decoder.dtype}"
    )
    return {
        "model": model_digest(job),
        "options": settings,
        "calibration": calibration.report.fingerprint,
        "version": __version__,
    }


def solve_blocks(
    job: Job, decoder: st.Decoder, calibration: Calibration, state: State
) -> Generator[Event, None, None]:
    """Quantize every block that `state` does not hold yet, each on what the quantized ones before it give."""
    hidden = capture.embed(decoder, calibration.tokens)
    records, layers = state.records(), job.config.layers
    if records:
        yield Step(f"going on: {len(records)} of {layers} blocks are finished")
    for index in range(layers):
        block = st.load_block(decoder, index)
        if index < len(records):
            install(job, decoder, block, state)
            capture.advance(decoder, block, hidden)
            continue
        started = time.monotonic()
        pieces: dict[str, Piece] = {}
        linears: list[dict[str, Any]] = []
        for group in capture.walk(decoder, block, hidden):
            for name in group.names:
                event, packed = solve_one(job, decoder, block, name, group.moment)
                pieces |= {n: from_array(a) for n, a in packed.tensors(stem(job, name)).items()}
                linears.append({key: value for key, value in event.as_dict().items() if key != "seconds"})
                yield event
                yield progress(job, index, name)
                if event.fell_back:
                    yield Warn(f"{name} is rounded to nearest: {event.fell_back}")
        state.save(index, pieces, {"linears": linears})
        yield Step(summary(index, layers, linears, time.monotonic() - started))


def solve_one(
    job: Job, decoder: st.Decoder, block: st.Block, name: str, H: torch.Tensor
) -> tuple[LinearSolved, packing.Packed]:
    """Quantize one linear and put the result in its place; raises QuantizationError that names it."""
    started = time.monotonic()
    try:
        solved = solve(st.read(decoder, name), H, job.options.solver)
        packed = packed_of(solved, job.options.bits)
    except ConversionError as error:
        raise type(error)(error.what, where=error.where or name, why=error.why, hint=error.hint) from None
    block.linears[name].weight.data = solved.dequantized().to(decoder.dtype)
    figures = (solved.loss, solved.rtn_loss, solved.damp, solved.dead, solved.fell_back)
    return LinearSolved(name, *figures, time.monotonic() - started), packed


def packed_of(solved: Solved, bits: int) -> packing.Packed:
    """The tensors of the file."""
    parts = (solved.codes, solved.scales, solved.zeros, solved.g_idx)
    codes, scales, zeros, g_idx = (part.cpu().numpy() for part in parts)
    return packing.pack(codes, scales, zeros, g_idx, bits)


def install(job: Job, decoder: st.Decoder, block: st.Block, state: State) -> None:
    """Put a finished block's weights in their places, to the very bits that `solve_one` left there."""
    import torch

    stored = state.tensors(block.index)
    for name in (name for group in capture.groups(decoder, block.index) for name in group):
        packed = packing.Packed(**{p: values(stored[f"{stem(job, name)}.{p}"]) for p in packing.PARTS})
        array = packing.dequantize(packed, job.options.bits)
        weight = torch.empty(array.shape)  # in torch's own alignment: equal weights give bit-equal products
        weight.copy_(torch.from_numpy(array))
        block.linears[name].weight.data = weight.to(decoder.device, decoder.dtype)


def stem(job: Job, name: str) -> str:
    """A linear's name in the output, without ".weight"."""
    return job.names[name].removesuffix(".weight")


def progress(job: Job, index: int, name: str) -> TensorDone:
    """How far the run is, counted in bytes of the output's linears."""
    order = list(job.linears)
    done = sum(job.nbytes(n) for n in order if int(n.split(".")[2]) < index)
    own = [n for n in order if int(n.split(".")[2]) == index]
    done += sum(job.nbytes(n) for n in own[: own.index(name) + 1])
    return TensorDone(name, f"gptq{job.options.bits}", job.nbytes(name), done, sum(map(job.nbytes, order)))


def summary(index: int, layers: int, linears: list[dict[str, Any]], seconds: float) -> str:
    """One line on a block: what is left of round-to-nearest's loss."""
    loss, plain = (sum(linear[key] for linear in linears) for key in ("loss", "rtn_loss"))
    share = f"{loss / plain:.0%} of round-to-nearest's loss" if plain else "no loss"
    return f"block {index + 1} of {layers}: {share}, {seconds:.1f} s"


def write(job: Job, calibration: Calibration, state: State) -> int:
    """The folder, of what is kept and of the blocks in `state`; gives the bytes of its weights."""
    pieces = {out: from_stored(job.checkpoint.tensors[name]) for out, name in job.kept.items()}
    for index in range(job.config.layers):
        pieces |= {name: from_stored(tensor) for name, tensor in state.tensors(index).items()}
    settings = quantization_settings(job.layout, job.options.damp)
    settings["meta"] = {**settings["meta"], **provenance(job, calibration, state)}
    return write_folder(job.out, job.checkpoint.folder, job.raw, pieces, settings, force=job.options.force)


def provenance(job: Job, calibration: Calibration, state: State) -> Mapping[str, Any]:
    """What the weights depend on besides the checkpoint, and which linears fell back."""
    linears = [linear for record in state.records() for linear in record["linears"]]
    fell_back = {linear["name"]: linear["fell_back"] for linear in linears if linear["fell_back"]}
    found: dict[str, Any] = {"act_order": job.options.act_order, "mse": job.options.mse}
    found["calibration"] = calibration.report.as_dict()
    return found | ({"round_to_nearest": fell_back} if fell_back else {})
