"""An EXL2 conversion planned before any work: what is asked, which linears, what the folder will hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from converters.exl2 import measure
from converters.exl2.measure import Measured
from converters.exl2.settings import HEADS, Group, bits_of, groups_for, settings_for
from converters.exl2.shapes import HEAD_WEIGHT, check_shapes
from dsconvert.calibration.request import check_chat
from dsconvert.checkpoints.output_plan import check_distinct, check_files, look
from dsconvert.decoder.linear_inputs import check_dense
from dsconvert.errors import UsageError
from dsconvert.libraries import TORCH, need
from dsconvert.models.language_model import Inner
from dsconvert.models.provenance import origin
from dsconvert.quantization.linears import Selection
from dsconvert.quantization.plan import RunOptions, check_output, input_files, open_model, output_folder
from tokenizer_tools.load import TokenizerData

PLAIN = 16  # bits of a head that is not quantized


@dataclass(frozen=True)
class Options:
    """What `dsconvert exl2` was asked for."""

    run: RunOptions
    bpw: float = 4.0
    head_bits: int = 6
    damp: float = 0.05
    measurement: Path | None = None


@dataclass(frozen=True)
class Job:
    """A conversion planned; nothing is written yet. `known` is the measurement that was given, if any."""

    options: Options
    model: Selection
    tokenizer: TokenizerData = field(repr=False)
    known: Measured | None = field(repr=False)
    out: Path

    @property
    def run(self) -> RunOptions:
        """What was asked for besides the format's own settings."""
        return self.options.run

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read; a measurement that is still to be made among them."""
        measurement = self.options.measurement
        return input_files(self.run, self.model) + ([] if measurement is None else [measurement])

    @property
    def settings(self) -> str:
        """What the bytes of a block depend on, as --resume reports it."""
        options = self.options
        known = "made here" if self.known is None else measure.digest(self.known)
        return (
            f"{options.bpw:g} bits per weight, head {options.head_bits}, damp {options.damp:g}, seed "
            f"{self.run.calibration.seed}, measurement {known}"
        )

    @property
    def head(self) -> bool:
        """Whether the head is quantized."""
        return self.options.head_bits != PLAIN

    @property
    def weights(self) -> int:
        """How many weights `bpw` is about: those of the blocks' linears."""
        return sum(map(prod, self.model.shapes.values()))

    @property
    def budget(self) -> int:
        """How many bits the blocks' linears may take."""
        return int(self.options.bpw * self.weights)

    @property
    def kept(self) -> dict[str, str]:
        """What stays in 16 bits: checkpoint names by output names."""
        return {out: name for out, name in self.model.kept.items() if not (self.head and out == HEAD_WEIGHT)}

    @property
    def vision(self) -> list[str]:
        """The tensors of a bigger model that are not its language model's."""
        if not isinstance(self.model.source, Inner):
            return []
        own = set(self.model.source.names.values())
        return [name for name in self.model.checkpoint.tensors if name not in own]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape [outputs, inputs] of a linear, or of the head."""
        return (
            (self.model.config.vocab_size, self.model.config.hidden_size)
            if name == HEAD_WEIGHT
            else self.model.linears[name].shape
        )

    def biased(self, name: str) -> bool:
        """Whether a linear has a bias."""
        return name.removesuffix("weight") + "bias" in self.model.kept

    def head_groups(self) -> tuple[Group, ...]:
        """The head's groups of rows."""
        return groups_for(self.model.config.hidden_size, HEADS[self.options.head_bits])

    def nbytes(self, name: str, groups: tuple[Group, ...]) -> int:
        """Bytes of a linear's own tensors in the output."""
        outputs, inputs = self.shape(name)
        return bits_of(inputs, outputs, groups) // 8

    def half_nbytes(self, name: str) -> int:
        """Bytes of a tensor that is kept, as float16."""
        return 2 * prod(self.model.checkpoint.tensors[name].shape)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of what is not quantized: the language model's in float16, the rest as it is."""
        stored = self.model.checkpoint.tensors
        return sum(map(self.half_nbytes, self.kept.values())) + sum(stored[n].nbytes for n in self.vision)

    @property
    def most_nbytes(self) -> int:
        """Bytes of all tensors of the output, at the most."""
        head = self.nbytes(HEAD_WEIGHT, self.head_groups()) if self.head else 0
        return self.budget // 8 + head + self.kept_nbytes


def prepare(options: Options) -> Job:
    """Open, validate and plan; refuses by name every shape that the runtime could not run."""
    need(*TORCH, what="calibration")
    run = options.run
    check_chat(run.calibration.chat)
    if options.head_bits not in (*HEADS, PLAIN):
        raise UsageError(f"{options.head_bits} bits are not a setting of the head", hint="Use --head-bits 6")
    model, tokenizer = open_model(run, language_only=True)
    check_dense(model.config, model.checkpoint.folder)
    out = output_folder(run, default_name(options, origin(model.checkpoint.folder, model.config)[1]))
    known = None
    if options.measurement is not None and look(options.measurement) is not None:
        known = measure.load(options.measurement, model.shapes)
    job = Job(options, model, tokenizer, known, out)
    head = {HEAD_WEIGHT: job.shape(HEAD_WEIGHT)} if job.head else {}
    check_shapes({**model.shapes, **head}, job.kept)
    _check_budget(job)
    if options.measurement is not None and known is None:
        check_files([options.measurement], [0], force=False)
        check_distinct([options.measurement, out])
    check_output(job, job.most_nbytes, [work_folder(out)])
    return job


def _check_budget(job: Job) -> None:
    """See that the bit rate lies between the least and the most that the settings can give."""
    least = most = 0
    for name, linear in job.model.linears.items():
        outputs, inputs = linear.shape
        costs = [
            bits_of(inputs, outputs, groups_for(inputs, setting), job.biased(name))
            for setting in settings_for(linear.role, inputs)
        ]
        least, most = least + min(costs), most + max(costs)
    if not least <= job.budget <= most:
        low, high = least / job.weights, most / job.weights
        raise UsageError(
            f"{job.options.bpw:g} bits per weight cannot be met",
            where=job.model.checkpoint.folder,
            why=f"This model's linears take {low:.2f} to {high:.2f} bits per weight in EXL2",
            hint=f"Give --bpw a value from {low + 0.005:.2f} to {high - 0.005:.2f}",
        )


def work_folder(out: Path) -> Path:
    """Where exllamav2's own converter works on `out`."""
    return out.with_name(out.name + ".work")


def default_name(options: Options, model: str) -> str:
    """The name of a folder for these settings: model-exl2-4.0bpw."""
    return f"{model}-exl2-{float(options.bpw)}bpw"


def raw_config(job: Job) -> dict[str, Any]:
    """config.json of the output, not yet quantized: float16, and a head of its own if that is quantized."""
    raw: dict[str, Any] = {**job.model.raw, "torch_dtype": "float16"}
    if "dtype" in raw:
        raw["dtype"] = "float16"
    return raw | ({"tie_word_embeddings": False} if job.head else {})
