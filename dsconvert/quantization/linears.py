"""What of a checkpoint is quantized: its linears, their names in the output, and what is kept as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconvert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsconvert.checkpoints.locate import ModelPath
from dsconvert.checkpoints.safetensors_writer import from_stored
from dsconvert.errors import UsageError
from dsconvert.models.architectures import ARCHITECTURES, find_architecture, tower_model
from dsconvert.models.config import ModelConfig
from dsconvert.models.diagnosis import DECODER_KEYS
from dsconvert.models.language_model import language_model
from dsconvert.models.tensor_table import SOLVE_ORDER, Spec, plan
from dsconvert.models.weights import WeightSource
from dsconvert.vision.config import VisionConfig
from dsconvert.vision.transformers_layout import has_original_layout, in_transformers_layout

LINEARS = (*SOLVE_ORDER, "latent")  # the roles of matrices that linears multiply by


@dataclass(frozen=True)
class Linear:
    """A linear that is quantized: its weight in the language model, and that weight's name in the output.

    `shape` is [N, K], outputs and inputs; `role` is its place in the solve order.
    """

    name: str
    out: str
    shape: tuple[int, ...]
    role: str

    @property
    def stem(self) -> str:
        """The linear's own name in the output, without ".weight"."""
        return self.out.removesuffix(".weight")


@dataclass(frozen=True)
class Selection:
    """The linears of a checkpoint's language model, and all the rest.

    `source` is the language model under its architecture's own names, `linears` is what is quantized, by
    these names and in their order; `kept` is what is copied: checkpoint names by output names. `raw` is the
    output's config.json without the quantization; `files` are further files that are not the source's, by
    name, JSON or text. `vision` is set where DeepSeek-VL's original layout came in: `checkpoint` has
    transformers' names then, and both are still to be made of it (see vl_layout).
    """

    checkpoint: Checkpoint
    source: WeightSource
    config: ModelConfig
    linears: Mapping[str, Linear] = field(repr=False)
    kept: Mapping[str, str] = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, Mapping[str, Any] | str] = field(repr=False, default_factory=dict)
    vision: VisionConfig | None = field(repr=False, default=None)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of what is copied."""
        stored = self.checkpoint.tensors
        return sum(from_stored(stored[name]).nbytes for name in self.kept.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The linears' shapes [N, K], by name."""
        return {name: linear.shape for name, linear in self.linears.items()}


def select(model: str | ModelPath, language_only: bool, head: bool = False) -> Selection:
    """Open a checkpoint and match it with its table both ways; reads no weights.

    With `language_only` the language model of a bigger model is taken out of it; else DeepSeek-VL comes out
    in transformers' layout, whatever layout it has. With `head` the head is among the linears, the last of
    them. Raises what `open_checkpoint` and `plan` raise, UsageError for a head that is the embedding.
    """
    checkpoint, vision = open_checkpoint(model), None
    outer = checkpoint.config
    check_folder(outer, checkpoint.folder)
    if has_original_layout(outer) and not language_only:
        checkpoint, outer, vision = in_transformers_layout(checkpoint, outer)
    architecture = find_architecture(outer.architecture, checkpoint.folder / "config.json")
    specs = plan(architecture.table, outer, checkpoint.shapes())
    checkpoint.check_readable(name for spec in specs for name in spec.names)
    source, config = language_model(checkpoint, outer)
    own = {spec.gguf: spec.names for spec in plan(architecture.decoder.table, config, source.shapes())}
    inside = {name: n for spec in specs for name, n in zip(spec.names, own[spec.gguf], strict=True)}
    whole = architecture.mount is None or not language_only
    heads = [spec for spec in specs if head and spec.role == "head"]
    if head and (not heads or config.tied):
        raise UsageError(
            "this model has no head of its own to be quantized",
            where=checkpoint.folder,
            why="It is tied to the embedding, which stays in 16 bits",
            hint="Leave --lm-head out",
        )
    chosen = [*(spec for spec in specs if _is_linear(spec)), *heads]
    rest = [spec for spec in specs if spec not in chosen]
    return Selection(
        checkpoint,
        source,
        config,
        linears={
            inside[name]: Linear(inside[name], name if whole else inside[name], spec.source, spec.role)
            for spec in chosen
            for name in spec.names
        },
        kept=_kept(checkpoint, outer, rest, inside, whole),
        raw=_whole_config(outer, config.tied) if whole else plain_config(config),
        vision=vision,
    )


def check_folder(config: ModelConfig, where: Path) -> None:
    """Raise UsageError for a model whose towers no class of transformers with a table here holds."""
    towers = tower_model(config.architecture, config.raw)
    if towers is not None and towers.hf_class not in ARCHITECTURES:
        raise UsageError(
            f"{config.architecture} becomes no folder",
            where=where,
            why="No runtime is known that reads a quantized folder of this model",
            hint="dsconvert gguf makes its text file and its projector, which llama.cpp runs",
        )


def _is_linear(spec: Spec) -> bool:
    return spec.role in LINEARS and spec.hf.endswith(".weight")


def _kept(
    checkpoint: Checkpoint, config: ModelConfig, rest: list[Spec], inside: Mapping[str, str], whole: bool
) -> dict[str, str]:
    """What is copied: the `rest` of the language model, and of a bigger model all its other parts."""
    names = [name for spec in rest for name in spec.names]
    if not whole:
        return {inside[name]: name for name in names}
    language = {name: name for name in names}
    architecture = find_architecture(config.architecture)
    if architecture.mount is None:
        return language
    known = {name for spec in plan(architecture.table, config, checkpoint.shapes()) for name in spec.names}
    return {name: name for name in checkpoint.tensors if name in language or name not in known}


def _whole_config(outer: ModelConfig, tied: bool) -> dict[str, Any]:
    """config.json of a model written as a whole: the source's."""
    mount = find_architecture(outer.architecture).mount
    if mount is None or not mount.tied_outside:
        return outer.raw
    # Published files say that the head is tied, or take the default that does, though a head of its own is
    # there, which some versions of transformers then drop.
    return {**outer.raw, "tie_word_embeddings": tied}


def plain_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a language model taken out of a bigger one, every number stated."""
    raw, architecture = config.raw, find_architecture(config.architecture)
    inner: dict[str, Any] = next((raw[key] for key in DECODER_KEYS if isinstance(raw.get(key), dict)), {})
    keys = ("bos_token_id", "eos_token_id", "torch_dtype", "dtype")
    outside: dict[str, Any] = {key: raw[key] for key in keys if key in raw}
    rope: dict[str, Any] = {} if inner.get("rope_parameters") else {"rope_theta": config.rope_theta}
    return {
        **outside,
        **inner,
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        **config.library_keys,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        **rope,
    }


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json and every weight file: what --resume knows the model by."""
    digest, remote = hashlib.sha256(), checkpoint.remote
    stated = remote.digests if remote is not None else {}
    for path in (checkpoint.folder / "config.json", *checkpoint.files):
        if path in stated:
            digest.update(bytes.fromhex(stated[path]))
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
