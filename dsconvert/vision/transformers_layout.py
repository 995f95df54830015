"""A checkpoint with towers of the original layout in transformers' layout: other names for the same bytes.

The architecture tables name a tensor of either layout by the same GGUF name, so that they give the map; what
makes pictures is in no table, and has a map of its own. The configs and processor files are made anew, as
transformers' classes read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.safetensors_reader import part_of
from dsconvert.models.architectures import find_architecture, tower_model
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import Spec, expand, plan
from dsconvert.vision.config import VisionConfig, load_vision
from dsconvert.vision.processor import PREPROCESSOR, PROCESSOR, RESAMPLE, TOKENIZER


def has_original_layout(config: ModelConfig) -> bool:
    """Whether a checkpoint has the original code's layout, from which another is made."""
    model = tower_model(config.architecture, config.raw)
    return model is not None and config.architecture != model.hf_class


def in_transformers_layout(
    checkpoint: Checkpoint, config: ModelConfig
) -> tuple[Checkpoint, ModelConfig, VisionConfig]:
    """The checkpoint with transformers' names and shapes, without a copy, and what its configs will say.

    What no forward pass uses is left out. Raises PlanError when the tensors are not those of the original
    layout, CheckpointError for configs and processor files that cannot be understood.
    """
    vision = load_vision(checkpoint.folder, config)
    model, shapes = vision.model, checkpoint.shapes()
    old = [
        *plan(find_architecture(config.architecture).table, config, shapes),
        *plan(model.tables[config.architecture], vision, shapes),
    ]
    checkpoint.check_readable(spec.hf for spec in old)
    name = model.hf_class
    new = {
        spec.gguf: spec
        for spec in (*expand(find_architecture(name).table, config), *expand(model.tables[name], vision))
    }
    tensors = {
        new[spec.gguf].hf: part_of(checkpoint.tensors[spec.hf], *_taken(spec), new[spec.gguf].source)
        for spec in old
    }
    tensors |= {
        _renamed(stored, model.renames): checkpoint.tensors[stored]
        for stored in shapes
        if _one_of(stored, model.generating) and not _one_of(stored, model.unused)
    }
    config = replace(config, architecture=name)
    return replace(checkpoint, tensors=tensors), config, replace(vision, architecture=name)


def _taken(spec: Spec) -> tuple[int, int]:
    """The rows of the original tensor that are this one: of a fused tensor a part, else all of them."""
    return spec.part if spec.row.part else (0, spec.source[0])


def _one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in renames:
        name = re.sub(pattern, new, name)
    return name


def model_config(
    raw: Mapping[str, Any], text: Mapping[str, Any], vision: VisionConfig, token_id: int, tied: bool
) -> dict[str, Any]:
    """config.json; `raw` is the original's, `text` the decoder's as a config of its own."""
    model = vision.model
    found: dict[str, Any] = {
        "architectures": [model.hf_class],
        "model_type": find_architecture(model.hf_class).model_type,
        "image_token_id": token_id,
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "tie_word_embeddings": tied,  # their default is true, the published weights are not tied
        **vision.configs,
        **model.making(raw),
    }
    return {**found, **{key: raw[key] for key in ("torch_dtype", "dtype") if key in raw}}


def processor_files(
    vision: VisionConfig, token: str, tokenizer_config: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The processor's JSON files by name, and the tokenizer's, which must name the token for pictures."""
    processor = vision.processor
    name = vision.architecture.removesuffix("ForConditionalGeneration")
    resample = next(number for number, word in RESAMPLE.items() if word == processor.resample)
    image: dict[str, Any] = {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": f"{name}ImageProcessor",
        "min_size": processor.min_size,
        "processor_class": f"{name}Processor",
        "rescale_factor": 1 / 255,
    }
    for prefix, pixels in (("", processor.low), ("high_res_", processor.high)):
        if pixels is not None:
            found = asdict(pixels)
            image |= {f"{prefix}image_{key}": list(found[key]) for key in ("mean", "std")}
            image[prefix + "size"] = {"height": pixels.image_size, "width": pixels.image_size}
            image[prefix + "resample"] = resample
    tokens = {"image_token": token}
    chat = {"num_image_tokens": processor.tokens, "processor_class": f"{name}Processor"}
    if processor.around != ("", ""):
        tokens |= dict(zip(("boi_token", "eoi_token"), processor.around, strict=True))
        chat["use_default_system_prompt"] = False  # the template writes it
    named = {**tokens, "extra_special_tokens": tokens}
    return {
        PREPROCESSOR: image,
        PROCESSOR: chat,
        TOKENIZER: {**tokenizer_config, **named, "processor_class": f"{name}Processor"},
    }
