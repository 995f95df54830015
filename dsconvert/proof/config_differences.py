"""Where the numbers that two models state differ: those that a runtime goes by, and those of shapes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields

import numpy as np

from dsconvert.decoder.numpy_config import Numbers
from dsconvert.decoder.torch_config import read_numbers
from dsconvert.errors import CheckpointError
from dsconvert.models.config import ModelConfig
from dsconvert.models.experts import Experts, Indexer

ROPE_CLOSE = 1e-5  # relative; float32 arithmetic of two programs differs by less


def differences(reference: Numbers, candidate: Numbers) -> tuple[str, ...]:
    """The numbers that a runtime goes by and that differ; floats as float32 can hold them."""
    names = ("norm_eps", "heads", "kv_heads", "head_dim", "context_length", "softmax")
    found = [text] if (text := rope_difference(reference, candidate)) else []
    found += _differing(reference, candidate, names)
    for what, kind in (("experts", Experts), ("indexer", Indexer)):
        ours, theirs = getattr(reference, what), getattr(candidate, what)
        if ours and theirs:
            parts = tuple(part.name for part in fields(kind))
            found += [f"{what}: {text}" for text in _differing(ours, theirs, parts)]
    return tuple(found)


def _differing(reference: object, candidate: object, names: tuple[str, ...]) -> list[str]:
    """A sentence on each of these attributes that is not the same on both sides."""
    found = []
    for name in names:
        a, b = getattr(reference, name), getattr(candidate, name)
        close = isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6)
        if a != b and not close:
            found.append(f"{name} is {b}, the reference has {a}")
    return found


def config_differences(reference: ModelConfig, candidate: ModelConfig) -> tuple[str, ...]:
    """The `differences` of two files where no decoder is run."""
    return differences(read_numbers(reference), read_numbers(candidate))


def rope_difference(one: Numbers, other: Numbers) -> str:
    """What differs in the two decoders' RoPE angles, or nothing."""
    same = one.angles.shape == other.angles.shape and np.allclose(one.angles, other.angles, ROPE_CLOSE, 0.0)
    if same and math.isclose(one.scale, other.scale, rel_tol=ROPE_CLOSE):
        return ""
    if one.rope_theta != other.rope_theta:
        return f"rope_theta is {other.rope_theta}, the reference has {one.rope_theta}"
    if same:
        return f"RoPE's attention factor is {other.scale:g}, the reference has {one.scale:g}"
    return f"RoPE scaling is {other.rope}, the reference has {one.rope}"


# Sizes on which the shapes of tensors depend.
SIZES = {"layers": "layers", "d": "hidden_size", "v": "vocab_size", "ff": "intermediate_size"}
SIZES |= {"q": "the width of the queries", "kv": "the width of keys and values"}


def check_sizes(reference: ModelConfig, candidate: ModelConfig, but: Collection[str] = ()) -> None:
    """Raises CheckpointError when the two cannot be the same model; the SIZES of `but` may differ."""
    for key, name in SIZES.items():
        a, b = reference.dims[key], candidate.dims[key]
        if a != b and key not in but:
            raise CheckpointError(
                "the two are not the same model",
                why=f"{name} is {b}, the reference has {a}",
                hint="Give the checkpoint that the output was made from",
            )
