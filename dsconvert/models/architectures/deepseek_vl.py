"""DeepSeek-VL, 1.3B and 7B, in the original layout and in transformers': decoder, towers, aligner.

Sources: deepseek_vl/models (siglip_vit.py, sam.py, projector.py) of the original code, transformers'
deepseek_vl and deepseek_vl_hybrid. The original layout is Janus-Pro's too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsconvert.models import towers
from dsconvert.models.architecture import Mount, mounted
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.tensor_table import Row, Table
from dsconvert.models.towers import (
    NUMBERS,
    ORIGINAL_SIGLIP,
    TRANSFORMERS_SIGLIP,
    WORDS,
    Part,
    TowerModel,
    pair,
)

ORIGINAL, VL, HYBRID = (
    "MultiModalityCausalLM",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
)


def _hybrid_aligner(high: str, low: str, last: str) -> tuple[Row, ...]:
    return (
        *pair(high, "mm.high", "h", "e"),
        *pair(low, "mm.low", "h", "c"),
        *pair(last, "mm.1", "d", "d"),
    )


def _downsampling(first: str, second: str, alpha: str) -> tuple[Row, ...]:
    return (*towers.downsampling(first, second), towers.one(alpha, "v.sam.hd_alpha.weight", "1"))


_H = "vision_model.vision_tower_high.vision_tower."
_HIGH = "model.high_res_vision_"

ORIGINAL_VL_ROWS = (
    *towers.siglip("vision_model.vision_tower.", ORIGINAL_SIGLIP, fused=True),
    *towers.aligner("aligner.layers.0", "aligner.layers.2"),
)
ORIGINAL_HYBRID_ROWS = (
    *towers.siglip("vision_model.vision_tower_low.vision_tower.", ORIGINAL_SIGLIP, fused=True),
    *towers.sam(_H, "patch_embed.proj", "blocks.{i}.", "norm"),
    *towers.neck(_H + "neck", "v.sam.neck", NUMBERS),
    *towers.neck(_H + "neck_hd", "v.sam.neck_hd", NUMBERS),
    *_downsampling(_H + "downsamples.0", _H + "downsamples.1", _H + "hd_alpha_downsamples"),
    *_hybrid_aligner("aligner.high_up_proj", "aligner.low_up_proj", "aligner.layers.1"),
)
VL_ROWS = (
    *towers.siglip("model.vision_model.", TRANSFORMERS_SIGLIP, fused=False),
    *towers.aligner("model.aligner.linear1", "model.aligner.linear2"),
)
HYBRID_ROWS = (
    *towers.siglip("model.vision_model.", TRANSFORMERS_SIGLIP, fused=False),
    *towers.sam(_HIGH + "model.vision_encoder.", "patch_embed.projection", "layers.{i}.", "layer_norm"),
    *towers.neck(_HIGH + "model.vision_encoder.neck", "v.sam.neck", WORDS),
    *towers.neck(_HIGH + "neck", "v.sam.neck_hd", WORDS),
    *_downsampling(_HIGH + "proj.conv1", _HIGH + "proj.conv2", _HIGH + "alpha"),
    *_hybrid_aligner("model.aligner.high_res_vision_proj", "model.aligner.vision_proj", "model.aligner.proj"),
)

# What the original repositories carry and no forward pass uses.
POOLING = (r"vision_model\.(vision_tower_low\.)?vision_tower\.attn_pool\..*",)
LAYER_NORMS = (r"vision_model\.(high|low)_layer_norm\.(weight|bias)",)
UNUSED_HEAD = (r"model\.vision_model\.(vision_model\.)?head\..*",)
# Each of the two plans leaves the other's part of the checkpoint to it.
LANGUAGE_PART = {ORIGINAL: r"language_model\..*", VL: r"model\.language_model\..*|lm_head\.weight"}
_VISION_PART = {
    ORIGINAL: r"(vision_model|aligner|gen_\w+)\..*",
    VL: r"model\.(vision_model|aligner|high_res_vision_\w+)(\..*)?",
}


def inside(name: str) -> str:
    """Where transformers' layout keeps a tensor of its language model."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def makes_pictures(raw: Mapping[str, Any]) -> bool:
    """Whether a config of the original layout is of a model that also makes pictures."""
    return any(key.startswith("gen_") for key in raw)


