"""Folders that other tools wrote, and the perplexity of a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsconvert.models.config import load_json

PEERS = Path(__file__).parents[3] / "shared" / "data" / "peers"


def needs(name: str) -> Path:
    if not (PEERS / name).is_dir():
        pytest.skip(f"needs the peers' files, {name}")
    return PEERS / name


def perplexity_of(weights: dict[str, Any]) -> float:
    """transformers' own forward in float32 over the peers' validation windows."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**load_json(PEERS / "tiny256" / "config.json"))
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    tokens = torch.from_numpy(np.load(PEERS / "val_tokens.npy").astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for rows in tokens.split(8):
            logits = model(rows).logits[:, :-1].flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
    return float(np.exp(total / tokens[:, 1:].numel()))
