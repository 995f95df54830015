"""Peak memory as DeepSeek LLM's authors publish it, and the configs of its two models."""

from __future__ import annotations

from typing import Any

LENGTHS = (256, 512, 1024, 2048, 4096)
OOM = None
# Peak memory of inference that DeepSeek LLM's authors publish, in GiB of a card of 40: by batch, by length.
PUBLISHED_7B = {
    1: (13.29, 13.63, 14.47, 16.37, 21.25),
    2: (13.63, 14.39, 15.98, 19.82, 29.59),
    4: (14.47, 15.82, 19.04, 26.65, OOM),
    8: (15.99, 18.71, 25.14, 35.19, OOM),
    16: (19.06, 24.52, 37.28, OOM, OOM),
}
PUBLISHED_67B = {
    1: (16.92, 17.11, 17.66, 20.01, 33.23),
    2: (17.04, 17.28, 18.55, 25.27, OOM),
    4: (17.20, 17.80, 21.28, 33.71, OOM),
    8: (17.59, 19.25, 25.69, OOM, OOM),
    16: (18.17, 21.69, 34.54, OOM, OOM),
}
CONFIG_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 102400,
    "max_position_embeddings": 4096,
}
CONFIG_67B = CONFIG_7B | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 95,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
# DeepSeek-V2-Lite's config.json, as far as sizes go.
CONFIG_V2_LITE = CONFIG_7B | {
    "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1,
}  # fmt: skip
