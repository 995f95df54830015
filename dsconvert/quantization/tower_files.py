"""What a folder of a model with image towers has besides its weights, where the original layout came in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.events import Check
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.proof.output_folder import check_companions, is_ours
from dsconvert.proof.sources import Reference
from dsconvert.quantization.linears import Selection, plain_config
from dsconvert.vision.plan import dialogue
from dsconvert.vision.processor import PREPROCESSOR, PROCESSOR, TOKENIZER
from dsconvert.vision.transformers_layout import has_original_layout, model_config, processor_files
from tokenizer_tools.library import read_object
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.vision_template import image_token, vision_template

MADE = (PREPROCESSOR, PROCESSOR, TOKENIZER, "chat_template.jinja")  # what `with_files` makes


def with_files(model: Selection, tokenizer: TokenizerData) -> Selection:
    """The selection with the configs and processor files of transformers' layout, made of the original's.

    One of any other model is as it was.
    """
    vision, folder, raw = model.vision, model.checkpoint.folder, model.raw
    if vision is None:
        return model
    token, token_id = image_token(tokenizer, vision.processor.token, raw.get("image_token_id"), folder)
    special = {f"{name}_token_id": tokenizer.special.get(name) for name in ("bos", "eos", "pad")}
    text = plain_config(model.config) | {key: value for key, value in special.items() if value is not None}
    files: dict[str, dict[str, Any] | str] = {
        **processor_files(vision, token, read_object(folder / TOKENIZER))
    }
    if not tokenizer.chat_template:  # the original keeps its prompt's format in code
        written = replace(dialogue(vision), begin="", end="")  # which the processor puts around a picture
        files["chat_template.jinja"] = vision_template(token, written)
    return replace(model, raw=model_config(raw, text, vision, token_id, model.config.tied), files=files)


def check_copies(checkpoint: Checkpoint, config: ModelConfig, reference: Reference) -> list[Check]:
    """The files that dsconvert copies; of a model in another layout some are made for that."""
    if not is_ours(checkpoint.stated):
        return []
    moved = has_original_layout(reference.whole) and find_architecture(config.architecture).mount is not None
    return [check_companions(reference.folder, checkpoint.folder, MADE if moved else ())]
