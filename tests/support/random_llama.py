"""Random Llama models in memory, with transformers' own model as their oracle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.qtypes import QTYPES
from converters.gguf.rounding import nearest
from dsconvert.models.config import ModelConfig, normalise

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class Memory:
    """A WeightSource of arrays in memory."""

    tensors: dict[str, npt.NDArray[np.float32]]
    type: str = "f32"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return self.type

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self.tensors[name][start:stop]

    def nearest(self, name: str, start: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        kind = QTYPES.get(self.type)
        return None if kind is None else nearest(rows, kind)

    def changed(self, **arrays: npt.NDArray[np.float32]) -> Memory:
        """With other arrays under names that the model has; dots are written as double underscores."""
        new = {name.replace("__", "."): array for name, array in arrays.items()}
        assert new.keys() <= self.tensors.keys()
        return replace(self, tensors={**self.tensors, **new})


def plain(source: Memory, kind: str) -> Memory:
    """Every matrix rounded plainly."""
    made = {
        name: nearest(array, QTYPES[kind]) if array.ndim == 2 else array
        for name, array in source.tensors.items()
    }
    return Memory({name: array for name, array in made.items() if array is not None}, kind)


def stored(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The config as the keys of a GGUF file state it, with changes: nothing is left of config.json."""
    return replace(config, decoder={}, **changes)


def make(seed: int = 0, scale: float = 4.0, **keys: Any) -> tuple[Any, Memory, ModelConfig]:
    """transformers' model, its weights, and our config; `scale` multiplies the initial weights' 0.02.

    Attention then separates tokens and the distributions are not flat, so that defects show.
    """
    import torch
    import transformers

    raw = {**BASE, **keys}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "architectures"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4 * scale if name == "lm_head.weight" else scale)
    tensors = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return model, Memory(tensors), normalise(raw, "memory")


def tokens(config: ModelConfig, windows: int, length: int, seed: int = 1) -> npt.NDArray[np.int64]:
    """Random token ids [windows, length]."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (windows, length))
