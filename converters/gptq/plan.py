"""A GPTQ conversion planned before any work: what is asked, which linears, what the folder will hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from converters.gptq.pack import stored_shapes
from converters.gptq.shapes import Layout, check_shapes
from dsconvert.calibration.request import check_chat
from dsconvert.errors import UsageError
from dsconvert.libraries import TORCH, need
from dsconvert.models.provenance import origin
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import SolverOptions, rounds_for
from dsconvert.quantization.linears import Selection
from dsconvert.quantization.plan import RunOptions, check_output, input_files, open_model, output_folder
from tokenizer_tools.load import TokenizerData

STORED = {"I32": 4, "F16": 2}


@dataclass(frozen=True)
class Options:
    """What `dsconvert gptq` was asked for."""

    run: RunOptions
    bits: int = 4
    group_size: int = 128
    act_order: bool = True
    dynamic_groups: bool = False
    sym: bool = True
    damp: float = 0.05
    mse: bool = True
    rounds: int | None = None
    language_only: bool = False
    lm_head: bool = False

    @property
    def solver(self) -> SolverOptions:
        """The part of it that the solver goes by."""
        scheme, rounds = Scheme(self.bits, self.group_size, self.sym), rounds_for(self.rounds, self.bits)
        return SolverOptions(scheme, self.act_order, self.dynamic_groups, self.damp, self.mse, rounds)


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
    def layout(self) -> Layout:
        """The settings that readers care about."""
        return Layout(self.options.solver.scheme, self.options.solver.desc_act)

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return input_files(self.run, self.model)

    @property
    def settings(self) -> str:
        """What the bytes of a block depend on, as --resume reports it."""
        options = self.options
        return (
            f"{options.bits} bits, group {options.group_size}, act-order {options.act_order}, dynamic groups "
            f"{options.dynamic_groups}, sym {options.sym}, damp {options.damp:g}, mse {options.mse}, "
            f"rounds {options.solver.rounds}, "
            f"language only {options.language_only}, lm_head {options.lm_head}"
        )

    @property
    def kinds(self) -> dict[str, str]:
        """What each linear becomes, by name."""
        return dict.fromkeys(self.model.linears, f"gptq{self.options.bits}")

    def nbytes(self, name: str) -> int:
        """Bytes of a linear in the output."""
        (outputs, inputs), scheme = self.model.linears[name].shape, self.options.solver.scheme
        shapes = stored_shapes("", outputs, inputs, scheme.groups(inputs), scheme.bits)
        return sum(STORED[kind] * prod(shape) for kind, shape in shapes.values())

    @property
    def total(self) -> int:
        """Bytes of all tensors of the output."""
        return self.model.kept_nbytes + sum(map(self.nbytes, self.model.linears))


def prepare(options: Options) -> Job:
    """Open, validate and plan; refuses by name every shape that readers could not take, before any work."""
    need(*TORCH, what="calibration")
    _check(options)
    run = options.run
    model, tokenizer = open_model(run, options.language_only, options.lm_head)
    out = output_folder(run, default_name(options, origin(model.checkpoint.folder, model.config)[1]))
    job = Job(options, model, tokenizer, out)
    check_shapes(model.shapes, job.layout)
    check_output(job, job.total)
    return job


def _check(options: Options) -> None:
    if options.dynamic_groups and not options.act_order:
        raise UsageError("--dynamic-groups makes groups in activation order", hint="Give --act-order with it")
    check_chat(options.run.calibration.chat)


def default_name(options: Options, model: str) -> str:
    """The name of a folder for these settings: model-gptq-4bit-128g."""
    group = "" if options.group_size == -1 else f"-{options.group_size}g"
    asym = "" if options.sym else "-asym"
    head = "-head" if options.lm_head else ""
    return f"{model}-gptq-{options.bits}bit{group}{asym}{head}"
