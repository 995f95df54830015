"""What config.json says of image towers, in every layout: their sizes as transformers' configs state them.

The original layout names its towers and fixes their sizes in code (deepseek_vl/models/siglip_vit.py, sam.py;
janus/models/siglip_vit.py), transformers' configs state them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.models.config import ModelConfig
from dsconvert.models.towers import TowerModel
from dsconvert.vision.processor import numbers, wrong

# The towers that the original code builds by name.
SIGLIP_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 16,
    "hidden_act": "gelu",
}
SAM_B: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11],
    "output_channels": 256,
    "mlp_ratio": 4.0,
    "hidden_act": "gelu",
}
# What transformers takes for absent keys (SiglipVisionConfig, SamVisionConfig).
SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": 3,
}
JANUS_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "num_channels": 3,
    "attention_bias": True,
    "use_qk_norm": False,
    "depth": 2,
    "projection_dim": 2048,
}
SAM_DEFAULTS: dict[str, Any] = SAM_B | {
    "image_size": 1024,
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "use_rel_pos": True,
    "use_abs_pos": True,
    "qkv_bias": True,
}


# The transformers that take SAM's output in DeepSeek-OCR and OCR-2, as far as code alone states them.
CHAINED_KEYS: dict[str, Any] = {"image_size": 1024, "patch_size": 16, "num_channels": 3}
CLIP_L: dict[str, Any] = {"num_channels": 3, "layer_norm_eps": 1e-5, "mlp_ratio": 4.0}
QUERIED: dict[str, Any] = {
    **CHAINED_KEYS,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "layer_norm_eps": 1e-6,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": CLIP_L,
    "queried": QUERIED,
    "siglip_vision_model": SIGLIP_DEFAULTS,
    "sam_vision_model": SAM_DEFAULTS,
    "janus_vision_model": JANUS_DEFAULTS,
}
# What a tower's config may say otherwise, and the tables do not have.
FIXED: dict[str, dict[str, Any]] = {
    "sam_vision_model": {"use_rel_pos": True, "use_abs_pos": True, "qkv_bias": True},
    "janus_vision_model": {"attention_bias": True, "use_qk_norm": False, "depth": 2},
}
Parts = tuple[dict[str, Any], dict[str, Any] | None]


def original_parts(raw: Mapping[str, Any], config: ModelConfig, model: TowerModel, where: Path) -> Parts:
    """The towers that an original config names, as transformers' configs would state them.

    Raises CheckpointError for towers that are not known by their names, and for another aligner.
    """
    if "vision_und_enc_config" in raw:
        raise CheckpointError(
            "is a JanusFlow model, which is not converted",
            where=where,
            why="its pictures come and go through other towers than Janus-Pro's, which no GGUF runtime has",
            hint="Janus-Pro and DeepSeek-VL convert",
        )
    vision, aligner = _params(raw, "vision_config", where), _params(raw, "aligner_config", where)
    two = len(model.kinds) > 1
    high = vision.get("high_res_cfg") if two else None
    low = vision.get("low_res_cfg") if two else vision
    if not isinstance(low, dict):
        raise wrong(where, "vision_config", "has no low_res_cfg")
    _named(low, "siglip_large_patch16_384", where)
    expected = "low_high_hybrid_split_mlp_gelu" if two else "mlp_gelu"
    if aligner.get("projector_type") != expected or aligner.get("depth", 1) != 2:
        kind = f"{aligner.get('projector_type')!r} of depth {aligner.get('depth', 1)!r}"
        raise wrong(where, "aligner_config", f"is {kind}, should be {expected!r} of depth 2")
    if aligner.get("n_embed") != config.hidden_size:
        raise wrong(
            where,
            "aligner_config",
            f"gives {aligner.get('n_embed')} values, the decoder takes {config.hidden_size}",
        )
    for part in (vision, high, low):
        if isinstance(part, dict) and part.get("select_layer", -1) != -1:
            raise wrong(where, "select_layer", f"is {part['select_layer']!r}, only -1 (the last) is known")
    low = {**SIGLIP_DEFAULTS, **SIGLIP_L, **low}
    if not isinstance(high, dict):
        return low, None
    _named(high, "sam_b_downsample", where)
    if vision.get("concat_type", "tuple") != "tuple":
        raise wrong(where, "concat_type", f"is {vision['concat_type']!r}, only 'tuple' is known")
    return low, {**SAM_DEFAULTS, **SAM_B, **high}


def _params(raw: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    part = raw.get(key)
    params = part.get("params") if isinstance(part, dict) else None
    if not isinstance(params, dict):
        raise wrong(where, key, "has no params")
    return params


def _named(part: Mapping[str, Any], name: str, where: Path) -> None:
    if part.get("model_name") != name:
        raise CheckpointError(
            f"names the tower {str(part.get('model_name'))[:80]!r}, which is not known",
            where=where,
            why=f"DeepSeek-VL has {name!r} in this place",
            hint="A tower of another size converts in transformers' layout, which states its sizes",
        )


def transformers_parts(raw: Mapping[str, Any], config: ModelConfig, model: TowerModel, where: Path) -> Parts:
    """The towers' configs with their defaults; CheckpointError for one of another kind or function."""
    found = []
    for key, kind in model.kinds.items():
        part = raw.get(key)
        part = {} if part is None else part
        if not isinstance(part, dict) or part.get("model_type", kind) != kind:
            raise wrong(where, key, f"is not a {kind}")
        part = DEFAULTS[kind] | {name: value for name, value in part.items() if value is not None}
        for flag, value in FIXED.get(kind, {}).items():
            if part[flag] is not value and part[flag] != value:
                raise wrong(where, flag, f"is {str(part[flag])[:40]!r}, should be {str(value).lower()}")
        if part.get("projection_dim", config.hidden_size) != config.hidden_size:
            given = f"is {str(part['projection_dim'])[:40]!r}, the decoder takes {config.hidden_size}"
            raise wrong(where, "projection_dim", given)
        found.append(part)
    return found[0], found[1] if len(found) > 1 else None


