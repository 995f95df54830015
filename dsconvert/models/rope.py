"""RoPE as config.json states it, by transformers' rules: which key counts, and what an absent one means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsconvert.models.values import Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

KEYS = ("rope_scaling", "rope_parameters")  # the first that says anything counts, and the other is not read
ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")
FAST, SLOW = 32.0, 1.0  # turns within the original context between which YaRN blends
UNREAD = "attn_factor"  # of a total factor, as vLLM takes it
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling; `type` is one of ROPE_TYPES, or in a GGUF file read back "none".

    `attention_factor` is the factor on cosines and sines, None for the type's own. `unread_factor` is
    `attn_factor`, which neither transformers nor llama.cpp goes by. `mscale_all_dim` is YaRN's weight on the
    scores of latent attention. `factors` are divisors of each frequency, which a GGUF file holds in place of
    "llama3".
    """

    type: str
    factor: float
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = FAST
    beta_slow: float = SLOW
    truncate: bool = True
    unread_factor: float | None = None
    mscale_all_dim: float | None = None
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rope:
    """What config.json says of RoPE, and what the user should know of how it was read."""

    theta: float
    scaling: RopeScaling | None
    notes: tuple[str, ...] = ()


def settings(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The key that RoPE is taken from, and what it says: `rope_scaling` unless it is absent or empty."""
    key = next((key for key in KEYS if raw.get(key)), KEYS[1])
    return key, dict(raw.get(key) or {})


def kind_of(stated: Mapping[str, Any]) -> Any:
    """The type of scaling that the settings name, in the new or in the old spelling."""
    return stated.get("rope_type", stated.get("type", "default"))


def read_rope(raw: Mapping[str, Any], get: Values) -> Rope:
    """RoPE base and scaling from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old).

    Raises CheckpointError, which names the key, for what transformers does not run with.
    """
    for key in KEYS:
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise get.wrong(key, "is neither an object nor null")
    key, stated = settings(raw)
    kind, inner = kind_of(stated), get.over(stated)
    for name, value in stated.items():
        if isinstance(value, dict):
            raise get.wrong(
                key,
                f"holds {name[:40]!r}, RoPE of one layer type, and all layers of this layout share theirs",
            )
    if stated.get("type", kind) != kind:
        raise get.wrong(key, f"says rope_type {kind!r:.40} and type {stated['type']!r:.40}, which contradict")
    if inner.number("partial_rotary_factor", 1.0) != 1.0:
        raise get.wrong("partial_rotary_factor", "is not 1, and this layout rotates whole heads")
    if inner.raw.get("rope_theta", 1.0) is None:
        raise get.wrong("rope_theta", "is null, with which transformers does not run")
    theta = inner.number("rope_theta")
    notes = _both(raw, theta, get)
    if kind == "default":
        return Rope(theta, None, notes)
    if kind not in ROPE_TYPES:
        raise get.wrong(
            key,
            f"is of type {str(kind)[:40]!r}; known: default, {', '.join(ROPE_TYPES)}",
            "Give a release of the model without this scaling",
        )
    scaling, more = SCALINGS[kind](raw, inner) if kind in SCALINGS else (None, ())
    return Rope(theta, scaling or RopeScaling(kind, inner.number("factor")), (*notes, *more))


def _both(raw: Mapping[str, Any], theta: float, get: Values) -> tuple[str, ...]:
    """What to say where both keys are there and say different things."""
    old, new = (raw.get(key) for key in KEYS)
    if not old or not new:
        return ()
    if new.get("rope_theta", theta) != theta:
        raise get.wrong(
            "rope_parameters",
            f"has rope_theta {str(new['rope_theta'])[:40]}, which transformers does not read beside "
            f"rope_scaling: it would take {theta:g}",
            "Put rope_theta into rope_scaling too, or leave one of rope_scaling and rope_parameters out",
        )
    spelling = ("type", "rope_type", "rope_theta")
    said = [(kind_of(part), {k: v for k, v in part.items() if k not in spelling}) for part in (old, new)]
    if said[0] == said[1]:
        return ()
    return (
        f"config.json has rope_scaling ({str(said[0][0])[:40]}) and rope_parameters "
        f"({str(said[1][0])[:40]}), which differ; rope_scaling was taken, as transformers does",
    )


def _original(raw: Mapping[str, Any], inner: Values) -> tuple[int | None, tuple[str, ...]]:
    """The original context, None for max_position_embeddings; the one outside of the settings wins."""
    inside = inner.raw.get(ORIGINAL)
    if inside is None and ORIGINAL in inner.raw:
        raise inner.wrong(ORIGINAL, "is null, with which transformers does not run")
    if inside is None:
        return None, ()
    outside = raw.get(ORIGINAL)
    if outside is None or outside == inside:
        return inner.size(ORIGINAL), ()
    note = (
        f"config.json has two {ORIGINAL}: {inside} in the RoPE settings, {outside} outside; the second was "
        "taken, as by transformers 5"
    )
    return inner.over({ORIGINAL: outside}).size(ORIGINAL), (note,)


def _yarn(raw: Mapping[str, Any], inner: Values) -> tuple[RopeScaling, tuple[str, ...]]:
    """YaRN's keys; 0 and null stand for the default in all but attention_factor and truncate."""
    original, notes = _original(raw, inner)
    stated = settings(raw)[1]
    if inner.number("rope_theta") <= 1:
        raise inner.wrong("rope_theta", "is not above 1, and yarn takes its logarithm")
    if stated.get("factor", 1.0) is None:
        factor = inner.size("max_position_embeddings") / (original or inner.size("max_position_embeddings"))
    else:
        factor = inner.number("factor")
    attention = None
    if stated.get("attention_factor") is not None:
        attention = inner.number("attention_factor")
    elif stated.get("mscale") and stated.get("mscale_all_dim"):
        attention = mscale(factor, inner.number("mscale")) / mscale(factor, inner.number("mscale_all_dim"))
    beta_fast, beta_slow = (
        inner.number(name) if stated.get(name) else usual
        for name, usual in (("beta_fast", FAST), ("beta_slow", SLOW))
    )
    scaling = RopeScaling(
        "yarn", factor, original, attention_factor=attention,
        beta_fast=beta_fast, beta_slow=beta_slow, truncate=bool(stated.get("truncate", True)),
        mscale_all_dim=inner.number("mscale_all_dim") if stated.get("mscale_all_dim") else None,
    )  # fmt: skip
    if attention is not None or stated.get(UNREAD) is None:
        return scaling, notes
    meant = mscale(factor) * inner.number(UNREAD)
    note = (
        f"config.json states {UNREAD} {inner.number(UNREAD):g} of yarn, which neither transformers nor "
        f"llama.cpp goes by: they scale cosines and sines by {mscale(factor):.4g}, and a runtime that reads "
        f"it by {meant:.4g}"
    )
    return replace(scaling, unread_factor=inner.number(UNREAD)), (*notes, note)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cosines and sines for a context `factor` times as long (Peng et al., 2023)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def corner(turns: float, context: int, theta: float, head_dim: int) -> float:
    """The place of the pair of a head that turns so many times within the context."""
    return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _llama3(raw: Mapping[str, Any], inner: Values) -> tuple[RopeScaling, tuple[str, ...]]:
    original, notes = _original(raw, inner)
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if high <= low:
        raise inner.wrong("high_freq_factor", f"is {high:g}, should be above low_freq_factor, {low:g}")
    return RopeScaling("llama3", inner.number("factor"), original, low, high), notes


# How the settings of a type are read that has more than a factor.
SCALINGS = {"yarn": _yarn, "llama3": _llama3}


def rope_factors(config: ModelConfig) -> dict[str, npt.NDArray[np.float32]]:
    """The divisors of Llama 3's RoPE frequencies, which the runtime wants as a tensor.

    float32 [head_dim / 2] under "rope_freqs.weight"; nothing for other scalings. Low frequencies are
    divided by `factor`, high ones kept, those between blended (Llama 3.1 reference code).
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "llama3":
        return {}
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    context = scaling.original_context or config.context_length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)}
