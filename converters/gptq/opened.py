"""A GPTQ folder opened for the proof: its weights, its tokenizer, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.gptq.claims import check_settings
from converters.gptq.pack import PARTS
from converters.gptq.reader import open_model
from dsconvert.models.language_model import language_model
from dsconvert.proof.sources import Opened, folder_text, stored_sizes
from dsconvert.quantization.tower_files import check_copies


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """A GPTQ folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    config = model.checkpoint.config
    source, decoder = language_model(model, config, path / "config.json", partial=True)
    quant = f"gptq-{model.bits}bit" + (f"-{model.group_size}g" if model.group_size > 0 else "")
    sizes = stored_sizes(model, model.checkpoint, model.linears, PARTS)
    text = folder_text(path, config.vocab_size)
    stored = frozenset((name, shape, model.dtype(name)) for name, shape in model.shapes().items())
    kept = len(stored) - len(model.linears)
    return Opened(
        path, "GPTQ", quant, f"gptq{model.bits}", source, decoder, text, sizes, model.checkpoint.nbytes,
        stored, f"{len(model.linears)} linears of {model.bits} bits, {kept} tensors kept",
        own=lambda reference: [check_settings(model), *check_copies(model.checkpoint, config, reference)],
    )  # fmt: skip
