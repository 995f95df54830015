"""A compressed-tensors folder opened for the proof: its weights, its tokenizer, what it says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.compressed.reader import PARTS, CompressedModel, open_model
from converters.compressed.stated import Weights
from dsconvert.models.language_model import language_model
from dsconvert.proof.sources import Opened, folder_text, stored_sizes
from dsconvert.proof.thresholds import widest
from dsconvert.quantization.tower_files import check_copies


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """A compressed-tensors folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    config = model.checkpoint.config
    source, decoder = language_model(model, config, path / "config.json", partial=True)
    weights = Counter({one.weights: 0 for one in model.linears.values()})
    for one in model.linears.values():
        weights[one.weights] += one.outputs * one.inputs
    limits = widest((one.type, count) for one, count in weights.items())
    sizes = stored_sizes(model, model.checkpoint, model.linears, PARTS)
    text = folder_text(path, config.vocab_size)
    stored = frozenset((name, shape, model.dtype(name)) for name, shape in model.shapes().items())
    kept = len(stored) - len(model.linears)
    types = ", ".join(dict.fromkeys(one.type for one in weights))
    return Opened(
        path, "compressed-tensors", _quant(model, weights), limits, source, decoder, text, sizes,
        model.checkpoint.nbytes, stored, f"{len(model.linears)} linears of {types}, {kept} tensors kept",
        own=lambda reference: check_copies(model.checkpoint, config, reference),
        by_cost=_told(model.checkpoint.stated),
    )  # fmt: skip


def _quant(model: CompressedModel, weights: Mapping[Weights, int]) -> str:
    """The scheme of all linears, or how many bits their weights have in the mean."""
    if len(weights) == 1:
        return next(iter(weights)).label
    nbytes = sum(part.nbytes for one in model.linears.values() for part in one.parts.values())
    return f"compressed-{8 * nbytes / sum(weights.values()):.2f}bpw"


def _told(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the folder says of a choice of schemes by cost; nothing where it says nothing, or is another's."""
    found: Any = stated
    for key in ("quantization_config", "meta", "types"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
