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
from dsconvert.calibration.request import check_chat, files_of
from dsconvert.checkpoints.marked_folders import check_folder
from dsconvert.checkpoints.output_plan import REPLACED, check_distinct, check_files, check_place, look
from dsconvert.checkpoints.source_files import check_companions
from dsconvert.errors import UsageError
from dsconvert.models.language_model import Inner
from dsconvert.models.provenance import origin
from dsconvert.quantization.linears import Selection, select
from dsconvert.quantization.run_state import check_state, state_folder
from tokenizer_tools.load import TokenizerData, load_tokenizer

PLAIN = 16  # bits of a head that is not quantized


@dataclass(frozen=True)
class Options:
    """What `dsconvert exl2` was asked for."""

    model: str
    bpw: float = 4.0
    head_bits: int = 6
    damp: float = 0.05
    measurement: Path | None = None
    calib: str = "c4"
    calib_samples: int = 128
    calib_len: int = 2048
    calib_chat: Path | None = None
    calib_column: str = ""
    add_bos: bool | None = None
    seed: int = 0
    offline: bool = False
    out: Path | None = None
    resume: bool = False
    force: bool = False
    device: str = "auto"
    verify: str = "quick"


@dataclass(frozen=True)
class Job:
    """A conversion planned; nothing is written yet. `known` is the measurement that was given, if any."""

    options: Options
    model: Selection
    tokenizer: TokenizerData = field(repr=False)
    known: Measured | None = field(repr=False)
    out: Path

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read; a measurement that is still to be made among them."""
        checkpoint, options = self.model.checkpoint, self.options
        texts = files_of(options.calib, options.calib_chat)
        measurement = [] if options.measurement is None else [options.measurement]
        return [checkpoint.folder, *checkpoint.files, *texts, *measurement]

    @property
    def head(self) -> bool:
        """Whether the head is quantized."""
        return self.options.head_bits != PLAIN

    @property
    def weights(self) -> int:
        """How many weights `bpw` is about: those of the blocks' linears."""
        return sum(map(prod, self.model.linears.values()))

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
            else (self.model.linears[name])
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
    check_chat(options.calib_chat)
    if options.head_bits not in (*HEADS, PLAIN):
        raise UsageError(f"{options.head_bits} bits are no setting of the head", hint="Use --head-bits 6")
    model = select(options.model, language_only=True)
    folder = model.checkpoint.folder
    check_companions(folder)
    tokenizer = load_tokenizer(folder, model.config.vocab_size, options.add_bos)
    out = (options.out or Path(default_name(options, origin(folder, model.config)[1]))).absolute()
    check_place(out, REPLACED)
    known = None
    if options.measurement is not None and look(options.measurement) is not None:
        known = measure.load(options.measurement, model.linears)
    job = Job(options, model, tokenizer, known, out)
    head = {HEAD_WEIGHT: job.shape(HEAD_WEIGHT)} if job.head else {}
    check_shapes({**model.linears, **head}, job.kept)
    _check_budget(job)
    if options.measurement is not None and known is None:
        check_files([options.measurement], [0], force=False)
        check_distinct([options.measurement, out])
    space = 2 * job.most_nbytes  # the state and the folder, side by side
    check_folder(out, space, options.force, job.inputs, [state_folder(out), work_folder(out)])
    check_state(out, options.resume, options.force)
    return job


def _check_budget(job: Job) -> None:
    """See that the bit rate lies between the least and the most that the settings can give."""
    least = most = 0
    for name, (outputs, inputs) in job.model.linears.items():
        costs = [
            bits_of(inputs, outputs, groups_for(inputs, setting), job.biased(name))
            for setting in settings_for(job.model.roles[name], inputs)
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
