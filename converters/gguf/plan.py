"""Plans a GGUF conversion to the last byte: options, source tensors, and the layout of every output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from converters.gguf import importance, metadata, mixtures, qtypes, rope
from converters.gguf.budget import smallest, typed
from converters.gguf.claims import mostly, true_mixture
from converters.gguf.file_types import FILE_TYPES
from converters.gguf.layout import BY_COST, KeyValues, Layout, Tensor, is_gguf, lay_out, lay_out_split
from converters.gguf.modelfile import check_modelfiles
from converters.gguf.output import Options, Output
from converters.gguf.projector import keys as projector_keys
from dsconvert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsconvert.checkpoints.output_plan import check_files
from dsconvert.checkpoints.source_files import check_quotable
from dsconvert.errors import UsageError
from dsconvert.events import phase
from dsconvert.machine import collector_paused
from dsconvert.models.architecture import Architecture
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.provenance import origin, pairing_id
from dsconvert.models.tensor_table import Spec, plan
from dsconvert.vision.plan import Towers, plan_towers, with_template
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import resolve
from tokenizer_tools.rebuild import gguf_keys


@dataclass(frozen=True)
class Job:
    """A conversion planned to the last byte; nothing is written yet."""

    options: Options
    checkpoint: Checkpoint
    architecture: Architecture
    config: ModelConfig
    specs: tuple[Spec, ...]
    derived: dict[str, Any]
    tokenizer: TokenizerData
    pre: str
    keys: KeyValues  # of the text files
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]
    towers: Towers | None = None
    projector: Output | None = None
    importance: Mapping[str, importance.Floats] = field(
        default_factory=dict
    )  # float32 [n_cols], by GGUF name

    @property
    def tensors(self) -> list[Spec]:
        """What is read, in the order of the files."""
        if self.towers is None or self.projector is None:
            return list(self.specs)
        return [*self.specs, *self.towers.specs]

    @property
    def source_nbytes(self) -> int:
        """Bytes that will be read: of the tensors that are used, each once."""
        return sum(map(self.nbytes_of, self.tensors))

    def nbytes_of(self, spec: Spec) -> int:
        """Bytes of the checkpoint that become a tensor."""
        stored = [self.checkpoint.tensors[name] for name in spec.names]
        return sum(t.nbytes for t in stored) * spec.values // sum(prod(t.shape) for t in stored)

    @property
    def every_output(self) -> tuple[Output, ...]:
        """All outputs, the projector last."""
        return self.outputs if self.projector is None else (*self.outputs, self.projector)

    @property
    def layouts(self) -> list[Layout]:
        """Every file of every output."""
        return [layout for output in self.every_output for layout in output.layouts]

    @property
    def paths(self) -> list[Path]:
        """The final name of every file, in the order of `layouts`."""
        return [path for output in self.every_output for path in output.paths]

    @property
    def foretold(self) -> float:
        """The mean KL divergence, in nats, that is foretold of types chosen by cost; 0 where none are."""
        nats: float = self.keys.get(BY_COST + "foretold_kl", ("float32", 0.0))[1]
        return nats

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        matrix, wanted = self.options.imatrix, self.options.calibration
        others = [*([matrix] if matrix else []), *(wanted.files if wanted else [])]
        return [self.checkpoint.folder, *self.checkpoint.files, *others]


def prepare(options: Options) -> Job:
    """Open, validate and plan; the exact bytes ahead of the data and every offset are known after it.

    A matrix that is made on the way adds keys that describe its text: see `with_keys`.
    """
    with collector_paused(), phase("plan, in all"):
        return _prepare(options)


def _prepare(options: Options) -> Job:
    check_calibration(options)
    checkpoint = open_checkpoint(options.model)
    check_quotable(checkpoint.folder)
    config = checkpoint.config
    architecture = find_architecture(config.architecture, checkpoint.folder / "config.json")
    specs = tuple(plan(architecture.table, config, checkpoint.shapes()))
    checkpoint.check_readable(name for spec in specs for name in spec.names)
    derived = architecture.derived(config)
    if options.budget is not None:
        options = smallest(options, specs)
    matrix = importance.read(options.imatrix) if options.imatrix is not None else None
    with phase("tokenizer"):
        tokenizer = load_tokenizer(checkpoint.folder, config.vocab_size, options.add_bos)
    with phase("proof of its regexes"):
        resolution = resolve(tokenizer, options.pre)
    towers = plan_towers(checkpoint, config, tokenizer)
    if towers is not None:
        tokenizer = with_template(tokenizer, towers)
    keys = all_keys(checkpoint, architecture, config, specs) | gguf_keys(tokenizer, resolution.name)
    keys |= (
        projector_keys.image_keys(towers.vision, towers.token, towers.token_id) if towers is not None else {}
    )
    keys |= matrix.keys if matrix is not None else {}
    paths = output_paths(options, config, checkpoint.folder)
    shapes = {spec.gguf: spec.shape for spec in specs} | {name: a.shape for name, a in derived.items()}
    with phase("layout"):
        outputs = plan_outputs(paths, keys, shapes, config, options)
    projector = plan_projector(options, checkpoint, config, towers, keys, outputs[0])
    weights, unweighted = importance.weigh(matrix, outputs)
    notes = (
        *checkpoint.notes,
        *rope.notes(config),
        *tokenizer.notes,
        *resolution.notes,
        *(towers.notes if towers is not None else ()),
        *unweighted,
    )
    job = Job(
        options, checkpoint, architecture, config, specs, derived, tokenizer, resolution.name,
        keys, outputs, notes, towers, projector, weights,
    )  # fmt: skip
    if not options.dry_run:
        sizes = [layout.nbytes for layout in job.layouts]
        check_files(job.paths, sizes, force=options.force, inputs=job.inputs, ours=is_gguf)
        if options.ollama:
            check_modelfiles(job)
    return job


def all_keys(
    checkpoint: Checkpoint, architecture: Architecture, config: ModelConfig, specs: tuple[Spec, ...]
) -> dict[str, tuple[str, Any]]:
    """General, model and provenance keys, in the order of the file."""
    # Of experts one of each layer counts, and how many there are stands before it.
    parameters = sum(spec.values // spec.many for spec in specs)
    experts = config.experts.count if config.experts else 0
    keys = metadata.general_keys(checkpoint.folder, config, architecture.gguf, parameters, experts)
    keys |= metadata.model_keys(config, architecture)
    keys["dsconvert.pairing_id"] = ("string", pairing_id(checkpoint, specs))
    return keys


def check_calibration(options: Options) -> None:
    """See that the options on calibration and solver make sense; raises UsageError."""
    if options.solver != "imatrix" and options.calibration is None:
        raise UsageError(
            f"--solver {options.solver} needs a calibration text",
            why="it weighs errors by what the inputs of a linear are on it, of which an importance matrix "
            "has a part only",
            hint="Give --calib c4, or --calib builtin",
        )
    if options.solver != "imatrix" and options.allow_nonfinite:
        raise UsageError(
            f"--solver {options.solver} and --allow-nonfinite contradict each other",
            why="errors of weights that are no numbers cannot be made up for",
            hint="Leave one of them out",
        )
    if options.budget is not None and options.calibration is None and not options.dry_run:
        raise UsageError(
            "types are chosen by what they cost on text, and no text is named",
            hint="Give --calib c4; or --dry-run with the --measurement FILE of an earlier run",
        )
    if options.calibration is None:
        return
    if options.imatrix is not None:
        raise UsageError(
            "--imatrix and --calib contradict each other",
            why="one reads an importance matrix, the other makes one",
            hint="Leave one of them out",
        )
    from dsconvert.calibration.request import check_chat

    check_chat(options.calibration.chat)


def with_keys(job: Job, keys: KeyValues) -> Job:
    """The job with more keys in its text files, whose tensors move by as much."""
    keys = {**job.keys, **keys}
    paths = output_paths(job.options, job.config, job.checkpoint.folder)
    shapes = {name: tensor.shape for name, tensor in job.outputs[0].tensors.items()}
    return replace(job, keys=keys, outputs=plan_outputs(paths, keys, shapes, job.config, job.options))


def plan_outputs(
    paths: Sequence[Path],
    keys: KeyValues,
    shapes: dict[str, tuple[int, ...]],
    config: ModelConfig,
    options: Options,
) -> tuple[Output, ...]:
    """One output for each quantization asked for."""
    return tuple(
        plan_output(quant, path, keys, shapes, config, options)
        for quant, path in zip(options.quants, paths, strict=True)
    )


def plan_output(
    quant: str,
    path: Path,
    keys: KeyValues,
    shapes: dict[str, tuple[int, ...]],
    config: ModelConfig,
    options: Options,
) -> Output:
    """Give every tensor the recipe's type, in the order of the file, and lay the files out."""
    budget = options.budget
    choices = mixtures.choose_for(
        config, quant if budget is None else "q8_0", shapes, overrides=options.overrides, pure=options.pure,
        imatrix=options.imatrix is not None or options.calibration is not None,
    )  # fmt: skip
    if budget is not None:
        choices = typed(shapes, budget.chosen, choices)
    tensors = [Tensor(name, shape, qtypes.QTYPES[choices[name].type]) for name, shape in shapes.items()]
    quant, stated = (quant, true_mixture(quant, tensors)) if budget is None else (mostly(tensors),) * 2
    keys = metadata.with_file_type(keys, FILE_TYPES[stated])
    layouts = lay_out_split(path.name, keys, tensors, options.split_max_size)
    fallbacks = Counter(
        f"{choice.wanted} -> {choice.type}" for choice in choices.values() if choice.fell_back
    )
    named = {tensor.name: tensor for tensor in tensors}
    return Output(quant, tuple(layouts), named, dict(fallbacks), path.parent)


