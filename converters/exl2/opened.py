"""An EXL2 folder opened for the proof: its weights, its tokenizer, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

from converters.exl2.pack import PARTS
from converters.exl2.reader import HEAD_LINEAR, open_model
from dsconvert.models.config import load_config
from dsconvert.models.language_model import language_model
from dsconvert.proof.sources import Opened, folder_text, stored_sizes


def open_folder(path: Path) -> Opened:
    """An EXL2 folder as an output to be proven; raises what reading it raises."""
    model, config = open_model(path), load_config(path)
    source, decoder = language_model(model, config, path / "config.json")
    head = model.linears.get(HEAD_LINEAR)
    quant = f"exl2-{model.bits:.2f}bpw-h{head.width if head else 16}"
    sizes = stored_sizes(model, model.checkpoint, model.linears, PARTS)
    text = folder_text(path, config.vocab_size)
    nbytes = model.checkpoint.nbytes
    return Opened(path, "EXL2", quant, model.limits, source, decoder, text, sizes, nbytes)
