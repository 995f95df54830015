"""The projector file of a model with image towers: its keys, the types of its tensors, reading it back.

Janus-Pro and DeepSeek-VL 1.3B are llama.cpp's projector type "janus_pro". No runtime reads the hybrid towers
of DeepSeek-VL 7B; its file names a type of its own, which a runtime refuses instead of computing something
else.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from converters.gguf import metadata, mixtures
from converters.gguf.file_types import FILE_TYPES
from converters.gguf.layout import Tensor
from converters.gguf.parse import GGUFFile
from converters.gguf.qtypes import QTYPES
from dsconvert.errors import CheckpointError
from dsconvert.models.architectures import TOWER_MODELS
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import Spec, Table, plan_stored
from dsconvert.vision.config import Sam, Tower, VisionConfig
from dsconvert.vision.processor import Pixels, Processor
from dsconvert.vision.torch_towers import Weights

Keys = dict[str, tuple[str, Any]]
# The relative error of image embeddings that each type may bring; measured: 0, 5e-4, 5e-3, 1.5e-2.
IMAGE_LIMITS = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 4e-2}
JANUS_PRO, HYBRID_TYPE = "janus_pro", "deepseek_vl_hybrid"
# llama.cpp's types of DeepSeek-OCR's projectors, and the most tiles that each cuts a large picture into.
TILES = {"deepseekocr": 9, "deepseekocr2": 6}
PROJECTORS = tuple(dict.fromkeys(model.projector for model in TOWER_MODELS))
PLAIN = ("position_embd", "pos_embd", "pos_h", "pos_w", "resample_query")
CANNOT = (
    "stock llama.cpp runs the text file and cannot read this projector (it will refuse it): no runtime has "
    "the two towers of DeepSeek-VL 7B. Pictures need a program that computes the embeddings from the "
    "projector file, as dsconvert.vision.torch_towers does, and hands them to llama.cpp as llama_batch.embd"
)


def tensor_type(spec: Spec, quant: str, hybrid: bool) -> str:
    """The stored type of one tensor: matrices as asked, everything a runtime adds or normalises in f32.

    The patch embedding is a convolution, which llama.cpp runs in f16 or f32.
    """
    if len(spec.shape) == 2 and not any(word in spec.gguf for word in PLAIN):
        return mixtures.fitting(quant, spec.shape[-1])
    if spec.gguf == "v.patch_embd.weight" and not hybrid and quant in ("f16", "q8_0"):
        return "f16"
    return "f32"


def typed(specs: Iterable[Spec], quant: str, vision: VisionConfig) -> list[Tensor]:
    """Every tensor of the projector file with its type, in the table's order."""
    hybrid = vision.sam is not None
    return [Tensor(s.gguf, s.shape, QTYPES[tensor_type(s, quant, hybrid)]) for s in specs]


def image_keys(vision: VisionConfig, token: str, token_id: int) -> Keys:
    """`dsconvert.image.*`: how a picture enters a prompt and what is done to it; in both files."""
    processor = vision.processor
    return {
        "dsconvert.image.token": ("string", token),
        "dsconvert.image.token_id": ("uint32", token_id),
        "dsconvert.image.tokens": ("uint32", vision.tokens),
        "dsconvert.image.size": ("uint32", (processor.high or processor.low).image_size),
        "dsconvert.image.pad_color": ("array:uint32", list(processor.pad)),
        "dsconvert.image.resample": ("string", processor.resample),
        "dsconvert.image.min_size": ("uint32", processor.min_size),
    }


def all_keys(
    folder: Path, config: ModelConfig, vision: VisionConfig, specs: Iterable[Spec], quant: str, shared: Keys
) -> Keys:
    """All keys of the projector file; `shared` are those that the text file has too."""
    parameters = sum(prod(spec.shape) for spec in specs)
    keys = metadata.general_keys(folder, config, "clip", parameters)
    keys["general.type"] = ("string", "mmproj")
    keys = metadata.with_file_type(keys, FILE_TYPES[quant])
    return keys | clip_keys(vision) | shared | {"dsconvert.image.activation": ("string", vision.activation)}


