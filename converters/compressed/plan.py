"""A compressed-tensors conversion planned before any work: what is asked, and what the folder will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from converters.compressed.choice import (
    SIZES,
    SMALLEST,
    USUAL,
    Candidates,
    candidates,
    nbytes,
    schemes_of,
    smallest,
)
from converters.compressed.schemes import Row, label_of, scheme_of
from converters.compressed.shapes import check_floats, check_shapes
from dsconvert.calibration.request import check_chat
from dsconvert.checkpoints.output_plan import check_distinct, check_files, look
from dsconvert.checkpoints.safetensors_header import BITS
from dsconvert.errors import UsageError
from dsconvert.libraries import TORCH, need
from dsconvert.memory.peak import left_on_card
from dsconvert.memory.runtimes import RUNTIMES
from dsconvert.models.provenance import origin
from dsconvert.quantization.budget import Budget, check_enough
from dsconvert.quantization.cost_file import Known, load
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import SolverOptions, rounds_for
from dsconvert.quantization.linears import Selection
from dsconvert.quantization.plan import RunOptions, check_output, input_files, open_model, output_folder
from dsconvert.quantization.shape_rules import check_linears
from tokenizer_tools.load import TokenizerData

PARTS, ENTRY = 4, 120  # tensors of a linear, and bytes that a file says of each, at the most


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
    rounds: int | None = None
    language_only: bool = False
    lm_head: bool = False
    fed: bool = False  # four-bit floats by error feedback, and not rounded to nearest
    budget: Budget | None = None  # instead of `scheme` and `group_size`: schemes by cost, within it
    group_sizes: tuple[int, ...] = SIZES  # of these

    @property
    def row(self) -> Row:
        """The scheme's row of the table; raises UsageError."""
        return scheme_of(self.scheme)

    @property
    def calibrated(self) -> bool:
        """Whether linears are solved on calibration text."""
        return bool(self.row.bits) or self.fed

    @property
    def grid(self) -> Scheme:
        """What the integers mean, where all linears have the same."""
        return Scheme(self.row.bits, self.group_size, self.sym)

    @property
    def told_rounds(self) -> str:
        """The rounds of refinement, as settings are compared."""
        return "by bits" if self.rounds is None else str(self.rounds)

    def solver(self, scheme: Scheme) -> SolverOptions:
        """The part of it that the solver goes by; groups are always runs of inputs."""
        rounds = rounds_for(self.rounds, scheme.bits)
        return SolverOptions(scheme, self.act_order, False, self.damp, self.mse, rounds)


