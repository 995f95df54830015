"""The variants of a Llama config that the decoders are tested on."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100000.0},
    "llama3-rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "new-rope-keys": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "yarn-rope": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    },
    "head-dim": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one-layer": {"num_hidden_layers": 1},
}
