"""The Llama layout: DeepSeek LLM 7B and 67B, DeepSeek-Coder, and every other LlamaForCausalLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsconvert.models.architecture import (
    Architecture,
    Keys,
    TorchClasses,
    check_full_attention,
    head_keys,
    usual_keys,
)
from dsconvert.models.rope import rope_factors
from dsconvert.models.tensor_table import DROP, ROPE_K, ROPE_Q, Row, Table

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

_BIAS = "attention_bias"
_L = "model.layers.{i}."

ROWS = (
    Row("model.embed_tokens.weight", "token_embd.weight", "embed", ("v", "d")),
    Row("model.norm.weight", "output_norm.weight", "norm", ("d",)),
    Row("lm_head.weight", "output.weight", "head", ("v", "d"), tied_to="model.embed_tokens.weight"),
    Row(_L + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm", ("d",)),
    Row(_L + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "qkv", ("q", "d"), ROPE_Q),
    Row(_L + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "qkv", ("kv", "d"), ROPE_K),
    Row(_L + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "qkv", ("kv", "d")),
    Row(_L + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "o", ("d", "q")),
    Row(_L + "self_attn.q_proj.bias", "blk.{i}.attn_q.bias", "qkv", ("q",), ROPE_Q, when="attention_bias"),
    Row(_L + "self_attn.k_proj.bias", "blk.{i}.attn_k.bias", "qkv", ("kv",), ROPE_K, when="attention_bias"),
    Row(_L + "self_attn.v_proj.bias", "blk.{i}.attn_v.bias", "qkv", ("kv",), when="attention_bias"),
    # transformers starts it as zero where the checkpoint has none, as converted Qwen2 models have not.
    Row(_L + "self_attn.o_proj.bias", "blk.{i}.attn_output.bias", "o", ("d",), when=_BIAS, optional=True),
    Row(_L + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm", ("d",)),
    Row(_L + "mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", "gate_up", ("ff", "d")),
    Row(_L + "mlp.up_proj.weight", "blk.{i}.ffn_up.weight", "gate_up", ("ff", "d")),
    Row(_L + "mlp.down_proj.weight", "blk.{i}.ffn_down.weight", "down", ("d", "ff")),
    Row(_L + "mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", "gate_up", ("ff",), when="mlp_bias"),
    Row(_L + "mlp.up_proj.bias", "blk.{i}.ffn_up.bias", "gate_up", ("ff",), when="mlp_bias"),
    Row(_L + "mlp.down_proj.bias", "blk.{i}.ffn_down.bias", "down", ("d",), when="mlp_bias"),
)

# What transformers' LlamaConfig takes for a key that is absent; original DeepSeek-VL files rely on it.
DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def torch_classes() -> TorchClasses:
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as model

    return TorchClasses(LlamaConfig, model.LlamaDecoderLayer, model.LlamaRotaryEmbedding, model.LlamaRMSNorm)


def gguf_keys(config: ModelConfig) -> Keys:
    return {
        **usual_keys(config),
        "rope.dimension_count": ("uint32", config.head_dim),
        "vocab_size": ("uint32", config.vocab_size),
        **head_keys(config),
    }


LLAMA = Architecture(
    hf_class="LlamaForCausalLM",
    model_type="llama",
    gguf="llama",
    table=Table(ROWS, DROP),
    defaults=DEFAULTS,
    check=check_full_attention,
    torch_classes=torch_classes,
    gguf_keys=gguf_keys,
    # LLaMAForCausalLM, FSDPLlamaForCausalLM, LlamaModel and the like: wrappers' and old converters' words.
    words=r"\w*llama(ForCausalLM|Model|LMHeadModel)",
    derived=rope_factors,
    # Llama 2 70B's shape.
    wide_values=lambda config: config.layers == 80 and config.heads != config.kv_heads,
    mlx=True,
)
ARCHITECTURES = (LLAMA,)