@dataclass(frozen=True)
class Job:
    """A conversion planned; nothing is written yet.

    `schemes` are those of integers, by a linear's name; of a budget the smallest of its `choices`, until they
    are chosen. `told` is what the folder says of that choice, `known` the costs that were given.
    """

    options: Options
    model: Selection
    tokenizer: TokenizerData = field(repr=False)
    out: Path
    schemes: Mapping[str, Scheme] = field(repr=False, default_factory=dict)
    choices: Candidates = field(repr=False, default_factory=dict)
    told: Mapping[str, Any] = field(repr=False, default_factory=dict)
    known: Known | None = field(repr=False, default=None)

    @property
    def run(self) -> RunOptions:
        """What was asked for besides the format's own settings."""
        return self.options.run

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read; a measurement that is still to be made among them."""
        budget = self.options.budget
        measurement = [budget.measurement] if budget and budget.measurement else []
        return input_files(self.run, self.model) + measurement

    @property
    def settings(self) -> str:
        """What the bytes of a block depend on, as --resume reports it."""
        options = self.options
        what = f"{options.scheme}, group {options.group_size}"
        if options.budget is not None:
            labels = dict.fromkeys(label for own in self.choices.values() for label in own)
            costs = "measured here" if self.known is None else self.known.digest
            what = f"{options.budget.words}, of {', '.join(labels)}, costs {costs}"
        return (
            f"{what}, act-order {options.act_order}, "
            f"sym {options.sym}, damp {options.damp:g}, mse {options.mse}, rounds {options.told_rounds}, "
            f"language only {options.language_only}, lm_head {options.lm_head}"
        )

    @property
    def measured_by(self) -> str:
        """How costs are measured, which hang on how the linears will be solved."""
        options = self.options
        return (
            f"gptq, act-order {options.act_order}, damp {options.damp:g}, mse {options.mse}, "
            f"rounds {options.told_rounds}"
        )

    @property
    def kinds(self) -> dict[str, str]:
        """What each linear becomes, by name."""
        if not self.options.row.bits:
            return dict.fromkeys(self.model.linears, self.options.row.type)
        return {name: f"w{self.schemes[name].bits}a16" for name in self.model.linears}

    def nbytes(self, name: str) -> int:
        """Bytes of a linear in the output."""
        shape = self.model.linears[name].shape
        if self.options.row.bits:
            return nbytes(shape, self.schemes[name])
        return sum(BITS[kind] // 8 * prod(part) for kind, part in self.options.row.shapes(*shape).values())

    @property
    def weights(self) -> int:
        """How many weights the linears have, which bits per weight are about."""
        return sum(map(prod, self.model.shapes.values()))

    @property
    def allowed_bits(self) -> int:
        """The bits that the linears may take by the budget, with what the files say of each tensor."""
        asked, config = self.options.budget, self.model.config
        assert asked is not None
        if asked.bpw is not None:
            return int(asked.bpw * self.weights)
        limit = asked.size
        if asked.vram is not None:
            context = asked.context or config.context_length
            limit = left_on_card(config, RUNTIMES["transformers"], asked.vram, context)
        names = [*self.model.kept, *(one.stem for one in self.model.linears.values() for _ in range(PARTS))]
        return 8 * ((limit or 0) - self.model.kept_nbytes - sum(len(name) + ENTRY for name in names))

    @property
    def total(self) -> int:
        """Bytes of all tensors of the output."""
        return self.model.kept_nbytes + sum(map(self.nbytes, self.model.linears))


def prepare(options: Options) -> Job:
    """Open, validate and plan; refuses by name every shape that readers could not take, before any work."""
    run = options.run
    if options.fed and not options.row.four_bit:
        raise UsageError(
            f"{options.scheme} is not made by error feedback",
            hint="nvfp4a16 and mxfp4a16 are, and integers",
        )
    if options.calibrated:
        need(*TORCH, what="calibration")
    check_chat(run.calibration.chat)
    model, tokenizer = open_model(run, options.language_only, options.lm_head)
    out = output_folder(run, default_name(options, origin(model.checkpoint.folder, model.config)[1]))
    job = with_schemes(Job(options, model, tokenizer, out))
    check_output(job, job.total)
    return job


def with_schemes(job: Job) -> Job:
    """The job with the schemes of its linears, whose shapes they fit; with those to choose from."""
    options, shapes = job.options, job.model.shapes
    if not options.row.bits:
        check_floats(shapes, options.row)
        return job
    if options.budget is None:
        check_shapes(shapes, options.grid)
        return replace(job, schemes=dict.fromkeys(shapes, options.grid))
    check_linears(shapes)
    measurement = options.budget.measurement
    for usual in (USUAL, SMALLEST):
        choices = candidates(shapes, schemes_of(options.budget, options.group_sizes, options.sym, usual))
        job = replace(job, schemes=smallest(choices), choices=choices)
        least = 8 * sum(map(job.nbytes, shapes))
        if least <= job.allowed_bits:
            break
    check_enough(least, job.allowed_bits, options.budget.words)
    if measurement is None:
        return job
    if look(measurement) is not None:
        labels = {name: tuple(own) for name, own in choices.items()}
        return replace(job, known=load(measurement, shapes, labels, job.measured_by))
    check_files([measurement], [0], force=False)
    check_distinct([measurement, job.out])
    return job


def default_name(options: Options, model: str) -> str:
    """The name of a folder for these settings: model-w4a16-128g, model-compressed-4.5bpw."""
    head, asym = "-head" if options.lm_head else "", "" if options.sym else "-asym"
    if options.budget is not None:
        return f"{model}-compressed-{options.budget.name}{asym}{head}"
    label = label_of(options.grid) if options.row.bits else options.scheme
    return f"{model}-{label}{head}"
