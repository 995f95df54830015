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