def clip_keys(vision: VisionConfig) -> Keys:
    """`clip.*`: the towers' numbers. Source: llama.cpp's clip-impl.h, as far as it knows these towers."""
    low, high = vision.vit, vision.sam
    first = high or low
    keys: Keys = {
        "clip.has_vision_encoder": ("bool", True),
        "clip.projector_type": ("string", vision.model.projector),
        "clip.use_gelu": ("bool", True),
        "clip.vision.projection_dim": ("uint32", vision.projection),
        "clip.vision.image_size": ("uint32", first.image_size),
        "clip.vision.patch_size": ("uint32", low.patch_size),
        "clip.vision.embedding_length": ("uint32", low.width),
        "clip.vision.feed_forward_length": ("uint32", low.mlp),
        "clip.vision.block_count": ("uint32", low.layers),
        "clip.vision.attention.head_count": ("uint32", low.heads),
        "clip.vision.attention.layer_norm_epsilon": ("float32", low.eps),
        "clip.vision.image_mean": ("array:float32", list(first.pixels.mean)),
        "clip.vision.image_std": ("array:float32", list(first.pixels.std)),
    }
    if high is None:
        return keys
    keys |= {
        "clip.vision.window_size": ("uint32", high.window),
        "clip.vision.sam.block_count": ("uint32", high.layers),
        "clip.vision.sam.embedding_length": ("uint32", high.width),
        "clip.vision.sam.feed_forward_length": ("uint32", high.mlp),
        "clip.vision.sam.head_count": ("uint32", high.heads),
        "clip.vision.sam.patch_size": ("uint32", high.patch_size),
        "clip.vision.sam.neck_channels": ("uint32", high.channels),
        "clip.vision.sam.layer_norm_epsilon": ("float32", high.eps),
        "clip.vision.sam.global_attn_indexes": ("array:uint32", list(high.global_layers)),
    }
    if vision.model.chained:
        return keys | {
            "clip.vision.attention.head_count_kv": ("uint32", low.kv_heads),
            "clip.vision.preproc_min_tiles": ("uint32", 2),
            "clip.vision.preproc_max_tiles": ("uint32", TILES[vision.model.projector]),
            "clip.vision.sam.reduced_channels": ("array:uint32", list(high.reduced)),
            "clip.vision.sam.output_size": ("uint32", low.image_size),
        }
    return keys | {
        "clip.vision.low_res.image_size": ("uint32", low.image_size),
        "clip.vision.low_res.image_mean": ("array:float32", list(low.pixels.mean)),
        "clip.vision.low_res.image_std": ("array:float32", list(low.pixels.std)),
        "clip.vision.low_res.norm_folded": ("bool", False),
    }


def is_projector(file: GGUFFile) -> bool:
    """Whether a file is a projector and no language model."""
    return file.keys.get("general.architecture") == "clip"


def table(vision: VisionConfig) -> Table:
    """The table that a projector file is read back through: transformers' names."""
    return vision.model.tables[vision.model.hf_class]


def open_projector(file: GGUFFile) -> tuple[Weights, VisionConfig]:
    """The towers' weights by GGUF name, and their numbers, from the file alone.

    Raises CheckpointError for a missing or wrong key, PlanError for missing, unknown or misshapen tensors.
    """
    vision = stored_vision(file)
    plan_stored(table(vision), vision, {t.name: t.shape for t in file.tensors.values()})
    return (lambda name: file.tensors[name].float32()), vision


