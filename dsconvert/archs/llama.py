"""The Llama layout: DeepSeek LLM 7B and 67B, DeepSeek-Coder, and every other LlamaForCausalLM."""

from __future__ import annotations

from dsconvert.arch import ROPE_K, ROPE_Q, Arch, T, rope_factors

_L = "model.layers.{i}."

TABLE = (
    T("model.embed_tokens.weight", "token_embd.weight", "embed", ("v", "d")),
    T("model.norm.weight", "output_norm.weight", "norm", ("d",)),
    T("lm_head.weight", "output.weight", "head", ("v", "d"), tied_to="model.embed_tokens.weight"),
    T(_L + "input_layernorm.weight", "blk.{i}.attn_norm.weight", "norm", ("d",)),
    T(_L + "self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "qkv", ("q", "d"), ROPE_Q),
    T(_L + "self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "qkv", ("kv", "d"), ROPE_K),
    T(_L + "self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "qkv", ("kv", "d")),
    T(_L + "self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "o", ("d", "q")),
    T(_L + "self_attn.q_proj.bias", "blk.{i}.attn_q.bias", "qkv", ("q",), ROPE_Q, when="attention_bias"),
    T(_L + "self_attn.k_proj.bias", "blk.{i}.attn_k.bias", "qkv", ("kv",), ROPE_K, when="attention_bias"),
    T(_L + "self_attn.v_proj.bias", "blk.{i}.attn_v.bias", "qkv", ("kv",), when="attention_bias"),
    T(_L + "self_attn.o_proj.bias", "blk.{i}.attn_output.bias", "o", ("d",), when="attention_bias"),
    T(_L + "post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "norm", ("d",)),
    T(_L + "mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", "gate_up", ("ff", "d")),
    T(_L + "mlp.up_proj.weight", "blk.{i}.ffn_up.weight", "gate_up", ("ff", "d")),
    T(_L + "mlp.down_proj.weight", "blk.{i}.ffn_down.weight", "down", ("d", "ff")),
    T(_L + "mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", "gate_up", ("ff",), when="mlp_bias"),
    T(_L + "mlp.up_proj.bias", "blk.{i}.ffn_up.bias", "gate_up", ("ff",), when="mlp_bias"),
    T(_L + "mlp.down_proj.bias", "blk.{i}.ffn_down.bias", "down", ("d",), when="mlp_bias"),
)

DROP = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

LLAMA = Arch("llama", ("LlamaForCausalLM",), TABLE, DROP, rope_factors)
