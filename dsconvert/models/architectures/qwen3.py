"""Qwen3 (dense) and R1-0528-Qwen3-8B: norms on the heads of q and k, heads of a size of their own."""

from __future__ import annotations

from dataclasses import replace

from dsconvert.models.architecture import TorchClasses, head_keys, usual_keys
from dsconvert.models.architectures import qwen2
from dsconvert.models.tensor_table import DROP, Row, Table
from dsconvert.models.values import Values

_NORMS = tuple(
    Row(
        f"model.layers.{{i}}.self_attn.{letter}_norm.weight",
        f"blk.{{i}}.attn_{letter}_norm.weight",
        "norm",
        ("hd",),
    )
    for letter in "qk"
)


def check(get: Values) -> None:
    """llama.cpp has no tensors for the biases that transformers' class may have, o's among them."""
    if get.flag("attention_bias"):
        raise get.wrong("attention_bias", "is true, and no GGUF file of this architecture holds such biases")
    qwen2.check(get)


def torch_classes() -> TorchClasses:
    from transformers import Qwen3Config
    from transformers.models.qwen3 import modeling_qwen3 as model

    return TorchClasses(Qwen3Config, model.Qwen3DecoderLayer, model.Qwen3RotaryEmbedding, model.Qwen3RMSNorm)


ARCHITECTURES = (
    replace(
        qwen2.QWEN2,
        hf_class="Qwen3ForCausalLM",
        model_type="qwen3",
        gguf="qwen3",
        table=Table((*qwen2.WEIGHTS, *_NORMS), DROP),
        defaults={**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False},
        check=check,
        torch_classes=torch_classes,
        gguf_keys=lambda config: {
            **usual_keys(config),
            **head_keys(replace(config, explicit_head_dim=True)),
        },
        words=r"\w*qwen3(ForCausalLM|Model|LMHeadModel)",
        wide_values=lambda config: False,
    ),
)
