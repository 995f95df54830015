"""A DeepSeek-VL checkpoint of the original layout in transformers' layout: other names for the same bytes.

The architecture tables name a tensor of either layout by the same GGUF name, so that they give the map. The
configs and processor files are made anew, as transformers' DeepseekVL and DeepseekVLHybrid classes read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.safetensors_reader import part_of
from dsconvert.models.architectures.deepseek_vl import (
    HYBRID,
    LANGUAGE,
    LANGUAGE_ORIGINAL,
    ORIGINAL,
    TOWERS,
    VL,
    towers,
)
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import Spec, expand, plan
from dsconvert.vision.config import Sam, Tower, VisionConfig, load_vision
from dsconvert.vision.processor import PREPROCESSOR, PROCESSOR, RESAMPLE

MODEL_TYPE = {VL: "deepseek_vl", HYBRID: "deepseek_vl_hybrid"}
TOKENIZER = "tokenizer_config.json"


def has_original_layout(config: ModelConfig) -> bool:
    """Whether a checkpoint has the original code's layout, from which another is made."""
    return config.architecture == ORIGINAL


def in_transformers_layout(
    checkpoint: Checkpoint, config: ModelConfig
) -> tuple[Checkpoint, ModelConfig, VisionConfig]:
    """The checkpoint with transformers' names and shapes, without a copy, and what its configs will say.

    What no forward pass uses is left out. Raises PlanError when the tensors are not those of the original
    layout, CheckpointError for configs and processor files that cannot be understood.
    """
    vision = load_vision(checkpoint.folder, config)
    shapes, hybrid = checkpoint.shapes(), vision.sam is not None
    old = [
        *plan(LANGUAGE_ORIGINAL.table, config, shapes),
        *plan(towers(config.architecture, hybrid, shapes), vision, shapes),
    ]
    checkpoint.check_readable(spec.hf for spec in old)
    name = HYBRID if hybrid else VL
    new = {
        spec.gguf: spec for spec in (*expand(LANGUAGE.table, config), *expand(TOWERS[name, hybrid], vision))
    }
    tensors = {
        new[spec.gguf].hf: part_of(checkpoint.tensors[spec.hf], *_taken(spec), new[spec.gguf].source)
        for spec in old
    }
    config = replace(config, architecture=name)
    return replace(checkpoint, tensors=tensors), config, replace(vision, architecture=name)


def _taken(spec: Spec) -> tuple[int, int]:
    """The rows of the original tensor that are this one: of a fused tensor a part, else all of them."""
    return spec.part if spec.row.part else (0, spec.source[0])


def model_config(
    raw: Mapping[str, Any], text: Mapping[str, Any], vision: VisionConfig, token_id: int, tied: bool
) -> dict[str, Any]:
    """config.json; `raw` is the original's, `text` the decoder's as a config of its own."""
    found: dict[str, Any] = {
        "architectures": [vision.architecture],
        "model_type": MODEL_TYPE[vision.architecture],
        "image_token_id": token_id,
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "tie_word_embeddings": tied,  # their default is true, the published weights are not tied
        "vision_config": _siglip(vision.siglip, vision.activation),
    }
    if vision.sam is not None:
        found["high_res_vision_config"] = _sam(vision.sam, vision.activation)
    return {**found, **{key: raw[key] for key in ("torch_dtype", "dtype") if key in raw}}


def _siglip(tower: Tower, activation: str) -> dict[str, Any]:
    stated = _stated(tower, activation)
    return {
        **stated,
        "intermediate_size": tower.mlp,
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }


def _sam(tower: Sam, activation: str) -> dict[str, Any]:
    return {
        **_stated(tower, activation),
        "global_attn_indexes": list(tower.global_layers),
        "mlp_dim": tower.mlp,
        "model_type": "sam_vision_model",
        "output_channels": tower.channels,
        "window_size": tower.window,
    }


def _stated(tower: Tower, activation: str) -> dict[str, Any]:
    return {
        "hidden_act": activation,
        "hidden_size": tower.width,
        "image_size": tower.image_size,
        "layer_norm_eps": tower.eps,
        "num_attention_heads": tower.heads,
        "num_hidden_layers": tower.layers,
        "patch_size": tower.patch_size,
    }


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
    named = {"image_token": token, "extra_special_tokens": {"image_token": token}}
    return {
        PREPROCESSOR: image,
        PROCESSOR: {"num_image_tokens": processor.tokens, "processor_class": f"{name}Processor"},
        TOKENIZER: {**tokenizer_config, **named, "processor_class": f"{name}Processor"},
    }
