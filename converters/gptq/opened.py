"""A GPTQ folder opened for the proof: its weights, its tokenizer, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.gptq.claims import check_settings
from converters.gptq.pack import PARTS
from converters.gptq.reader import GPTQModel, open_model
from dsconvert.events import Check
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.language_model import language_model
from dsconvert.proof.output_folder import check_companions, is_ours
from dsconvert.proof.sources import Opened, Reference, folder_text, stored_sizes
from dsconvert.vision.processor import PREPROCESSOR, PROCESSOR
from dsconvert.vision.transformers_layout import TOKENIZER, has_original_layout

MADE = (PREPROCESSOR, PROCESSOR, TOKENIZER, "chat_template.jinja")  # see plan.with_files


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
        own=lambda reference: [check_settings(model), *check_copies(model, config, reference)],
    )  # fmt: skip


def check_copies(model: GPTQModel, config: ModelConfig, reference: Reference) -> list[Check]:
    """The files that dsconvert copies; of a model in another layout some are made for that."""
    if not is_ours(model.checkpoint.stated):
        return []
    moved = has_original_layout(reference.whole) and find_architecture(config.architecture).mount is not None
    return [check_companions(reference.folder, model.folder, MADE if moved else ())]
