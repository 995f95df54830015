"""Mistral, where no sliding window is used: Llama's tensors without biases, under the same GGUF name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dsconvert.models.architecture import Keys, TorchClasses
from dsconvert.models.architectures.llama import DEFAULTS, LLAMA
from dsconvert.models.tensor_table import DROP, Table

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig


def torch_classes() -> TorchClasses:
    from transformers import MistralConfig
    from transformers.models.mistral import modeling_mistral as model

    return TorchClasses(
        MistralConfig, model.MistralDecoderLayer, model.MistralRotaryEmbedding, model.MistralRMSNorm
    )


def gguf_keys(config: ModelConfig) -> Keys:
    """Llama's; a head's size goes without saying where it follows from the others."""
    usual = config.head_dim * config.heads == config.hidden_size
    return LLAMA.gguf_keys(replace(config, explicit_head_dim=not usual))


_OWN = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
ARCHITECTURES = (
    replace(
        LLAMA,
        hf_class="MistralForCausalLM",
        model_type="mistral",
        table=Table(tuple(row for row in LLAMA.table.rows if not row.when), DROP),
        defaults={k: v for k, v in DEFAULTS.items() if not k.endswith("_bias")} | _OWN,
        torch_classes=torch_classes,
        gguf_keys=gguf_keys,
        words=r"\w*mistral(ForCausalLM|Model|LMHeadModel)",
    ),
)
