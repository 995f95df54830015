"""A compressed-tensors folder opened for the proof: its weights, its tokenizer, what it says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.compressed.reader import open_model
from converters.compressed.stated import Weights
from dsconvert.checkpoints.quantized import QuantizedSource
from dsconvert.proof.sources import Opened
from dsconvert.proof.thresholds import widest
from dsconvert.quantization.opened import opened_folder


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """A compressed-tensors folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    weights = Counter({one.settings: 0 for one in model.linears.values()})
    for one in model.linears.values():
        weights[one.settings] += one.outputs * one.inputs
    limits = widest((one.type, count) for one, count in weights.items())
    types = ", ".join(dict.fromkeys(one.type for one in weights))
    return opened_folder(
        path, model, "compressed-tensors", _quant(model, weights), limits,
        f"{len(model.linears)} linears of {types}", by_cost=_told(model.checkpoint.stated),
    )  # fmt: skip


def _quant(model: QuantizedSource[Weights], weights: Mapping[Weights, int]) -> str:
    """The scheme of all linears, or how many bits their weights have in the mean."""
    if len(weights) == 1:
        return next(iter(weights)).label
    nbytes = sum(one.nbytes for one in model.linears.values())
    return f"compressed-{8 * nbytes / model.weights:.2f}bpw"


def _told(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the folder says of a choice of schemes by cost; nothing where it says nothing, or is another's."""
    found: Any = stated
    for key in ("quantization_config", "meta", "types"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
