"""One normalised view of config.json: old and new RoPE keys, nested text configs, library defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.models.diagnosis import unquantized
from dsconvert.models.model_class import ModelClass, mistral_as_llama, model_class
from dsconvert.models.rope import RopeScaling, read_rope
from dsconvert.reading import CONFIG, read_object

# What transformers' LlamaConfig takes for a key that is absent; original DeepSeek-VL files rely on it.
LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# Where a model with a vision tower keeps its decoder's config, by class.
NESTED = {
    "MultiModalityCausalLM": "language_config",
    "DeepseekVLForConditionalGeneration": "text_config",
    "DeepseekVLHybridForConditionalGeneration": "text_config",
}
LIMIT = 1 << 31
UNSET = "Set it to null if the model was trained without it"
COMPARE = "Compare this file with the one that the model's authors published"
LAYERS_LIMIT = 4096  # the plan names every layer's tensors before it compares them


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a Llama-layout decoder, as a converter reads them; `raw` is config.json as read.

    `decoder` is its part that tells of the decoder, from which the reference side of a proof is built; empty
    for a file without config.json. `notes` are what the user should know of how the numbers were read.
    `tied` says that the head may be absent; where the checkpoint has one it counts.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    explicit_head_dim: bool
    raw: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)
    decoder: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)
    notes: tuple[str, ...] = field(repr=False, compare=False, default=())

    @property
    def llama_keys(self) -> dict[str, Any]:
        """The sizes and flags under the names of transformers' LlamaConfig."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.norm_eps,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }

    @property
    def dims(self) -> dict[str, int]:
        """The sizes by the letters that table shapes use."""
        return {
            "d": self.hidden_size,
            "ff": self.intermediate_size,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "v": self.vocab_size,
            "layers": self.layers,
        }


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises CheckpointError when the file is missing, is no JSON, no object, or no file of a config's size.
    """
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{path.name} is missing",
            where=path.parent,
            hint="Give the folder that holds config.json and the weights",
        )
    return read_object(path, CONFIG)


def normalise(raw: dict[str, Any], where: object) -> ModelConfig:
    """Build the normalised view of a decoder's config; `where` names its file in errors.

    Raises CheckpointError for a value of the wrong kind, an impossible size, or an unknown RoPE type.
    """
    whole, found = raw, _architecture(raw, where)
    raw = _decoder(raw, found, where)
    get = _Getter(raw, where)
    hidden, heads = get.size("hidden_size"), get.size("num_attention_heads")
    kv_heads = get.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise get.wrong("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    head_dim = get.size("head_dim", max(hidden // heads, 1))
    if raw.get("head_dim") is None and hidden % heads:
        raise get.wrong("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    if head_dim % 2:
        raise get.wrong("head_dim", f"{head_dim} is odd, RoPE needs pairs")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise get.wrong("hidden_act", f"{str(raw['hidden_act'])[:40]!r} is not silu, which this layout needs")
    _check_attention(raw, get)
    rope = read_rope(raw, get)
    return ModelConfig(
        architecture=found.name,
        hidden_size=hidden,
        intermediate_size=get.size("intermediate_size"),
        layers=get.size("num_hidden_layers", limit=LAYERS_LIMIT),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=get.size("vocab_size"),
        context_length=get.size("max_position_embeddings"),
        norm_eps=get.number("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        tied=get.flag("tie_word_embeddings"),
        attention_bias=get.flag("attention_bias"),
        mlp_bias=get.flag("mlp_bias"),
        # transformers 5 writes head_dim into every nested config; only an unusual one says something.
        explicit_head_dim=raw.get("head_dim") is not None and (raw is whole or head_dim * heads != hidden),
        raw=_cleaned(whole, found),
        decoder=unquantized(raw),
        notes=rope.notes,
    )


def load_config(folder: Path) -> ModelConfig:
    """Read and normalise `folder`/config.json; raises CheckpointError."""
    path = folder / "config.json"
    return normalise(load_json(path), path)


def _architecture(raw: dict[str, Any], where: object) -> ModelClass:
    found = model_class(raw)
    if found.name:
        return found
    raise CheckpointError(
        "does not name one architecture",
        where=where,
        why=f'"architectures" is {str(raw.get("architectures"))[:80]!r}',
        hint='Set it to the class that was saved, for example ["LlamaForCausalLM"]',
    )


def is_tied(raw: Mapping[str, Any], architecture: str) -> bool:
    """Whether a config.json says that the head is the embedding; transformers' default where it is silent."""
    key = NESTED.get(architecture)
    part = raw.get(key) if key == "language_config" else raw
    stated = part.get("tie_word_embeddings", key == "text_config") if isinstance(part, dict) else False
    return stated is True


def _cleaned(raw: dict[str, Any], found: ModelClass) -> dict[str, Any]:
    """The config as an output of it may carry it: under its class's own name, of no quantization."""
    named = {"architectures": [found.written]} if found.notes else {}
    return {**unquantized(raw), **named}


def _decoder(raw: dict[str, Any], found: ModelClass, where: object) -> dict[str, Any]:
    """The decoder's part of a config; absent keys take LlamaConfig's defaults, or MistralConfig's.

    In transformers' layout the whole model's config says whether the head may be absent. It says so by
    default, also for published files that have one.
    """
    key = NESTED.get(found.name)
    if key is None:
        return mistral_as_llama(raw) if found.mistral else raw
    part = raw.get(key)
    if not isinstance(part, dict) or part.get("model_type", "llama") != "llama":
        told = part.get("model_type") if isinstance(part, dict) else part
        raise CheckpointError(
            f"{key!r} holds no Llama decoder",
            where=where,
            why=f"It is {str(told)[:80]!r}",
            hint="Fetch config.json again from where the checkpoint came from",
        )
    if key == "text_config":
        return {**part, "tie_word_embeddings": raw.get("tie_word_embeddings", True)}
    return part


def _check_attention(raw: dict[str, Any], get: _Getter) -> None:
    """See that every position attends to all before it, by the keys that transformers honours in a Llama."""
    context = get.size("max_position_embeddings")
    for key in ("sliding_window", "attention_chunk_size"):
        if raw.get(key) is not None and get.size(key) < context:
            raise get.wrong(key, f"is {raw[key]}, and this layout attends to all of {context} tokens", UNSET)
    types = raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        raise get.wrong("layer_types", "names other layers than full_attention, the only ones of this layout")
    if raw.get("is_causal", True) is not True:
        raise get.wrong("is_causal", "is not true, and this layout attends to what came before only")
    if raw.get("per_layer_config") is not None:
        raise get.wrong("per_layer_config", "gives layers numbers of their own, and Llama's share theirs")


@dataclass(frozen=True)
class _Getter:
    """Typed access to a config with errors that name the key and the file."""

    raw: dict[str, Any]
    where: object

    def over(self, more: dict[str, Any]) -> _Getter:
        """The config with these keys in place of its own."""
        return _Getter({**self.raw, **more}, self.where)

    def wrong(self, key: str, why: str, hint: str = COMPARE) -> CheckpointError:
        return CheckpointError(f"{key!r} cannot be used", where=self.where, why=f"{key} {why}", hint=hint)

    def value(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = LLAMA_DEFAULTS.get(key) if default is None else default
        if value is None:
            raise self.wrong(key, "is missing and has no default")
        return value

    def size(self, key: str, default: int | None = None, limit: int = LIMIT) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
            raise self.wrong(key, f"is {str(value)[:40]!r}, should be a positive whole number below {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(key, f"is {str(value)[:40]!r}, should be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key, None)
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {str(value)[:40]!r}, should be true or false")
        return value