def chained_parts(raw: Mapping[str, Any], config: ModelConfig, model: TowerModel, where: Path) -> Parts:
    """The towers of DeepSeek-OCR's configs, as transformers' own would state them, less their activations.

    The published configs name the towers, of which some numbers are in code alone; transformers' states all.
    Raises CheckpointError for towers that are not these, or that llama.cpp's graph would run otherwise.
    """
    vision = _inner(raw, "vision_config", where)
    named = vision.get("width")
    if isinstance(named, dict):
        low_name, high_name = model.kinds
        low = _published(_inner(named, low_name, where), DEFAULTS[model.kinds[low_name]])
        high = _published(_inner(named, high_name, where), SAM_DEFAULTS)
        projector = _inner(raw, "projector_config", where)
        if projector.get("projector_type") != "linear" or projector.get("n_embed") != config.hidden_size:
            told = f"{projector.get('projector_type')!r} to {projector.get('n_embed')!r} values"
            raise wrong(where, "projector_config", f"is {told}, should be 'linear' to {config.hidden_size}")
    else:
        low = {**CHAINED_KEYS, **_inner(vision, "encoder_config", where)}
        low["layer_norm_eps"] = low.get("rms_norm_eps")
        high = {**SAM_DEFAULTS, **_inner(vision, "sam_config", where)}
    usual = [layer for layer in SAM_B["global_attn_indexes"] if layer < high["num_hidden_layers"]]
    if high.get("global_attn_indexes") not in (usual, SAM_B["global_attn_indexes"]):
        told = f"is {str(high.get('global_attn_indexes'))[:60]}, llama.cpp's graph has {usual}"
        raise wrong(where, "global_attn_indexes", told)
    if high["image_size"] != 1024 or high["patch_size"] != 16:
        raise wrong(where, "image_size", "is not 1024 in patches of 16, the only ones of llama.cpp's graph")
    theta = low.get("rope_parameters") or {}
    if theta and theta.get("rope_theta") != 1e6:
        raise wrong(where, "rope_theta", "of the encoder is not 1000000, the only one of llama.cpp's graph")
    high["global_attn_indexes"] = usual
    return {key: value for key, value in low.items() if key != "hidden_act"}, high


def _inner(part: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    found = part.get(key)
    if not isinstance(found, dict):
        raise wrong(where, key, "is missing or no object")
    return found


def _published(part: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers under transformers' names."""
    names = {"width": "hidden_size", "dim": "hidden_size", "layers": "num_hidden_layers"}
    names |= {"heads": "num_attention_heads"}
    return {**defaults, **{names.get(key, key): value for key, value in part.items()}}


def sizes_of(part: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The numbers of a Tower by its fields, checked; CheckpointError."""
    part = {"intermediate_size": _mlp(part), **part}
    names = {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "width": "hidden_size",
        "mlp": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
    }
    sizes: dict[str, Any] = {}
    for field, key in names.items():
        value = part.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 20:
            raise wrong(where, key, f"is {str(value)[:40]!r}, should be a positive whole number")
        sizes[field] = value
    if sizes["width"] % sizes["heads"] or sizes["image_size"] % sizes["patch_size"] or sizes["layers"] > 4096:
        raise wrong(where, "vision_config", f"has sizes that do not fit each other: {sizes}")
    if part["num_channels"] != 3:
        raise wrong(where, "num_channels", f"is {part['num_channels']!r}, should be 3")
    kv_heads = part.get("num_key_value_heads", sizes["heads"])
    if not isinstance(kv_heads, int) or kv_heads < 1 or sizes["heads"] % kv_heads:
        raise wrong(where, "num_key_value_heads", f"is {str(kv_heads)[:40]}, of {sizes['heads']} heads")
    eps = numbers([part["layer_norm_eps"]], 1, where, "layer_norm_eps")[0]
    return sizes | {"kv_heads": kv_heads, "eps": eps}


def _mlp(part: Mapping[str, Any]) -> Any:
    """SAM's config states the MLP in mlp_dim, or as a multiple of the width."""
    width, ratio = part["hidden_size"], part.get("mlp_ratio", 4.0)
    if part.get("mlp_dim") is not None:
        return part["mlp_dim"]
    numeric = isinstance(width, int) and isinstance(ratio, int | float) and 0 < ratio < 1000
    return int(width * ratio) if numeric and 0 < width < 1 << 20 else None
