"""A compressed-tensors folder opened for the proof: its weights, its tokenizer, what it says of itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from converters.compressed.reader import PARTS, open_model
from dsconvert.models.language_model import language_model
from dsconvert.proof.sources import Opened, folder_text, stored_sizes
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
    most = weights.most_common(1)[0][0]
    sizes = stored_sizes(model, model.checkpoint, model.linears, PARTS)
    text = folder_text(path, config.vocab_size)
    stored = frozenset((name, shape, model.dtype(name)) for name, shape in model.shapes().items())
    kept = len(stored) - len(model.linears)
    types = ", ".join(dict.fromkeys(one.type for one in weights))
    return Opened(
        path, "compressed-tensors", most.label, most.type, source, decoder, text, sizes,
        model.checkpoint.nbytes, stored, f"{len(model.linears)} linears of {types}, {kept} tensors kept",
        own=lambda reference: check_copies(model.checkpoint, config, reference),
    )  # fmt: skip
