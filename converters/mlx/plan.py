"""An MLX conversion planned before any work: what is asked, which matrices, what the folder will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from converters.mlx.affine import Affine
from converters.mlx.pack import stored_shapes
from converters.mlx.shapes import check_class, check_shapes
from dsconvert.calibration.request import check_chat
from dsconvert.checkpoints.safetensors_header import BITS
from dsconvert.decoder.numpy_decoder import EMBED, HEAD
from dsconvert.libraries import TORCH, need
from dsconvert.models.provenance import origin
from dsconvert.quantization.linears import Linear, Selection
from dsconvert.quantization.plan import RunOptions, check_output, input_files, open_model, output_folder
from tokenizer_tools.load import TokenizerData

KEPT = 16  # of --head-bits: embedding and head as they are
# mlx-lm makes two matrices of it, and would round them once more.
SPLIT = "kv_b_proj.weight"


@dataclass(frozen=True)
class Options:
    """What `dsconvert mlx` was asked for.

    Without `calibrated` weights are rounded to nearest, as `mx.quantize` does, and `run.calibration` has no
    part in it. `head_bits` are embedding's and head's, 0 for `bits`.
    """

    run: RunOptions
    bits: int = 4
    group_size: int = 64
    head_bits: int = 0
    calibrated: bool = False
    act_order: bool = True
    damp: float = 0.05
    mse: bool = True
    rounds: int | None = None
    language_only: bool = False

    @property
    def inner(self) -> Affine:
        """What linears of the blocks become."""
        return Affine(self.bits, self.group_size)

    @property
    def outer(self) -> Affine:
        """What embedding and head become, where they are quantized."""
        return Affine(self.head_bits or self.bits, self.group_size)


@dataclass(frozen=True)
class Job:
    """A conversion planned; nothing is written yet. `model.linears` holds embedding and head, too."""

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
            f"{options.bits} bits, group {options.group_size}, head {options.outer.bits}, "
            f"act-order {options.act_order}, damp {options.damp:g}, mse {options.mse}, "
            f"rounds {'by bits' if options.rounds is None else options.rounds}, "
            f"language only {options.language_only}"
        )

    def affine(self, name: str) -> Affine:
        """What a linear becomes."""
        return self.options.outer if name in (EMBED, HEAD) else self.options.inner

    def dtype(self, name: str) -> str:
        """The type of a linear's scales: its own, of fp8 bf16."""
        return stored_type(self.model.source.dtype(self.linear(name).name))

    def nbytes(self, name: str) -> int:
        """Bytes of a linear in the output."""
        outputs, inputs = self.linear(name).shape
        shapes = stored_shapes(outputs, inputs, self.affine(name), self.dtype(name))
        return sum(BITS[kind] // 8 * prod(shape) for kind, shape in shapes.values())

    @property
    def kinds(self) -> Mapping[str, str]:
        """What every linear becomes, by name."""
        return {name: self.affine(name).type for name in self.model.linears}

    @property
    def solved(self) -> tuple[str, ...]:
        """The linears that a calibration solves: all but an embedding of its own, which is looked up.

        One that serves as the head goes by the head's name, the last of them, as a run has it.
        """
        return (*(name for name in self.model.linears if name != EMBED), *([HEAD] if self.of_both else []))

    @property
    def of_both(self) -> bool:
        """Whether a calibration solves the embedding as the head that it is."""
        return self.options.calibrated and EMBED in self.model.linears and HEAD not in self.model.linears

    def linear(self, name: str) -> Linear:
        """A linear by the name that a run has for it."""
        return self.model.linears[EMBED if name == HEAD and self.of_both else name]

    @property
    def total(self) -> int:
        """Bytes of all tensors of the output."""
        return self.model.kept_nbytes + sum(map(self.nbytes, self.model.linears))


def stored_type(dtype: str) -> str:
    """The type that scales and biases of weights of this type are stored in."""
    return {"f64": "f32", "f32": "f32", "f16": "f16"}.get(dtype, "bf16")


def prepare(options: Options) -> Job:
    """Open, validate and plan; refuses by name what mlx-lm could not read, before any work."""
    run = options.run
    if options.calibrated:
        need(*TORCH, what="calibration")
        check_chat(run.calibration.chat)
    model, tokenizer = open_model(run, options.language_only)
    check_class(model, options.language_only)
    model = with_outer(model, options.head_bits != KEPT)
    out = output_folder(run, default_name(options, origin(model.checkpoint.folder, model.config)[1]))
    job = Job(options, model, tokenizer, out)
    for settings in {options.inner, *map(job.affine, model.linears)}:
        check_shapes({n: s for n, s in model.shapes.items() if job.affine(n) == settings}, settings)
    check_output(job, job.total)
    return job


def with_outer(model: Selection, quantized: bool) -> Selection:
    """The selection with embedding and head among its linears where they are `quantized`.

    The embedding comes first and the head last, as a run goes; what mlx-lm splits is kept.
    """
    stored = model.checkpoint.tensors
    outer = {
        name: Linear(name, name, stored[model.kept[name]].shape, role)
        for name, role in ((EMBED, "embed"), (HEAD, "head"))
        if quantized and name in model.kept
    }
    split = {one.out: name for name, one in model.linears.items() if name.endswith(SPLIT)}
    first = {name: one for name, one in outer.items() if name == EMBED}
    linears = {**first, **{n: one for n, one in model.linears.items() if one.out not in split}, **outer}
    kept = {out: name for out, name in model.kept.items() if out not in outer}
    return replace(model, linears=linears, kept={**kept, **split})


def default_name(options: Options, model: str) -> str:
    """The name of a folder for these settings: model-mlx-4bit-64g."""
    head = f"-head{options.head_bits}" if options.head_bits not in (0, options.bits) else ""
    return f"{model}-mlx-{options.bits}bit-{options.group_size}g{head}"
