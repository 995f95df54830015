"""A GPTQ folder opened for the proof: its weights, its tokenizer, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.gptq.claims import check_settings
from converters.gptq.reader import open_model
from dsconvert.proof.sources import Opened
from dsconvert.quantization.opened import opened_folder
from dsconvert.quantization.tower_files import check_copies


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """A GPTQ folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    config, linears = model.checkpoint.config, model.linears
    settings = next(iter(linears.values())).settings
    quant = f"gptq-{settings.bits}bit" + (f"-{settings.group_size}g" if settings.group_size > 0 else "")
    return opened_folder(
        path, model, "GPTQ", quant, f"gptq{settings.bits}", f"{len(linears)} linears of {settings.bits} bits",
        own=lambda reference: [
            check_settings(linears, settings), *check_copies(model.checkpoint, config, reference)
        ],
    )  # fmt: skip
