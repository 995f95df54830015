"""A folder of quantized linears opened for the proof: its weights, its tokenizer, what it says of itself."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from dsconvert.checkpoints.quantized import QuantizedSource
from dsconvert.models.language_model import language_model
from dsconvert.proof.result import sizes_by_type
from dsconvert.proof.sources import Opened, folder_text
from dsconvert.quantization.tower_files import check_copies


def opened_folder(
    path: Path, model: QuantizedSource[Any], kind: str, quant: str, limits: str, linears: str, **more: Any
) -> Opened:
    """A folder of quantized linears, which `linears` describes, as an output; `more` are fields of Opened."""
    config = model.checkpoint.config
    source, decoder = language_model(model, config, path / "config.json", partial=True)
    shapes = model.shapes()
    more.setdefault("stored", frozenset((name, shape, model.dtype(name)) for name, shape in shapes.items()))
    more.setdefault("own", lambda reference: check_copies(model.checkpoint, config, reference))
    return Opened(
        path, kind, quant, limits, source, decoder, folder_text(path, config.vocab_size),
        sizes_by_type((model.dtype(n), prod(shape), model.nbytes(n)) for n, shape in shapes.items()),
        model.checkpoint.nbytes, holds=f"{linears}, {len(shapes) - len(model.linears)} tensors kept", **more,
    )  # fmt: skip
