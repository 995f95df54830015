"""The numbers that a decoder's arithmetic needs besides its weights, for the numpy proof.

Config.json is read here a second time, apart from the converter's reading, so that what that one drops shows.
Whatever this small reading does not know it leaves to transformers' own class, see `Unread`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import CheckpointError
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.experts import Experts, Indexer
from dsconvert.models.rope import corner

Floats = npt.NDArray[np.float32]
Rule = Callable[[Floats, Mapping[str, Any], float, int], tuple[Floats, float]]
# Keys whose names sound as if they changed the arithmetic: those known, or not read there.
SOUNDS = re.compile(
    r"rope|rotary|yarn|theta|attention|attn|scal|position|window|norm|multipl|softcap|_act|layer_types|causal"
)
KNOWN = (
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings",
    "original_max_position_embeddings", "rms_norm_eps", "num_attention_heads", "hidden_act", "attention_bias",
    "attention_dropout", "_attn_implementation", "attn_implementation", "output_attentions",
    "sliding_window", "use_sliding_window", "max_window_layers", "attention_chunk_size", "layer_types",
    "is_causal", "_attn_implementation_autoset", "_flash_attn_2_enabled", "use_flash_attn",
)  # fmt: skip
ONLY = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (None, 1), "is_causal": (True,)}
# `finetuned` says how the model was made.
ROPE_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}
NEEDED = {"factor", "low_freq_factor", "high_freq_factor"}
FACTOR, ORIGINAL = {"factor"}, {"factor", "original_max_position_embeddings"}
YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


class Unread(Exception):
    """A key of config.json that this reading does not know; transformers' own has to be asked."""


@dataclass(frozen=True)
class Numbers:
    """A decoder's sizes and RoPE; `rope` says in words how its angles come about.

    `angles` are float32 [head_dim / 2] per position, `scale` is the factor on their cosines and sines. They
    hold for windows of up to `within` tokens. `softmax` is the factor on the scores of attention.
    """

    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope: str
    angles: Floats
    scale: float
    softmax: float
    experts: Experts | None = None
    indexer: Indexer | None = None
    within: float = math.inf


def numbers(config: ModelConfig) -> Numbers:
    """The numbers of a model, by its config.json or, where it has none, by its GGUF keys.

    Raises Unread for a config.json with a key that may matter and is not known here.
    """
    architecture = find_architecture(config.architecture)
    if not architecture.numpy_block:
        raise Unread("architecture")
    if not config.decoder:
        return read_stored(config)
    return read_raw(config.decoder, architecture.defaults)


