"""A random model with its decoder, and what its linears see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import random_llama
import torch

from dsconvert.decoder import torch_decoder as st

CPU = torch.device("cpu")


def opened(**keys: Any) -> tuple[Any, st.Decoder, Any]:
    model, source, config = random_llama.make(**keys)
    return model, st.open_decoder(source, config, CPU, torch.float32), random_llama.tokens(config, 5, 48)


def inputs_of(model: Any, windows: Any) -> dict[str, torch.Tensor]:
    """What transformers' own model gives each linear, in float64 [rows, K]."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].flatten(0, 1).double())

    handles = [
        module.register_forward_pre_hook(keep(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(torch.from_numpy(windows))
    for handle in handles:
        handle.remove()
    return seen
