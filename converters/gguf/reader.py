"""A GGUF language model as a WeightSource: read back through the inverse of the architecture table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.parse import GGUFFile
from dsconvert.arch import IDENTITY, ROPE_K, ROPE_Q, Arch, Spec, plan_stored
from dsconvert.archs import BY_GGUF_NAME
from dsconvert.config import ModelConfig, RopeScaling
from dsconvert.errors import CheckpointError


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file as a WeightSource: tensors by their Hugging Face names through the inverse table."""

    file: GGUFFile
    arch: Arch
    config: ModelConfig
    specs: dict[str, Spec]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def dtype(self, name: str) -> str:
        return self.file.tensors[self.specs[name].gguf].qtype.name

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        spec = self.specs[name]
        stored = self.file.tensors[spec.gguf].float32()
        return np.ascontiguousarray(spec.inverse(stored, self.config))

    def float32_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        spec = self.specs[name]
        tensor, transform = self.file.tensors[spec.gguf], spec.row.transform
        if transform is IDENTITY:
            return tensor.float32_rows(start, stop)
        if transform not in (ROPE_Q, ROPE_K):  # its rows lie anywhere in the file
            return self.float32(name)[start:stop]
        size = self.config.head_dim  # RoPE's order stays inside a head, so whole heads are read
        first, last = start // size * size, -(-stop // size) * size
        count = (last - first) // size
        stored = tensor.float32_rows(first, last)
        rows = transform.inverse(stored, replace(self.config, heads=count, kv_heads=count))
        return np.ascontiguousarray(rows.reshape(stored.shape)[start - first : stop - first])


def open_model(file: GGUFFile) -> GGUFModel:
    """The weight source of a language model's file; raises CheckpointError, PlanError."""
    name = file.keys.get("general.architecture")
    arch = BY_GGUF_NAME.get(name) if isinstance(name, str) else None
    if arch is None:
        raise CheckpointError(
            f"architecture {name!r} has no table here",
            where=file.path,
            why=f"known: {', '.join(BY_GGUF_NAME)}",
        )
    config = stored_config(file)
    specs = plan_stored(arch, config, {t.name: t.shape for t in file.tensors.values()})
    return GGUFModel(file, arch, config, {spec.hf: spec for spec in specs})


def stored_config(file: GGUFFile) -> ModelConfig:
    """The decoder's numbers as the file's own keys state them; raises CheckpointError for a missing key."""
    keys, prefix = file.keys, file.keys.get("general.architecture", "llama") + "."

    def need(key: str, default: Any = None) -> Any:
        value = keys.get(prefix + key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"key {prefix + key} is {'missing' if value is None else repr(value)[:40]}",
                                  where=file.path)  # fmt: skip
        return value

    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = need("attention.key_length", hidden // heads)
    embedding = file.tensors.get("token_embd.weight")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        layers=need("block_count"),
        heads=heads,
        kv_heads=need("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0] if embedding else need("vocab_size"),
        context_length=need("context_length"),
        norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope_theta=need("rope.freq_base", 10000.0),
        rope_scaling=_stored_scaling(file, prefix) or _stored_factors(file),
        tied="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        explicit_head_dim=prefix + "attention.key_length" in keys,
    )


def _stored_scaling(file: GGUFFile, prefix: str) -> RopeScaling | None:
    keys = file.keys
    kind = keys.get(prefix + "rope.scaling.type", "none")
    if kind == "none":
        return None
    original = keys.get(prefix + "rope.scaling.original_context_length")
    attention = keys.get(prefix + "rope.scaling.attn_factor")
    factor = keys.get(prefix + "rope.scaling.factor", 1.0)
    return RopeScaling(str(kind), float(factor), original, attention_factor=attention)


def _stored_factors(file: GGUFFile) -> RopeScaling | None:
    """The divisors of Llama 3's RoPE frequencies, which a file holds as a tensor and not as keys."""
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    return RopeScaling("factors", 1.0, factors=tuple(tensor.float32().tolist()))