def is_hybrid(raw: Mapping[str, Any]) -> bool:
    """Whether a config of the original layout is of a model with two towers."""
    vision = raw.get("vision_config")
    params = vision.get("params") if isinstance(vision, dict) else None
    return isinstance(params, dict) and isinstance(params.get("high_res_cfg"), dict)


def _vl_configs(low: Part, high: Part, width: int) -> dict[str, Part]:
    return {"vision_config": {**low, "model_type": "siglip_vision_model", "vision_use_head": False}}


def _hybrid_configs(low: Part, high: Part, width: int) -> dict[str, Part]:
    sam = {"high_res_vision_config": {**high, "model_type": "sam_vision_model"}}
    return {**_vl_configs(low, high, width), **sam}


def _torch_vl(config: Part) -> Any:
    from transformers import DeepseekVLConfig, DeepseekVLModel

    return DeepseekVLModel(DeepseekVLConfig(**config))


def _torch_hybrid(config: Part) -> Any:
    from transformers import DeepseekVLHybridConfig, DeepseekVLHybridModel

    return DeepseekVLHybridModel(DeepseekVLHybridConfig(**config))


TOWERS = (
    TowerModel(
        hf_class=VL,
        projector="janus_pro",
        tables={
            ORIGINAL: Table(ORIGINAL_VL_ROWS, (*POOLING, LANGUAGE_PART[ORIGINAL])),
            VL: Table(VL_ROWS, (*UNUSED_HEAD, LANGUAGE_PART[VL])),
        },
        claims=lambda raw: not is_hybrid(raw) and not makes_pictures(raw),
        kinds={"vision_config": "siglip_vision_model"},
        configs=_vl_configs,
        torch_model=_torch_vl,
        unused=(*POOLING, *UNUSED_HEAD),
    ),
    TowerModel(
        hf_class=HYBRID,
        projector="deepseek_vl_hybrid",
        tables={
            ORIGINAL: Table(ORIGINAL_HYBRID_ROWS, (*POOLING, *LAYER_NORMS, LANGUAGE_PART[ORIGINAL])),
            HYBRID: Table(HYBRID_ROWS, (*UNUSED_HEAD, LANGUAGE_PART[VL])),
        },
        claims=lambda raw: is_hybrid(raw) and not makes_pictures(raw),
        kinds={"vision_config": "siglip_vision_model", "high_res_vision_config": "sam_vision_model"},
        configs=_hybrid_configs,
        torch_model=_torch_hybrid,
        unused=(*POOLING, *LAYER_NORMS, *UNUSED_HEAD),
    ),
)


def every_spelling(*tables: tuple[Row, ...]) -> tuple[tuple[Row, ...], ...]:
    """The tables that the towers of a class may have."""
    return (*tables, *map(towers.respelled, tables))


LANGUAGE_ORIGINAL = mounted(
    LLAMA,
    ORIGINAL,
    "multi_modality",
    Mount(LLAMA, "language_config", lambda name: "language_model." + name, tied_outside=False, nameless=True),
    drop=(_VISION_PART[ORIGINAL],),
    beside=every_spelling(ORIGINAL_VL_ROWS, ORIGINAL_HYBRID_ROWS),
)
LANGUAGE, LANGUAGE_HYBRID = (
    mounted(
        LLAMA,
        name,
        model_type,
        Mount(LLAMA, "text_config", inside, tied_outside=True),
        words=name.replace("ForConditionalGeneration", "Model"),
        drop=(_VISION_PART[VL],),
        beside=every_spelling(rows),
    )
    for name, model_type, rows in ((VL, "deepseek_vl", VL_ROWS), (HYBRID, "deepseek_vl_hybrid", HYBRID_ROWS))
)
ARCHITECTURES = (LANGUAGE_ORIGINAL, LANGUAGE, LANGUAGE_HYBRID)