def plan_projector(
    options: Options,
    checkpoint: Checkpoint,
    config: ModelConfig,
    towers: Towers | None,
    keys: KeyValues,
    text: Output,
) -> Output | None:
    """The projector file beside the text file; None for a model without towers, or when none is wanted."""
    if towers is None:
        if options.mmproj is not None:
            raise UsageError(
                "--mmproj asks for a projector", why=f"{config.architecture} has no vision tower"
            )
        return None
    if options.no_mmproj:
        if options.mmproj is not None:
            raise UsageError("--mmproj and --no-mmproj contradict each other")
        return None
    path = (options.mmproj or text.folder / f"mmproj-{projector_stem(options, text)}.gguf").absolute()
    if path.suffix != ".gguf" or path in text.paths:
        raise UsageError("the projector should end in .gguf and be a file of its own", where=path)
    quant, vision = options.mmproj_quant, towers.vision
    shared = projector_keys.image_keys(towers.vision, towers.token, towers.token_id) | {
        "dsconvert.pairing_id": keys["dsconvert.pairing_id"]
    }
    own = projector_keys.all_keys(checkpoint.folder, config, vision, towers.specs, quant, shared)
    tensors = projector_keys.typed(towers.specs, quant, vision)
    layout = lay_out(path.name, own, tensors)
    return Output(f"mmproj {quant}", (layout,), {tensor.name: tensor for tensor in tensors}, {}, path.parent)


def projector_stem(options: Options, text: Output) -> str:
    """The text file's name without the type where the run makes several or chose the name itself."""
    if options.outfile is not None:
        return options.outfile.name.removesuffix(".gguf")
    first = text.layouts[0].name.partition(f"-{options.quants[0]}")[0]
    return f"{first}-{options.mmproj_quant}"


def output_paths(options: Options, config: ModelConfig, source: Path) -> list[Path]:
    """The file of each quantization asked for."""
    if len(set(options.quants)) != len(options.quants):
        raise UsageError("--quant names a type twice", why=",".join(options.quants))
    if options.outfile is None:
        _, name = origin(source, config)
        return [Path.cwd() / f"{name}-{quant}.gguf" for quant in options.quants]
    if options.outfile.suffix != ".gguf":
        raise UsageError(
            "the output should end in .gguf",
            where=options.outfile,
            hint=f"Try --outfile {options.outfile}.gguf",
        )
    stem = options.outfile.name.removesuffix(".gguf")
    several = len(options.quants) > 1
    names = [f"{stem}-{quant}.gguf" if several else f"{stem}.gguf" for quant in options.quants]
    return [options.outfile.absolute().with_name(name) for name in names]
