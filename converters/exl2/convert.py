"""The flow of `dsconvert exl2`: plan, calibrate, measure, allocate, solve block by block, write, prove."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING

from converters.exl2 import measure as measuring
from converters.exl2 import pack as packing
from converters.exl2.measure import Measured
from converters.exl2.opened import open_folder
from converters.exl2.output import Choice, write
from converters.exl2.plan import Job, Options, prepare
from converters.exl2.settings import Group, groups_for, named
from converters.exl2.shapes import HEAD_WEIGHT
from converters.exl2.solver import Solved, solve
from dsconvert.calibration.record import Calibration
from dsconvert.checkpoints.safetensors_reader import Stored, values
from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Event, Planned, Step, TensorPlan
from dsconvert.proof.sources import StoredTensors
from dsconvert.quantization.allocate import Option, allocate
from dsconvert.quantization.error_feedback import shared_factors
from dsconvert.quantization.plan import notes
from dsconvert.quantization.ranks import ALONE, Ranks
from dsconvert.quantization.run import Coded, Format, Run, Solving, run

if TYPE_CHECKING:
    import torch


def convert(options: Options, ranks: Ranks = ALONE) -> Iterator[Event]:
    """Quantize a checkpoint to EXL2 as `options` say, yielding what happens.

    Of several `ranks`, processes that all call this, the first draws the text, measures, writes and proves.
    Raises ConversionError before any work for everything that can be known by then. A run that is stopped
    leaves what it measured and the blocks that it finished beside the output, for `resume`, and nothing
    under the final name.

    >>> from pathlib import Path
    >>> from converters.exl2.plan import Options
    >>> from converters.outputs import open_output
    >>> from dsconvert.calibration.request import CalibrationRequest
    >>> from dsconvert.quantization.plan import RunOptions
    >>> few = CalibrationRequest("builtin", samples=2, length=32)
    >>> run = RunOptions("sample:", few, out=Path("sample-exl2"), effort="off")
    >>> events = list(convert(Options(run, bpw=6.0)))
    >>> opened = open_output(Path("sample-exl2"))
    >>> opened.kind, opened.source.float32("lm_head.weight").shape
    ('EXL2', (2048, 256))
    """
    started = time.monotonic()
    with ranks.together():
        job = prepare(options)
    yield from notes(job)

    def choose(begun: Run) -> Generator[Event, None, Format]:
        found: Measured | None = None
        with ranks.together():
            if ranks.first:
                found = yield from measured_options(job, begun)
        measured = ranks.shared(found)
        assert measured is not None  # an error has ended all
        choice = choose_settings(job, measured)
        yield from describe(job, choice)
        return format_of(job, begun.calibration, measured, choice)

    yield from run(job, choose, ranks, started)


def measured_options(job: Job, begun: Run) -> Generator[Event, None, Measured]:
    """What every setting of every linear costs: as the file given says, or measured now."""
    if job.known is not None:
        yield Step(f"taking the measurement in {job.options.measurement}")
        return job.known
    biased = {name: job.biased(name) for name in job.model.linears}
    options = job.options
    tokens, seed = begun.calibration.tokens, job.run.calibration.seed
    measured = yield from measuring.measure(begun.decoder, tokens, begun.state, options.damp, seed, biased)
    if options.measurement is not None:
        measuring.save(options.measurement, measured, job.model.shapes)
        yield Step(f"wrote the measurement to {options.measurement}")
    return measured


def choose_settings(job: Job, measured: Measured) -> Choice:
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


def format_of(job: Job, calibration: Calibration, measured: Measured, choice: Choice) -> Format:
    """What EXL2 adds to the run."""
    factorize = shared_factors()

    def solved(name: str, W: torch.Tensor, H: torch.Tensor, few: str | None) -> Coded:
        found = solve(W, H, choice.groups[name], job.options.damp, factorize)
        packed = packed_of(found, choice.groups[name])
        return found, packed.tensors(choice.stem(job, name)), found.weight

    def restored(name: str, stored: Mapping[str, Stored]) -> torch.Tensor:
        import torch

        stem = choice.stem(job, name)
        packed = packing.Packed(*(values(stored[f"{stem}.{part}"]) for part in packing.PARTS))
        return torch.from_numpy(packing.dequantize(packed, job.shape(name)[0]))

    solving = Solving(
        settings={name: choice.text(name) for name in choice.groups},
        nbytes={name: job.nbytes(name, groups) for name, groups in choice.groups.items()},
        solve=solved,
        restore=restored,
        head=job.head,
        passes=4.0,
    )
    return Format(
        solving,
        write=lambda pieces, fell_back: write(job, calibration, measured, choice, pieces, fell_back),
        opened=lambda: open_folder(job.out),
        planned=planned(job, choice),
    )


def planned(job: Job, choice: Choice) -> StoredTensors:
    """Name, shape and groups of every tensor of the folder."""
    linears = ((f"{choice.stem(job, n)}.weight", job.shape(n), groups) for n, groups in choice.groups.items())
    stored = job.model.checkpoint.tensors
    return frozenset((*linears, *((out, stored[name].shape, ()) for out, name in job.kept.items())))


def packed_of(solved: Solved, groups: tuple[Group, ...]) -> packing.Packed:
    """The tensors of the file."""
    parts = (solved.codes, solved.scales, solved.largest, solved.order)
    codes, scales, largest, order = (part.cpu().numpy() for part in parts)
    return packing.pack(codes, groups, scales, largest, order)
