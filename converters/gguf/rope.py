"""RoPE in a GGUF file: the keys that llama.cpp goes by, what they cannot say, and how they are read back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.decoder.numpy_config import stored_ramp
from dsconvert.errors import CheckpointError
from dsconvert.models.architecture import Architecture
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.rope import FAST, ORIGINAL, SLOW, RopeScaling, corner, mscale

Keys = dict[str, tuple[str, Any]]
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
SAME = 1e-6  # float32 holds no finer difference


def scaling_keys(config: ModelConfig, architecture: Architecture) -> Keys:
    """`rope.scaling.*`; raises CheckpointError, which names the key of config.json, for what has no form.

    Llama 3's scaling travels as the tensor rope_freqs.weight. That of `dynamic` begins beyond the context
    that the file states, and is left out: see `notes`.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "llama3" and not architecture.derived(config):
        raise CheckpointError(
            "RoPE scaling of type 'llama3' cannot be written",
            where="config.json",
            why=f"llama.cpp reads no tensor of frequency factors of the architecture {architecture.gguf}",
            hint="dsconvert gptq and dsconvert exl2 keep it; without it the GGUF file would be another model",
        )
    if scaling is None or scaling.type in ("llama3", "dynamic"):
        return {}
    if config.latent is not None:
        return latent_keys(config, scaling)
    keys: Keys = {
        "rope.scaling.type": ("string", scaling.type),
        "rope.scaling.factor": ("float32", scaling.factor),
    }
    if scaling.original_context is not None:
        keys["rope.scaling.original_context_length"] = ("uint32", scaling.original_context)
    if scaling.type == "yarn":
        check_yarn(config, scaling)
        attention = mscale(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor
        ratio = attention / magnitude(scaling.factor)
        if not math.isclose(ratio, 1.0, rel_tol=SAME):
            keys["rope.scaling.attn_factor"] = ("float32", ratio)
        if (
            scaling.unread_factor is not None
        ):  # as llama.cpp's converter writes it; no runtime of it goes by it
            keys["rope.scaling.yarn_attn_factor"] = ("float32", scaling.unread_factor)
    return keys


def latent_keys(config: ModelConfig, scaling: RopeScaling) -> Keys:
    """`rope.scaling.*` of latent attention, of which llama.cpp scales the whole scores and turns at length 1.

    Raises CheckpointError for what transformers computes otherwise.
    """
    if scaling.type != "yarn":
        raise _refused("type", f"It is {scaling.type}, and llama.cpp scales latent attention by yarn alone")
    check_yarn(config, scaling)
    if scaling.mscale_all_dim is None:
        raise _refused("mscale_all_dim", "It is not stated, and llama.cpp scales whole heads then")
    if not math.isclose(scaling.attention_factor or 0.0, 1.0, rel_tol=SAME):
        told = "mscale, mscale_all_dim or attention_factor"
        raise _refused(told, "They leave a factor on cosines and sines; llama.cpp has one on the scores")
    return {
        "rope.scaling.type": ("string", scaling.type),
        "rope.scaling.factor": ("float32", scaling.factor),
        "rope.scaling.original_context_length": ("uint32", scaling.original_context or config.context_length),
        "rope.scaling.yarn_beta_fast": ("float32", scaling.beta_fast),
        "rope.scaling.yarn_beta_slow": ("float32", scaling.beta_slow),
        LOG_MULTIPLIER: ("float32", 0.1 * scaling.mscale_all_dim),
    }


def magnitude(factor: float) -> float:
    """The factor on cosines and sines that llama.cpp's YaRN begins with (ggml_rope_yarn)."""
    return 1.0 + 0.1 * math.log(factor)


def notes(config: ModelConfig) -> tuple[str, ...]:
    """What the user should know of a file made of this config, of its RoPE above all."""
    known = (*config.notes, *find_architecture(config.architecture).gguf_notes(config))
    if config.rope_scaling is None or config.rope_scaling.type != "dynamic":
        return known
    return (
        *known,
        "RoPE scaling of type dynamic has no GGUF form and was left out: the file gives the model as "
        f"trained, up to {config.context_length} tokens (max_position_embeddings)",
    )


def check_yarn(config: ModelConfig, scaling: RopeScaling) -> None:
    """See that llama.cpp's YaRN turns every angle as this config says; raises CheckpointError."""
    if scaling.factor < 1:
        raise _refused("factor", f"It is {scaling.factor:g}, and versions of llama.cpp differ below 1")
    wanted = ramp(config, scaling)
    if np.allclose(wanted, stored_ramp(config), rtol=0.0, atol=SAME):
        return
    usual = {"beta_fast": FAST, "beta_slow": SLOW, "truncate": True}
    named = [name for name, value in usual.items() if getattr(scaling, name) != value]
    alone = [name for name in named if not _same_without(config, scaling, name)] or named
    values = " and ".join(f"{name} is {str(getattr(scaling, name)).lower()}" for name in alone)
    rule = "llama.cpp blends between the corners of 32 turns and of 1, rounded, and reads no key on that"
    raise _refused(" and ".join(alone) or ORIGINAL, f"{values or 'it is very small'}; {rule}")


def ramp(config: ModelConfig, scaling: RopeScaling) -> npt.NDArray[np.float64]:
    """How much of each angle YaRN divides by the factor, by transformers' rule, 0 to 1 [head_dim / 2]."""
    context, theta = scaling.original_context or config.context_length, config.rope_theta
    low, high = (
        corner(turns, context, theta, config.head_dim) for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    places = (np.arange(config.head_dim // 2) - low) / (high - low if high != low else 1e-3)
    found: npt.NDArray[np.float64] = np.clip(places, 0, 1)
    return found


def _same_without(config: ModelConfig, scaling: RopeScaling, name: str) -> bool:
    """Whether the angles are the same with the usual value of one key."""
    usual = replace(scaling, **{name: getattr(RopeScaling("yarn", 1.0), name)})
    return bool(np.allclose(ramp(config, scaling), ramp(config, usual), rtol=0.0, atol=SAME))


def _refused(name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name} of RoPE's yarn scaling cannot be written",
        where="config.json",
        why=why,
        hint="dsconvert gptq and dsconvert exl2 keep it; without it the GGUF file would be another model",
    )
