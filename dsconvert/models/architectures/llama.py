"""The Llama layout: DeepSeek LLM 7B and 67B, DeepSeek-Coder, and every other LlamaForCausalLM."""

from __future__ import annotations

from dsconvert.models.tensor_table import ROPE_K, ROPE_Q, Arch, Row, rope_factors

_BIAS = "attention_bias"
_L = "model.layers.{i}."

TABLE = (
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

# What trainers and runtimes leave beside the weights, under any name: RoPE's and masks' buffers, scales of a
# quantized KV cache, an engine's private state, the value head of a policy.
DROP = (
    r"(.+\.)?(inv_freq|original_inv_freq|cos_cached|sin_cached|masked_bias|position_ids|_extra_state)",
    r"(.+\.)?self_attn\.(\w+\.)?(q|k|v|kv|prob)_(scale|zero_point)",
    r"(.+\.)?self_attn\.[kv]_proj\.output_scale",
    r"(.+\.)?(v_head|value_head)\..+",
)

LLAMA = Arch("llama", ("LlamaForCausalLM",), TABLE, DROP, rope_factors)
