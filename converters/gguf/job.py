"""A conversion planned to the last byte: what is asked, what is there, what goes where."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.gguf import metadata, qtypes, recipe
from converters.gguf.layout import KeyValues, Layout, Tensor, lay_out_split
from converters.gguf.writer import check_targets
from dsconvert.arch import Arch, Spec, plan
from dsconvert.archs import ARCHS
from dsconvert.checkpoint import Checkpoint, open_checkpoint
from dsconvert.config import ModelConfig, load_config
from dsconvert.errors import CheckpointError, UsageError
from dsconvert.manifest import pairing_id
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import resolve
from tokenizer_tools.rebuild import gguf_keys


@dataclass(frozen=True)
class Options:
    """What `dsconvert gguf` was asked for."""

    model: str
    quants: tuple[str, ...] = ("q4_0",)
    outfile: Path | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    pre: str | None = None
    split_max_size: int | None = None
    threads: int = 0
    verify: str = "quick"
    force: bool = False
    dry_run: bool = False
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Output:
    """One quantization of the model: its files, and where each tensor lies in them."""

    quant: str
    layouts: tuple[Layout, ...]
    tensors: dict[str, Tensor]
    fallbacks: dict[str, int]  # "wanted -> taken" where rows did not fit, and how often

    def place(self, name: str) -> tuple[int, int]:
        """The number of the file that holds a tensor, and the tensor's offset in it."""
        for number, layout in enumerate(self.layouts):
            if name in layout.offsets:
                return number, layout.offsets[name]
        raise KeyError(name)


@dataclass(frozen=True)
class Job:
    """A conversion planned to the last byte; nothing is written yet."""

    options: Options
    checkpoint: Checkpoint
    arch: Arch
    config: ModelConfig
    specs: tuple[Spec, ...]
    derived: dict[str, Any]
    tokenizer: TokenizerData
    pre: str
    folder: Path
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]

    @property
    def source_nbytes(self) -> int:
        """Bytes that will be read: of the tensors that are used, each once."""
        return sum(self.checkpoint.raw(spec.hf).nbytes for spec in self.specs)

    @property
    def layouts(self) -> list[Layout]:
        """Every file of every output."""
        return [layout for output in self.outputs for layout in output.layouts]

    @property
    def paths(self) -> list[Path]:
        """The final name of every file, in the order of `layouts`."""
        return [self.folder / layout.name for layout in self.layouts]


def prepare(options: Options) -> Job:
    """Open, validate and plan; the exact bytes ahead of the data and every offset are known after it."""
    checkpoint = open_checkpoint(options.model)
    config = load_config(checkpoint.folder)
    arch = find_arch(config, checkpoint.folder)
    specs = tuple(plan(arch, config, checkpoint.shapes()))
    checkpoint.check_readable(spec.hf for spec in specs)
    derived = arch.derived(config)
    tokenizer = load_tokenizer(checkpoint.folder, config.vocab_size)
    resolution = resolve(tokenizer, options.pre)
    keys = all_keys(checkpoint, arch, config, specs) | gguf_keys(tokenizer, resolution.name)
    folder, names = output_names(options, config, checkpoint.folder)
    shapes = {spec.gguf: spec.shape for spec in specs} | {name: a.shape for name, a in derived.items()}
    outputs = tuple(
        plan_output(quant, name, keys, shapes, config, options)
        for quant, name in zip(options.quants, names, strict=True)
    )
    notes = (*tokenizer.notes, *resolution.notes)
    job = Job(
        options, checkpoint, arch, config, specs, derived, tokenizer, resolution.name, folder,
        outputs, notes,
    )  # fmt: skip
    if not options.dry_run:
        check_targets(job.paths, [layout.nbytes for layout in job.layouts], options.force)
    return job


def find_arch(config: ModelConfig, folder: Path) -> Arch:
    """The table for the config's class; raises CheckpointError when there is none."""
    arch = ARCHS.get(config.architecture)
    if arch is None:
        raise CheckpointError(
            f"architecture {config.architecture[:80]!r} has no table",
            where=folder / "config.json",
            why=f"tables exist for {', '.join(sorted(ARCHS))}",
            hint='A model of the same layout converts when "architectures" names one of these classes',
        )
    return arch


def all_keys(
    checkpoint: Checkpoint, arch: Arch, config: ModelConfig, specs: tuple[Spec, ...]
) -> dict[str, tuple[str, Any]]:
    """General, model and provenance keys, in the order of the file."""
    parameters = sum(prod(spec.shape) for spec in specs)
    keys = metadata.general_keys(checkpoint.folder, config, arch.name, parameters)
    keys |= metadata.model_keys(config, arch.name)
    keys["dsconvert.pairing_id"] = ("string", pairing_id(checkpoint, specs, config))
    return keys


def plan_output(
    quant: str,
    name: str,
    keys: KeyValues,
    shapes: dict[str, tuple[int, ...]],
    config: ModelConfig,
    options: Options,
) -> Output:
    """Give every tensor the recipe's type, in the order of the file, and lay the files out."""
    choices = recipe.choose(
        quant, shapes, heads=config.heads, kv_heads=config.kv_heads, layers=config.layers,
        overrides=options.overrides, pure=options.pure,
    )  # fmt: skip
    tensors = [Tensor(name, shape, qtypes.QTYPES[choices[name].type]) for name, shape in shapes.items()]
    keys = metadata.with_file_type(keys, recipe.FILE_TYPES[quant])
    layouts = lay_out_split(name, keys, tensors, options.split_max_size)
    fallbacks = Counter(
        f"{choice.wanted} -> {choice.type}" for choice in choices.values() if choice.fell_back
    )
    return Output(quant, tuple(layouts), {tensor.name: tensor for tensor in tensors}, dict(fallbacks))


def output_names(options: Options, config: ModelConfig, source: Path) -> tuple[Path, list[str]]:
    """The output folder, and one file name for each quantization asked for."""
    if len(set(options.quants)) != len(options.quants):
        raise UsageError("--quant names a type twice", why=",".join(options.quants))
    if options.outfile is None:
        _, name = metadata.origin(source, config)
        return Path.cwd(), [f"{name}-{quant}.gguf" for quant in options.quants]
    if options.outfile.suffix != ".gguf":
        raise UsageError(
            "the output should end in .gguf",
            where=options.outfile,
            hint=f"Try --outfile {options.outfile}.gguf",
        )
    stem = options.outfile.name.removesuffix(".gguf")
    several = len(options.quants) > 1
    names = [f"{stem}-{quant}.gguf" if several else f"{stem}.gguf" for quant in options.quants]
    return options.outfile.absolute().parent, names


def thread_count(options: Options) -> int:
    """The worker threads to use: as asked, else one per usable core."""
    return options.threads or len(os.sched_getaffinity(0))
