"""One normalised view of config.json: old and new RoPE keys, nested text configs, library defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.models.architecture import Architecture
from dsconvert.models.architectures import ARCHITECTURES, find_architecture
from dsconvert.models.diagnosis import unquantized
from dsconvert.models.experts import Experts, Latent, expert_dims
from dsconvert.models.model_class import ModelClass, model_class
from dsconvert.models.rope import RopeScaling, read_rope
from dsconvert.models.values import Values
from dsconvert.reading import CONFIG, read_object

LAYERS_LIMIT = 4096  # the plan names every layer's tensors before it compares them


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder, as a converter reads them; `raw` is config.json as read.

    `decoder` is its part about the decoder, from which the reference side of a proof is built; empty
    for a file without config.json. `notes` are what the user should know of how the numbers were read.
    `tied` says that the head may be absent; where the checkpoint has one it counts. With `latent` attention,
    `head_dim` is what RoPE turns of a head, and there are as many heads of keys and values as of queries.
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
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def latent_queries(self) -> bool:
        """Whether queries come from a small vector too."""
        return self.latent is not None and self.latent.q_rank is not None

    @property
    def whole_queries(self) -> bool:
        """Whether queries come from the states themselves."""
        return not self.latent_queries

    @property
    def router_bias(self) -> bool:
        """Whether a bias has its part in the choice of experts."""
        return self.experts is not None and self.experts.bias

    @property
    def shared_experts(self) -> bool:
        """Whether there are experts that every token goes to."""
        return self.experts is not None and self.experts.shared > 0

    @property
    def library_keys(self) -> dict[str, Any]:
        """The sizes and flags under the names of transformers' config classes."""
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
            **find_architecture(self.architecture).library_keys(self),
        }

    @property
    def dims(self) -> dict[str, int]:
        """The sizes by the letters that table shapes use."""
        return {
            "d": self.hidden_size,
            "ff": self.intermediate_size,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "v": self.vocab_size,
            "hd": self.head_dim,
            "layers": self.layers,
            **expert_dims(self.experts, self.layers),
            **(self.latent.dims(self.heads) if self.latent else {}),
        }


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises CheckpointError when the file is missing, is not a JSON object, or is too big for a config.
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
    whole, found = raw, _class(raw, where)
    architecture = find_architecture(found.name, where)
    raw = _decoder(raw, architecture, where)
    get = Values(raw, where, architecture.defaults)
    hidden, heads = get.size("hidden_size"), get.size("num_attention_heads")
    kv_heads, latent = _or_default(get, "num_key_value_heads", heads), architecture.latent(get)
    head_dim = latent.rope if latent else _or_default(get, "head_dim", max(hidden // heads, 1))
    stated = latent is None and get.stated("head_dim") is not None
    _check_heads(get, hidden, heads, kv_heads, latent)
    if head_dim % 2:
        key = "qk_rope_head_dim" if latent else "head_dim"
        raise get.wrong(key, f"{head_dim} is odd, RoPE needs pairs")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise get.wrong("hidden_act", f"{str(raw['hidden_act'])[:40]!r} is not silu, which this layout needs")
    architecture.check(get)
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
        attention_bias=_flag(get, "attention_bias"),
        mlp_bias=_flag(get, "mlp_bias"),
        # transformers 5 writes head_dim into every nested config; only an unusual one says something.
        explicit_head_dim=stated and (architecture.mount is None or head_dim * heads != hidden),
        raw=_cleaned(whole, found),
        decoder=unquantized(raw),
        notes=rope.notes,
        experts=architecture.experts(get),
        latent=latent,
    )


def _check_heads(get: Values, hidden: int, heads: int, kv_heads: int, latent: Latent | None) -> None:
    """Raise CheckpointError for numbers of heads that go with no model."""
    if latent is not None and kv_heads != heads:
        why = f"is {kv_heads}, and latent attention has as many as num_attention_heads, {heads}"
        raise get.wrong("num_key_value_heads", why)
    if heads % kv_heads:
        raise get.wrong("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if latent is None and get.stated("head_dim") is None and hidden % heads:
        raise get.wrong("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")


def load_config(folder: Path) -> ModelConfig:
    """Read and normalise `folder`/config.json; raises CheckpointError.

    >>> from dsconvert.checkpoints.locate import locate
    >>> load_config(locate("sample:")).hidden_size
    256
    """
    path = folder / "config.json"
    return normalise(load_json(path), path)


def _class(raw: dict[str, Any], where: object) -> ModelClass:
    found = model_class(raw)
    if found.name:
        return found
    raise CheckpointError(
        "does not name one architecture",
        where=where,
        why=f'"architectures" is {str(raw.get("architectures"))[:80]!r}',
        hint=f"Set it to the class that was saved, one of the {len(ARCHITECTURES)} that the README lists",
    )


def _or_default(get: Values, key: str, derived: int) -> int:
    """A size that follows from others where neither config.json nor the class's default states it."""
    return derived if get.stated(key) is None else get.size(key)


def _flag(get: Values, key: str) -> bool:
    """A flag; false where the class does not read it."""
    return key in get.defaults and get.flag(key)


def is_tied(raw: Mapping[str, Any], name: str) -> bool:
    """Whether a config.json says that the head is the embedding; transformers' default where it is silent."""
    architecture = ARCHITECTURES.get(name)
    mount = architecture.mount if architecture else None
    part = raw.get(mount.key) if mount and not mount.tied_outside else raw
    default = mount is not None and mount.tied_outside
    return isinstance(part, dict) and part.get("tie_word_embeddings", default) is True


def _cleaned(raw: dict[str, Any], found: ModelClass) -> dict[str, Any]:
    """The config as an output of it may carry it: under its class's own name, of no quantization."""
    named = {"architectures": [found.name]} if found.notes else {}
    return {**unquantized(raw), **named}


def _decoder(raw: dict[str, Any], architecture: Architecture, where: object) -> dict[str, Any]:
    """The decoder's part of a config.

    In transformers' layout the whole model's config says whether the head may be absent. It says so by
    default, also for published files that have one.
    """
    mount = architecture.mount
    if mount is None:
        return raw
    part, own = raw.get(mount.key), mount.decoder.model_type
    if not isinstance(part, dict) or part.get("model_type", own) not in (own, *mount.also):
        told = part.get("model_type") if isinstance(part, dict) else part
        raise CheckpointError(
            f"{mount.key!r} holds no {own} decoder",
            where=where,
            why=f"It is {str(told)[:80]!r}",
            hint="Fetch config.json again from where the checkpoint came from",
        )
    if mount.tied_outside:
        return {**part, "tie_word_embeddings": raw.get("tie_word_embeddings", True)}
    return part
