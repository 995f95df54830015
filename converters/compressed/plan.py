"""A compressed-tensors conversion planned before any work: what is asked, and what the folder will hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from converters.compressed.pack import stored_shapes
from converters.compressed.schemes import Row, scheme_of
from converters.compressed.shapes import check_floats, check_shapes
from dsconvert.calibration.request import check_chat
from dsconvert.checkpoints.safetensors_header import BITS
from dsconvert.libraries import TORCH, need
from dsconvert.models.provenance import origin
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import SolverOptions
from dsconvert.quantization.linears import Selection
from dsconvert.quantization.plan import RunOptions, check_output, input_files, open_model, output_folder
from tokenizer_tools.load import TokenizerData


@dataclass(frozen=True)
class Options:
    """What `dsconvert compressed` was asked for."""

    run: RunOptions
    scheme: str = "w4a16"
    group_size: int = 128
    act_order: bool = True
    sym: bool = True
    damp: float = 0.05
    mse: bool = True
    language_only: bool = False
    lm_head: bool = False

    @property
    def row(self) -> Row:
        """The scheme's row of the table; raises UsageError."""
        return scheme_of(self.scheme)

    @property
    def grid(self) -> Scheme:
        """What the integers mean."""
        return Scheme(self.row.bits, self.group_size, self.sym)

    @property
    def solver(self) -> SolverOptions:
        """The part of it that the solver goes by; groups are always runs of inputs."""
        return SolverOptions(self.grid, self.act_order, False, self.damp, self.mse)


@dataclass(frozen=True)
class Job:
    """A conversion planned; nothing is written yet."""

    options: Options
    model: Selection
    tokenizer: TokenizerData = field(repr=False)
    out: Path

    @property
    def run(self) -> RunOptions:
        """What was asked for besides the format's own settings."""
        return self.options.run

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return input_files(self.run, self.model)

    @property
    def settings(self) -> str:
        """What the bytes of a block depend on, as --resume reports it."""
        options = self.options
        return (
            f"{options.scheme}, group {options.group_size}, act-order {options.act_order}, "
            f"sym {options.sym}, damp {options.damp:g}, mse {options.mse}, "
            f"language only {options.language_only}, lm_head {options.lm_head}"
        )

    def nbytes(self, name: str) -> int:
        """Bytes of a linear in the output."""
        (outputs, inputs), row, grid = self.model.linears[name].shape, self.options.row, self.options.grid
        shapes = row.shapes(outputs, inputs)
        if row.calibrated:
            shapes = stored_shapes(outputs, inputs, grid.groups(inputs), grid.bits, grid.sym)
        return sum(BITS[kind] // 8 * prod(shape) for kind, shape in shapes.values())

    @property
    def total(self) -> int:
        """Bytes of all tensors of the output."""
        return self.model.kept_nbytes + sum(map(self.nbytes, self.model.linears))


def prepare(options: Options) -> Job:
    """Open, validate and plan; refuses by name every shape that readers could not take, before any work."""
    run, row = options.run, options.row
    if row.calibrated:
        need(*TORCH, what="calibration")
    check_chat(run.calibration.chat)
    model, tokenizer = open_model(run, options.language_only, options.lm_head, row.calibrated)
    out = output_folder(run, default_name(options, origin(model.checkpoint.folder, model.config)[1]))
    job = Job(options, model, tokenizer, out)
    if row.calibrated:
        check_shapes(model.shapes, options.grid)
    else:
        check_floats(model.shapes, row)
    check_output(job, job.total)
    return job


def default_name(options: Options, model: str) -> str:
    """The name of a folder for these settings: model-w4a16-128g."""
    head = "-head" if options.lm_head else ""
    if not options.row.calibrated:
        return f"{model}-{options.scheme}{head}"
    group = "" if options.group_size == -1 else f"-{options.group_size}g"
    asym = "" if options.sym else "-asym"
    return f"{model}-{options.scheme}{group}{asym}{head}"
