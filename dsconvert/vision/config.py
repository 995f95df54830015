"""One normalised view of a DeepSeek-VL model's towers and of what its processor does to a picture.

Both published layouts give the same view: the original names its towers and fixes their sizes in code
(deepseek_vl/models/siglip_vit.py, sam.py), transformers' configs state them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.models.architectures.deepseek_vl import HYBRID, ORIGINAL, TOWERS, towers
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import Table
from dsconvert.vision import processor as pictures
from dsconvert.vision.processor import Pixels, Processor, numbers

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
SAM_DEFAULTS: dict[str, Any] = SAM_B | {
    "image_size": 1024,
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "use_rel_pos": True,
    "use_abs_pos": True,
    "qkv_bias": True,
}


@dataclass(frozen=True)
class Tower:
    """A vision transformer: sizes, and the normalisation of the pixels it takes."""

    image_size: int
    patch_size: int
    width: int
    mlp: int
    layers: int
    heads: int
    eps: float
    pixels: Pixels

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Sam(Tower):
    """SAM's image encoder: windowed attention but in some layers, and a neck of `channels`."""

    window: int
    global_layers: tuple[int, ...]
    channels: int


@dataclass(frozen=True)
class VisionConfig:
    """The towers of a model: SigLIP alone, or SigLIP for the small picture and SAM for the big one.

    `projection` is the width of the embeddings, which is the decoder's. `activation` is "gelu" (exact) or
    "gelu_pytorch_tanh". `processor` says what is done to a picture and where its tokens stand in a prompt.
    """

    architecture: str
    siglip: Tower
    sam: Sam | None
    projection: int
    activation: str
    processor: Processor
    tied: bool = False

    @property
    def tokens(self) -> int:
        """Embeddings of one picture."""
        return self.siglip.grid**2

    @property
    def dims(self) -> dict[str, int]:
        """The sizes by the letters that the tables of models/architectures/deepseek_vl.py use."""
        low, high = self.siglip, self.sam
        dims = {"c": low.width, "f": low.mlp, "n": self.tokens, "p": low.patch_size, "siglip": low.layers}
        dims |= {"d": self.projection, "h": self.projection // 2}
        if high is not None:
            dims |= {"s": high.width, "3s": 3 * high.width, "m": high.mlp, "g": high.grid}
            dims |= {"r": high.patch_size, "sam": high.layers, "hd": high.width // high.heads}
            dims |= {"a": high.channels, "b": 2 * high.channels, "e": 4 * high.channels}
            dims["rel"] = 2 * high.window - 1
            dims |= {f"rel.{layer}": 2 * high.grid - 1 for layer in high.global_layers}
        return dims


def has_towers(config: ModelConfig) -> bool:
    """Whether the config is of a model with vision towers."""
    return any(config.architecture == name for name, _ in TOWERS)


def load_vision(folder: Path, config: ModelConfig) -> VisionConfig:
    """Read and check what config.json and the processor files say about pictures.

    Raises CheckpointError for towers that are not known here, for missing files, and for contradictions
    between them.
    """
    where, raw = folder / "config.json", config.raw
    original = config.architecture == ORIGINAL
    low, high = _original(raw, config, where) if original else _transformers(raw, config, where)
    if original:
        processor = pictures.original_processor(folder, low, high)
    else:
        processor = pictures.transformers_processor(folder, hybrid=high is not None)
    vision = _assembled(config, low, high, processor, where)
    _check(vision, where)
    return vision


def towers_alone(folder: Path, config: ModelConfig) -> tuple[Table, VisionConfig]:
    """The towers' table and sizes by config.json alone, whatever processor files there are; CheckpointError.

    Of the processor it has what DeepSeek-VL's is like.
    """
    where = folder / "config.json"
    original = config.architecture == ORIGINAL
    low, high = (_original if original else _transformers)(config.raw, config, where)
    pixels = [Pixels(part["image_size"], *2 * (pictures.HALF,)) for part in (low, high) if part is not None]
    small, big = pixels[0], pixels[1] if high is not None else None
    processor = Processor(small, big, (127, 127, 127), "bicubic", 14, "", tokens=0)
    vision = _assembled(config, low, high, processor, where)
    return towers(config.architecture, high is not None, ()), vision


def _assembled(
    config: ModelConfig, low: dict[str, Any], high: dict[str, Any] | None, processor: Processor, where: Path
) -> VisionConfig:
    siglip = Tower(pixels=processor.low, **_sizes(low, SIGLIP_DEFAULTS, where))
    sam = _sam(high, processor, where) if high is not None else None
    activation = {str(part["hidden_act"]) for part in (low, high) if part is not None}
    if not activation <= {"gelu", "gelu_pytorch_tanh"} or len(activation) != 1:
        raise _wrong(where, "hidden_act", f"is {sorted(activation)}, should be gelu in every tower")
    return VisionConfig(config.architecture, siglip, sam, config.hidden_size, activation.pop(), processor)


def _original(
    raw: Mapping[str, Any], config: ModelConfig, where: Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The towers that an original config names, as transformers' configs would state them."""
    if any(key.startswith("gen_") for key in raw):
        raise CheckpointError(
            "is a Janus model, which also generates images; it is not converted here",
            where=where,
            hint="llama.cpp's own converter takes Janus-Pro",
        )
    vision, aligner = _params(raw, "vision_config", where), _params(raw, "aligner_config", where)
    high = vision.get("high_res_cfg")
    low = vision.get("low_res_cfg") if isinstance(high, dict) else vision
    if not isinstance(low, dict):
        raise _wrong(where, "vision_config", "has no low_res_cfg")
    _named(low, "siglip_large_patch16_384", where)
    expected = "low_high_hybrid_split_mlp_gelu" if high else "mlp_gelu"
    if aligner.get("projector_type") != expected or aligner.get("depth", 1) != 2:
        kind = f"{aligner.get('projector_type')!r} of depth {aligner.get('depth', 1)!r}"
        raise _wrong(where, "aligner_config", f"is {kind}, should be {expected!r} of depth 2")
    if aligner.get("n_embed") != config.hidden_size:
        raise _wrong(
            where,
            "aligner_config",
            f"gives {aligner.get('n_embed')} values, the decoder takes {config.hidden_size}",
        )
    for part in (vision, high, low):
        if isinstance(part, dict) and part.get("select_layer", -1) != -1:
            raise _wrong(where, "select_layer", f"is {part['select_layer']!r}, only -1 (the last) is known")
    low = {**SIGLIP_DEFAULTS, **SIGLIP_L, **low}
    if not isinstance(high, dict):
        return low, None
    _named(high, "sam_b_downsample", where)
    if vision.get("concat_type", "tuple") != "tuple":
        raise _wrong(where, "concat_type", f"is {vision['concat_type']!r}, only 'tuple' is known")
    return low, {**SAM_DEFAULTS, **SAM_B, **high}


def _params(raw: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    part = raw.get(key)
    params = part.get("params") if isinstance(part, dict) else None
    if not isinstance(params, dict):
        raise _wrong(where, key, "has no params")
    return params


def _named(part: Mapping[str, Any], name: str, where: Path) -> None:
    if part.get("model_name") != name:
        raise CheckpointError(
            f"names the tower {str(part.get('model_name'))[:80]!r}, which is not known",
            where=where,
            why=f"DeepSeek-VL has {name!r} in this place",
            hint="A tower of another size converts in transformers' layout, which states its sizes",
        )


def _transformers(
    raw: Mapping[str, Any], config: ModelConfig, where: Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The towers' configs with their defaults."""
    parts = [("vision_config", "siglip_vision_model", SIGLIP_DEFAULTS)]
    if config.architecture == HYBRID:
        parts.append(("high_res_vision_config", "sam_vision_model", SAM_DEFAULTS))
    found = []
    for key, kind, defaults in parts:
        part = raw.get(key)
        part = {} if part is None else part
        if not isinstance(part, dict) or part.get("model_type", kind) != kind:
            raise _wrong(where, key, f"is not a {kind}")
        found.append(defaults | {name: value for name, value in part.items() if value is not None})
    return found[0], found[1] if len(found) > 1 else None


def _sizes(part: Mapping[str, Any], defaults: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The numbers of a Tower, checked."""
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
        value = part[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 20:
            raise _wrong(where, key, f"is {str(value)[:40]!r}, should be a positive whole number")
        sizes[field] = value
    if sizes["width"] % sizes["heads"] or sizes["image_size"] % sizes["patch_size"] or sizes["layers"] > 4096:
        raise _wrong(where, "vision_config", f"has sizes that do not fit each other: {sizes}")
    if part["num_channels"] != defaults["num_channels"]:
        raise _wrong(where, "num_channels", f"is {part['num_channels']!r}, should be 3")
    return sizes | {"eps": numbers([part["layer_norm_eps"]], 1, where, "layer_norm_eps")[0]}


def _mlp(part: Mapping[str, Any]) -> Any:
    """SAM's config states the MLP in mlp_dim, or as a multiple of the width."""
    width, ratio = part["hidden_size"], part.get("mlp_ratio", 4.0)
    if part.get("mlp_dim") is not None:
        return part["mlp_dim"]
    numeric = isinstance(width, int) and isinstance(ratio, int | float) and 0 < ratio < 1000
    return int(width * ratio) if numeric and 0 < width < 1 << 20 else None


def _sam(part: Mapping[str, Any], processor: Processor, where: Path) -> Sam:
    for flag in ("use_rel_pos", "use_abs_pos", "qkv_bias"):
        if part[flag] is not True:
            raise _wrong(where, flag, f"is {part[flag]!r}, should be true")
    sizes = _sizes(part, SAM_DEFAULTS, where)
    layers, window, channels = (
        part[key] for key in ("global_attn_indexes", "window_size", "output_channels")
    )
    if (
        not isinstance(layers, list)
        or not layers
        or not all(isinstance(layer, int) and 0 <= layer < sizes["layers"] for layer in layers)
    ):
        raise _wrong(where, "global_attn_indexes", f"is {str(layers)[:80]}, should name some of the layers")
    if not all(isinstance(value, int) and 0 < value < 1 << 20 for value in (window, channels)):
        raise _wrong(where, "window_size or output_channels", f"are {window!r} and {channels!r}")
    assert processor.high is not None
    return Sam(pixels=processor.high, window=window, global_layers=tuple(layers), channels=channels, **sizes)


def _check(vision: VisionConfig, where: Path) -> None:
    """Contradictions between the processor files and the config."""
    processor, low, high = vision.processor, vision.siglip, vision.sam
    sizes = [("image_size", low.image_size, processor.low.image_size)]
    sizes.append(("the number of image tokens", vision.tokens, processor.tokens))
    if high is not None and processor.high is not None:
        sizes.append(("the big picture's image_size", high.image_size, processor.high.image_size))
    for name, ours, theirs in sizes:
        if ours != theirs:
            raise _wrong(where, name, f"is {ours} by config.json, {theirs} by the processor files")


def _wrong(where: object, key: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{key!r} cannot be used",
        where=where,
        why=f"{key} {why}",
        hint="Compare config.json and the processor files with the published ones",
    )
