"""A GPTQ folder opened for the proof: its weights, its tokenizer, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

from converters.gptq.pack import PARTS
from converters.gptq.reader import open_model
from dsconvert.models.config import load_config
from dsconvert.models.language_model import language_model
from dsconvert.proof.sources import Opened, folder_text, stored_sizes


def open_folder(path: Path) -> Opened:
    """A GPTQ folder as an output to be proven; raises what reading it raises."""
    model, config = open_model(path), load_config(path)
    source, decoder = language_model(model, config, path / "config.json")
    quant = f"gptq-{model.bits}bit" + (f"-{model.group_size}g" if model.group_size > 0 else "")
    sizes = stored_sizes(model, model.checkpoint, model.linears, PARTS)
    text = folder_text(path, config.vocab_size)
    nbytes = model.checkpoint.nbytes
    return Opened(path, "GPTQ", quant, f"gptq{model.bits}", source, decoder, text, sizes, nbytes)
