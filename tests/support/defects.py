"""Copies of a model with defects and with noise."""

from __future__ import annotations

import numpy as np
from random_llama import Memory

L = "model.layers.1."


def noisy(source: Memory, relative: float, kind: str = "q8_0") -> Memory:
    """Every matrix with Gaussian noise of this size relative to its own, as a quantizer would leave it."""
    rng = np.random.default_rng(3)
    arrays = {
        name: array
        if array.ndim == 1
        else array + array.std() * relative * rng.standard_normal(array.shape, np.float32)
        for name, array in source.tensors.items()
    }
    return Memory(arrays, kind)


def interleaved(source: Memory) -> Memory:
    """q and k as a GGUF stores them, with the inverse forgotten."""
    arrays = dict(source.tensors)
    for name, array in source.tensors.items():
        if "q_proj" in name or "k_proj" in name:
            arrays[name] = np.ascontiguousarray(array.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64))
    return Memory(arrays, "q8_0")


def zeroed(source: Memory) -> Memory:
    return Memory({**source.tensors, L + "mlp.down_proj.weight": np.zeros((64, 160), np.float32)}, "q8_0")