def stored_vision(file: GGUFFile) -> VisionConfig:
    """The towers' numbers as the file's own keys state them; CheckpointError for a missing or wrong key."""
    kind = file.keys.get("clip.projector_type")
    if kind not in PROJECTORS:
        raise CheckpointError(
            f"has the projector type {kind!r}",
            where=file.path,
            why=f"projectors that are read here: {', '.join(PROJECTORS)}",
        )
    prefix = "clip.vision."
    mean, std = (_numbers(file, prefix + key) for key in ("image_mean", "image_std"))
    first = Pixels(_whole(file, prefix + "image_size"), mean, std)
    sam = _stored_sam(file, first) if kind != JANUS_PRO else None
    small = prefix + "low_res."
    low, model = (
        first,
        next(model for model in TOWER_MODELS if model.projector == kind),
    )  # those of a type are alike
    if kind == HYBRID_TYPE:
        mean, std = (_numbers(file, small + key) for key in ("image_mean", "image_std"))
        low = Pixels(_whole(file, small + "image_size"), mean, std)
    heads, kv_heads = _whole(file, prefix + "attention.head_count"), prefix + "attention.head_count_kv"
    vit = Tower(
        image_size=_whole(file, prefix + "sam.output_size") if model.chained else low.image_size,
        patch_size=_whole(file, prefix + "patch_size"),
        width=_whole(file, prefix + "embedding_length"),
        mlp=_whole(file, prefix + "feed_forward_length"),
        layers=_depth(file, prefix + "block_count"),
        heads=heads,
        kv_heads=_whole(file, kv_heads) if kv_heads in file.keys else heads,
        eps=_number(file, prefix + "attention.layer_norm_epsilon"),
        pixels=low,
    )
    activation = str(file.keys.get("dsconvert.image.activation", "gelu"))
    return VisionConfig(
        model,
        model.hf_class,
        vit,
        sam,
        _whole(file, prefix + "projection_dim"),
        activation,
        _stored_processor(file, low, first if low is not first else None, vit.grid**2),
    )


def _stored_sam(file: GGUFFile, pixels: Pixels) -> Sam:
    prefix = "clip.vision.sam."
    layers = file.keys.get(prefix + "global_attn_indexes")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
        raise _bad(file, prefix + "global_attn_indexes")
    heads, channels = _whole(file, prefix + "head_count"), _whole(file, prefix + "neck_channels")
    reduced = file.keys.get(prefix + "reduced_channels", [2 * channels, 4 * channels])
    if not isinstance(reduced, list) or len(reduced) != 2 or not all(isinstance(n, int) for n in reduced):
        raise _bad(file, prefix + "reduced_channels")
    return Sam(
        image_size=pixels.image_size,
        patch_size=_whole(file, prefix + "patch_size"),
        width=_whole(file, prefix + "embedding_length"),
        mlp=_whole(file, prefix + "feed_forward_length"),
        layers=_depth(file, prefix + "block_count"),
        heads=heads,
        kv_heads=heads,
        eps=_number(file, prefix + "layer_norm_epsilon"),
        pixels=pixels,
        window=_whole(file, "clip.vision.window_size"),
        global_layers=tuple(layers),
        channels=channels,
        reduced=(reduced[0], reduced[1]),
    )


def _stored_processor(file: GGUFFile, low: Pixels, high: Pixels | None, tokens: int) -> Processor:
    """What the file says of pictures; a file of another converter takes what its runtime does."""
    keys, prefix = file.keys, "dsconvert.image."
    pad = keys.get(prefix + "pad_color", [127, 127, 127])
    if not isinstance(pad, list) or len(pad) != 3 or any(x not in range(256) for x in pad):
        raise _bad(file, prefix + "pad_color")
    smallest, count = prefix + "min_size", prefix + "tokens"
    return Processor(
        low,
        high,
        (pad[0], pad[1], pad[2]),
        str(keys.get(prefix + "resample", "bicubic")),
        _whole(file, smallest) if smallest in keys else 14,
        str(keys.get(prefix + "token", "")),
        _whole(file, count) if count in keys else tokens,
    )


def _whole(file: GGUFFile, key: str) -> int:
    value = file.keys.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 20:
        raise _bad(file, key)
    return value


def _depth(file: GGUFFile, key: str) -> int:
    """A number of layers, of which each has a tensor at least: the plan names all of them."""
    value = _whole(file, key)
    if value > len(file.tensors):
        raise _bad(file, key)
    return value


def _number(file: GGUFFile, key: str) -> float:
    value = file.keys.get(key)
    if not isinstance(value, float) or not 0 < value < 1e6:
        raise _bad(file, key)
    return _decimal(value)


def _numbers(file: GGUFFile, key: str) -> tuple[float, float, float]:
    value = file.keys.get(key)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(x, float) and x > 0 for x in value)
    ):
        raise _bad(file, key)
    return _decimal(value[0]), _decimal(value[1]), _decimal(value[2])


def _decimal(value: float) -> float:
    """The decimal number that was written as this float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _bad(file: GGUFFile, key: str) -> CheckpointError:
    value = file.keys.get(key)
    return CheckpointError(
        f"key {key} is {'missing' if value is None else str(value)[:60]}",
        where=file.path,
        hint="Convert the model again",
    )
