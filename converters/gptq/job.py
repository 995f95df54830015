"""A GPTQ conversion planned before any work: what is asked, which linears, what the folder will hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from converters.gptq.folder import NESTED, _check_target
from converters.gptq.grid import Scheme
from converters.gptq.pack import stored_shapes
from converters.gptq.resume import check_state
from converters.gptq.shapes import Layout, check_shapes
from converters.gptq.solver import Options as SolverOptions
from dsconvert.arch import SOLVE_ORDER, Spec, WeightSource, plan
from dsconvert.archs import ARCHS
from dsconvert.archs.deepseek_vl import ORIGINAL
from dsconvert.archs.llama import LLAMA
from dsconvert.checkpoint import Checkpoint, open_checkpoint
from dsconvert.config import ModelConfig, load_config
from dsconvert.errors import CheckpointError, UsageError
from dsconvert.inner import language_model
from dsconvert.safetensors_header import BITS
from tokenizer_tools.load import TokenizerData, load_tokenizer

STORED = {"I32": 4, "F16": 2}


@dataclass(frozen=True)
class Options:
    """What `dsconvert gptq` was asked for."""

    model: str
    bits: int = 4
    group_size: int = 128
    act_order: bool = True
    dynamic_groups: bool = False
    sym: bool = True
    damp: float = 0.01
    mse: bool = False
    calib: str = "c4"
    calib_samples: int = 128
    calib_len: int = 2048
    calib_chat: Path | None = None
    seed: int = 0
    offline: bool = False
    out: Path | None = None
    resume: bool = False
    force: bool = False
    device: str = "auto"
    language_only: bool = False
    verify: str = "quick"

    @property
    def solver(self) -> SolverOptions:
        """The part of it that the solver goes by."""
        scheme = Scheme(self.bits, self.group_size, self.sym)
        return SolverOptions(scheme, self.act_order, self.dynamic_groups, self.damp, self.mse)


@dataclass(frozen=True)
class Job:
    """A conversion planned; nothing is written yet.

    `source` is the language model under Llama's own names, `linears` what is quantized, the shapes by these
    names; `names` gives the names in the output, `kept` what is copied: checkpoint names by output names.
    `raw` is the output's config.json without the quantization.
    """

    options: Options
    checkpoint: Checkpoint
    source: WeightSource
    config: ModelConfig
    tokenizer: TokenizerData = field(repr=False)
    linears: Mapping[str, tuple[int, ...]] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    kept: Mapping[str, str] = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)
    out: Path

    @property
    def layout(self) -> Layout:
        """The settings that readers care about."""
        return Layout(self.options.solver.scheme, self.options.solver.desc_act)

    def nbytes(self, name: str) -> int:
        """Bytes of a linear in the output."""
        (outputs, inputs), scheme = self.linears[name], self.options.solver.scheme
        shapes = stored_shapes("", outputs, inputs, scheme.groups(inputs), scheme.bits)
        return sum(STORED[kind] * prod(shape) for kind, shape in shapes.values())

    @property
    def total(self) -> int:
        """Bytes of all tensors of the output."""
        stored = self.checkpoint.tensors
        kept = sum(prod(stored[n].shape) * BITS[stored[n].dtype.upper()] // 8 for n in self.kept.values())
        return kept + sum(map(self.nbytes, self.linears))


def prepare(options: Options) -> Job:
    """Open, validate and plan; refuses by name every shape that readers could not take, before any work."""
    _check(options)
    checkpoint = open_checkpoint(options.model)
    outer = load_config(checkpoint.folder)
    arch = ARCHS.get(outer.architecture)
    if arch is None:
        known = ", ".join(sorted(ARCHS))
        raise CheckpointError(f"architecture {outer.architecture[:80]!r} has no table", why=f"known: {known}")
    specs = plan(arch, outer, checkpoint.shapes())
    checkpoint.check_readable(spec.hf for spec in specs)
    tokenizer = load_tokenizer(checkpoint.folder, outer.vocab_size)
    source, config = language_model(checkpoint, outer)
    inside = {spec.gguf: spec.hf for spec in plan(LLAMA, config, source.shapes())}
    whole = outer.architecture in LLAMA.classes or not options.language_only
    if outer.architecture == ORIGINAL and whole:
        raise UsageError(
            "the original layout of DeepSeek-VL is not written as a whole",
            where=checkpoint.folder,
            why="runtimes read GPTQ folders of transformers' layout",
            hint="Give the checkpoint in transformers' layout, or --language-only for its language model",
        )
    chosen = [spec for spec in specs if _is_linear(spec)]
    linears = {inside[spec.gguf]: spec.shape for spec in chosen}
    names = {inside[spec.gguf]: spec.hf if whole else inside[spec.gguf] for spec in chosen}
    kept = _kept(checkpoint, outer, specs, inside, whole)
    out = (options.out or Path(default_name(options, checkpoint.folder))).absolute()
    raw = outer.raw if whole else plain_config(config)
    job = Job(options, checkpoint, source, config, tokenizer, linears, names, kept, raw, out)
    check_shapes(linears, job.layout)
    check_state(out, options.resume, options.force)
    _check_target(out, 2 * job.total, options.force)  # the state and the folder, side by side
    return job


def _check(options: Options) -> None:
    if options.dynamic_groups and not options.act_order:
        raise UsageError("--dynamic-groups makes groups in activation order", hint="Give --act-order with it")
    if options.calib_chat is not None and not options.calib_chat.is_file():
        raise UsageError(
            "is no file", where=options.calib_chat, hint="Give a JSON lines file of conversations"
        )


def _is_linear(spec: Spec) -> bool:
    return spec.role in SOLVE_ORDER and spec.hf.endswith(".weight")


def _kept(
    checkpoint: Checkpoint, config: ModelConfig, specs: list[Spec], inside: Mapping[str, str], whole: bool
) -> dict[str, str]:
    """What is copied: all that is planned, and of a bigger model all that belongs to its other parts."""
    if not whole:
        return {inside[spec.gguf]: spec.hf for spec in specs if not _is_linear(spec)}
    if config.architecture in LLAMA.classes:
        return {spec.hf: spec.hf for spec in specs if not _is_linear(spec)}
    quantized = {spec.hf for spec in specs if _is_linear(spec)}
    return {name: name for name in checkpoint.tensors if name not in quantized}


def default_name(options: Options, folder: Path) -> str:
    """The name of a folder for these settings: model-gptq-4bit-128g."""
    group = "" if options.group_size == -1 else f"-{options.group_size}g"
    asym = "" if options.sym else "-asym"
    return f"{folder.resolve().name}-gptq-{options.bits}bit{group}{asym}"


def plain_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a language model taken out of a bigger one, every number stated."""
    raw = config.raw
    inner: dict[str, Any] = next((raw[key] for key in NESTED if isinstance(raw.get(key), dict)), {})
    keys = ("bos_token_id", "eos_token_id", "torch_dtype", "dtype")
    outside: dict[str, Any] = {key: raw[key] for key in keys if key in raw}
    rope: dict[str, Any] = {} if inner.get("rope_parameters") else {"rope_theta": config.rope_theta}
    return {
        **outside,
        **inner,
        "architectures": list(LLAMA.classes[:1]),
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        **rope,
    }


def model_digest(job: Job) -> str:
    """SHA-256 over config.json and every weight file: what --resume knows the model by."""
    digest = hashlib.sha256()
    for path in (job.checkpoint.folder / "config.json", *job.checkpoint.files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