def read_raw(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> Numbers:
    """The numbers that transformers takes from a config.json; raises Unread.

    `defaults` are its class's, by key.
    """
    unknown = [key for key in raw if SOUNDS.search(key) and key not in KNOWN]
    if unknown:
        raise Unread(unknown[0])
    stated = {**defaults, **raw}
    raw = {**defaults, **{key: value for key, value in raw.items() if value is not None}}
    for key, values in ONLY.items():
        if raw.get(key, values[0]) not in values:
            raise Unread(key)
    heads, context = raw["num_attention_heads"], raw["max_position_embeddings"]
    head_dim = stated.get("head_dim") or raw["hidden_size"] // heads
    said = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = said.get("rope_theta", raw["rope_theta"])
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in RULES:
        raise Unread(f"rope_type {kind}")
    rule, keys = RULES[kind]
    for key in said:
        if key not in keys | ROPE_KEYS:
            raise Unread(key)
    if said.get("partial_rotary_factor") not in ONLY["partial_rotary_factor"]:
        raise Unread("partial_rotary_factor")
    # Outside of the settings it counts too, and more than inside.
    outside = {key: raw[key] for key in ORIGINAL - FACTOR if raw.get(key) is not None}
    defaults = {"original_max_position_embeddings": context}
    said = {**defaults, **said, **outside, "max_position_embeddings": context}
    for key in keys & NEEDED - said.keys():
        raise Unread(f"no {key}")
    try:
        angles, scale = rule(unscaled(theta, head_dim), said, theta, head_dim)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise Unread(f"rope_type {kind}, on which there is {error}") from None
    return Numbers(
        heads=heads,
        kv_heads=stated.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        context_length=context,
        norm_eps=raw["rms_norm_eps"],
        rope_theta=theta,
        rope=", ".join([str(kind), *(f"{key} {said[key]}" for key in sorted(keys) if key in said)]),
        angles=angles.astype(np.float32),
        scale=scale,
        softmax=head_dim**-0.5,
        within=context if kind == "dynamic" else math.inf,
    )


def unscaled(theta: float, head_dim: int) -> Floats:
    """RoPE's angle per position for each pair, float32 [head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def _unchanged(angles: Floats, said: Mapping[str, Any], theta: float, dim: int) -> tuple[Floats, float]:
    """No scaling; that of `dynamic` begins beyond max_position_embeddings."""
    return angles, 1.0


def _linear(angles: Floats, said: Mapping[str, Any], theta: float, dim: int) -> tuple[Floats, float]:
    return angles / np.float32(said["factor"]), 1.0


def _yarn(angles: Floats, said: Mapping[str, Any], theta: float, dim: int) -> tuple[Floats, float]:
    """Fast angles are kept, slow ones divided by the factor, those between blended (Peng et al., 2023)."""
    context, factor = said["original_max_position_embeddings"], said["factor"]
    factor = said["max_position_embeddings"] / context if factor is None else factor

    def magnitude(weight: float = 1.0) -> float:
        return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0

    def place(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(said.get("beta_fast") or 32), place(said.get("beta_slow") or 1)
    if said.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = np.clip((np.arange(len(angles)) - low) / (high - low if high != low else 1e-3), 0, 1)
    over, under = said.get("mscale"), said.get("mscale_all_dim")
    scale = said.get("attention_factor")
    if scale is None:
        scale = magnitude(over) / magnitude(under) if over and under else magnitude()
    return (angles / factor * slow + angles * (1 - slow)).astype(np.float32), float(scale)


def _llama3(angles: Floats, said: Mapping[str, Any], theta: float, dim: int) -> tuple[Floats, float]:
    """Angles with many turns in the original context are kept, slow ones divided, those between blended."""
    turns = said["original_max_position_embeddings"] * angles.astype(np.float64) / (2 * np.pi)
    low, high, factor = said["low_freq_factor"], said["high_freq_factor"], said["factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (angles * (kept + (1 - kept) / factor)).astype(np.float32), 1.0


# By rope_type: the rule, and the keys that it reads.
RULES: dict[Any, tuple[Rule, set[str]]] = {
    "default": (_unchanged, set()),
    "dynamic": (_unchanged, FACTOR),
    "linear": (_linear, FACTOR),
    "yarn": (_yarn, ORIGINAL | YARN),
    "llama3": (_llama3, ORIGINAL | {"low_freq_factor", "high_freq_factor"}),
}


def read_stored(config: ModelConfig) -> Numbers:
    """The numbers that llama.cpp goes by for a GGUF file whose keys `config` was made of."""
    divisors, scale = stored_rope(config)
    return Numbers(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        context_length=config.context_length,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        rope=str(config.rope_scaling or "default"),
        angles=(unscaled(config.rope_theta, config.head_dim) / divisors).astype(np.float32),
        scale=scale,
        softmax=config.head_dim**-0.5,
        experts=config.experts,
    )


def stored_rope(config: ModelConfig) -> tuple[Floats, float]:
    """What llama.cpp divides the angles by, float32 [head_dim / 2], and the factor on cosines and sines.

    Its YaRN (ggml_rope_yarn, ggml_rope_yarn_corr_dims) turns 32 and 1 times between rounded corners, whatever
    else a file of this architecture says.
    """
    scaling, half = config.rope_scaling, config.head_dim // 2
    if scaling is None:
        return np.ones(half, np.float32), 1.0
    if scaling.factors and len(scaling.factors) != half:
        raise CheckpointError("rope_freqs.weight is misshapen", why=f"{len(scaling.factors)} of {half} pairs")
    divisors = np.array(scaling.factors or np.ones(half), np.float32)
    scale = 1.0 if scaling.attention_factor is None else scaling.attention_factor
    if scaling.type == "linear":
        return divisors * np.float32(scaling.factor), scale
    if scaling.type == "yarn":
        slow = stored_ramp(config)
        kept: Floats = (slow / scaling.factor + (1 - slow)).astype(np.float32)
        divisors = divisors / kept
    return divisors, scale


def stored_ramp(config: ModelConfig) -> npt.NDArray[np.float64]:
    """How much of each angle llama.cpp's YaRN divides by the factor, 0 to 1 [head_dim / 2]."""
    scaling = config.rope_scaling
    context = (scaling.original_context if scaling else None) or config.context_length
    low, high = (corner(turns, context, config.rope_theta, config.head_dim) for turns in (32.0, 1.0))
    low, high = max(math.floor(low), 0), min(math.ceil(high), config.head_dim - 1)
    ramp: npt.NDArray[np.float64] = np.clip(
        (np.arange(config.head_dim // 2) - low) / max(high - low, 1e-3), 0, 1
    )
    return ramp
