"""What torch takes to hold a 16-bit folder and run some sequences of it, by transformers' own model."""

from __future__ import annotations

from typing import Any


def run(path: str, batch: int, length: int, *, eager: bool, device: str) -> dict[str, Any]:
    """Run `batch` sequences of `length` tokens at once; {"bytes": torch's peak} on CUDA, {} on a CPU.

    With `eager` attention keeps its scores, and all logits are made in float32; else the last ones alone.
    Raises what transformers and torch raise.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = "eager" if eager else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=attention)
    model = model.to(device)
    ids = torch.ones((batch, length), dtype=torch.int64, device=device)
    with torch.inference_mode():
        logits = model(ids, use_cache=True, logits_to_keep=0 if eager else 1).logits
        torch.log_softmax(logits.float(), -1)
    found: dict[str, Any] = {"device": device}
    return found | ({"bytes": torch.cuda.max_memory_reserved(device)} if device != "cpu" else {})
