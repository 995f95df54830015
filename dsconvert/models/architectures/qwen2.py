"""Qwen2, Qwen2.5 and R1-Distill-Qwen: Llama's tensors with biases on q, k and v, and RoPE by halves."""

from __future__ import annotations

from dataclasses import replace

from dsconvert.models.architecture import (
    Architecture,
    TorchClasses,
    check_full_attention,
    head_keys,
    usual_keys,
)
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.tensor_table import DROP, IDENTITY, Row, Table
from dsconvert.models.values import Values

# llama.cpp rotates halves here, as Hugging Face does: no row moves.
WEIGHTS = tuple(replace(row, transform=IDENTITY) for row in LLAMA.table.rows if not row.when)
_BIASES = tuple(
    Row(
        f"model.layers.{{i}}.self_attn.{letter}_proj.bias",
        f"blk.{{i}}.attn_{letter}.bias",
        "qkv",
        ("q" if letter == "q" else "kv",),
    )
    for letter in "qkv"
)
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def check(get: Values) -> None:
    """A window counts where use_sliding_window is true, in the layers from max_window_layers on."""
    first = get.stated("max_window_layers")
    layers = get.size("num_hidden_layers")
    used = get.flag("use_sliding_window") and (first == 0 or get.size("max_window_layers") < layers)
    check_full_attention(get, "sliding_window" if used else "")


def torch_classes() -> TorchClasses:
    from transformers import Qwen2Config
    from transformers.models.qwen2 import modeling_qwen2 as model

    return TorchClasses(Qwen2Config, model.Qwen2DecoderLayer, model.Qwen2RotaryEmbedding, model.Qwen2RMSNorm)


QWEN2 = Architecture(
    hf_class="Qwen2ForCausalLM",
    model_type="qwen2",
    gguf="qwen2",
    table=Table((*WEIGHTS, *_BIASES), DROP),
    defaults=DEFAULTS,
    check=check,
    torch_classes=torch_classes,
    gguf_keys=lambda config: {**usual_keys(config), **head_keys(config)},
    words=r"\w*qwen2(ForCausalLM|Model|LMHeadModel)",
    wide_values=lambda config: config.layers == 80,
    mlx=True,
)
ARCHITECTURES = (QWEN2,)
