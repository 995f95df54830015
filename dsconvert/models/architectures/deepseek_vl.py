"""DeepSeek-VL, 1.3B and 7B, in the original layout and in transformers': decoder, towers, aligner.

Sources: deepseek_vl/models (siglip_vit.py, sam.py, projector.py) of the original code, transformers'
deepseek_vl and deepseek_vl_hybrid; GGUF names as llama.cpp's clip has them, where it has any.
Dimensions: c, f, n the width, MLP and patches of SigLIP, p its patch; s, m, g those of SAM (g its grid),
rel the rows of a relative position table (by layer); a, b, e the channels of its neck and convolutions;
d the decoder's width, h its half.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dsconvert.models.architecture import Mount, mounted
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.tensor_table import Row, Table, renamed

ORIGINAL, VL, HYBRID = (
    "MultiModalityCausalLM",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
)


def _pair(
    hf: str, gguf: str, *shape: str, part: tuple[int, tuple[str, ...]] | None = None, depth: str = ""
) -> tuple[Row, ...]:
    """The rows of a weight and its bias."""
    return tuple(
        Row(f"{hf}.{kind}", f"{gguf}.{kind}", "vision", size, part=part, depth=depth)
        for kind, size in (("weight", shape), ("bias", shape[:1]))
    )


def _one(hf: str, gguf: str, *shape: str, depth: str = "") -> Row:
    return Row(hf, gguf, "vision", shape, depth=depth)


def _siglip(at: str, names: dict[str, str], fused: bool) -> tuple[Row, ...]:
    """A SigLIP tower under `at`; `names` are the layout's words."""
    layer, deep = at + names["layer"], "siglip"
    rows = [
        *_pair(at + names["patch"], "v.patch_embd", "c", "3", "p", "p"),
        *_pair(at + names["norm"], "v.post_ln", "c"),
    ]
    for i in ("1", "2"):
        rows += _pair(f"{layer}{names['ln']}{i}", f"v.blk.{{i}}.ln{i}", "c", depth=deep)
    for k, letter in enumerate("qkv"):
        source = "attn.qkv" if fused else f"self_attn.{letter}_proj"
        rows += _pair(
            layer + source,
            f"v.blk.{{i}}.attn_{letter}",
            "c",
            "c",
            part=(k, ("c", "c", "c")) if fused else None,
            depth=deep,
        )
    rows += _pair(layer + names["out"], "v.blk.{i}.attn_out", "c", "c", depth=deep)
    rows += _pair(layer + "mlp.fc1", "v.blk.{i}.ffn_up", "f", "c", depth=deep)
    rows += _pair(layer + "mlp.fc2", "v.blk.{i}.ffn_down", "c", "f", depth=deep)
    return (_position(at + names["position"], fused), *rows)


def _position(hf: str, leading: bool) -> Row:
    """The position table; the original has a leading axis of one."""
    row = Row(hf, "v.position_embd.weight", "vision", ("n", "c"))
    return replace(row, source=("1", "n", "c")) if leading else row


ORIGINAL_SIGLIP = {
    "position": "pos_embed",
    "patch": "patch_embed.proj",
    "norm": "norm",
    "layer": "blocks.{i}.",
    "ln": "norm",
    "out": "attn.proj",
}
TRANSFORMERS_SIGLIP = {
    "position": "embeddings.position_embedding.weight",
    "patch": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "layer": "encoder.layers.{i}.",
    "ln": "layer_norm",
    "out": "self_attn.out_proj",
}


def _sam(at: str, patch: str, layer: str, ln: str) -> tuple[Row, ...]:
    """The blocks of SAM's image encoder under `at`, whose names hardly differ."""
    layer, deep = at + layer, "sam"
    rows = [
        _one(at + "pos_embed", "v.sam.pos_embd.weight", "1", "g", "g", "s"),
        *_pair(at + patch, "v.sam.patch_embd", "s", "3", "r", "r"),
        *_pair(layer + ln + "1", "v.sam.blk.{i}.pre_ln", "s", depth=deep),
        *_pair(layer + "attn.qkv", "v.sam.blk.{i}.attn.qkv", "3s", "s", depth=deep),
        *_pair(layer + "attn.proj", "v.sam.blk.{i}.attn.out", "s", "s", depth=deep),
    ]
    for axis in "hw":
        hf, gguf = f"{layer}attn.rel_pos_{axis}", f"v.sam.blk.{{i}}.attn.pos_{axis}.weight"
        rows.append(_one(hf, gguf, "rel", "hd", depth=deep))
    rows += _pair(layer + ln + "2", "v.sam.blk.{i}.post_ln", "s", depth=deep)
    rows += _pair(layer + "mlp.lin1", "v.sam.blk.{i}.mlp.lin1", "m", "s", depth=deep)
    rows += _pair(layer + "mlp.lin2", "v.sam.blk.{i}.mlp.lin2", "s", "m", depth=deep)
    return tuple(rows)


def _neck(hf: str, gguf: str, words: tuple[str, str, str, str]) -> tuple[Row, ...]:
    return (
        _one(f"{hf}.{words[0]}.weight", f"{gguf}.0.weight", "a", "s", "1", "1"),
        *_pair(f"{hf}.{words[1]}", f"{gguf}.1", "a"),
        _one(f"{hf}.{words[2]}.weight", f"{gguf}.2.weight", "a", "a", "3", "3"),
        *_pair(f"{hf}.{words[3]}", f"{gguf}.3", "a"),
    )


def _downsampling(first: str, second: str, alpha: str) -> tuple[Row, ...]:
    return (
        _one(first + ".weight", "v.sam.net_2.weight", "b", "a", "3", "3"),
        _one(second + ".weight", "v.sam.net_3.weight", "e", "b", "3", "3"),
        _one(alpha, "v.sam.hd_alpha.weight", "1"),
    )


def _aligner(first: str, second: str) -> tuple[Row, ...]:
    return (*_pair(first, "mm.0", "d", "c"), *_pair(second, "mm.1", "d", "d"))


def _hybrid_aligner(high: str, low: str, last: str) -> tuple[Row, ...]:
    return (
        *_pair(high, "mm.high", "h", "e"),
        *_pair(low, "mm.low", "h", "c"),
        *_pair(last, "mm.1", "d", "d"),
    )


_H = "vision_model.vision_tower_high.vision_tower."
_NUMBERS, _WORDS = ("0", "1", "2", "3"), ("conv1", "layer_norm1", "conv2", "layer_norm2")
_HIGH = "model.high_res_vision_"

ORIGINAL_VL_TABLE = (
    *_siglip("vision_model.vision_tower.", ORIGINAL_SIGLIP, fused=True),
    *_aligner("aligner.layers.0", "aligner.layers.2"),
)
ORIGINAL_HYBRID_TABLE = (
    *_siglip("vision_model.vision_tower_low.vision_tower.", ORIGINAL_SIGLIP, fused=True),
    *_sam(_H, "patch_embed.proj", "blocks.{i}.", "norm"),
    *_neck(_H + "neck", "v.sam.neck", _NUMBERS),
    *_neck(_H + "neck_hd", "v.sam.neck_hd", _NUMBERS),
    *_downsampling(_H + "downsamples.0", _H + "downsamples.1", _H + "hd_alpha_downsamples"),
    *_hybrid_aligner("aligner.high_up_proj", "aligner.low_up_proj", "aligner.layers.1"),
)
VL_TABLE = (
    *_siglip("model.vision_model.", TRANSFORMERS_SIGLIP, fused=False),
    *_aligner("model.aligner.linear1", "model.aligner.linear2"),
)
HYBRID_TABLE = (
    *_siglip("model.vision_model.", TRANSFORMERS_SIGLIP, fused=False),
    *_sam(_HIGH + "model.vision_encoder.", "patch_embed.projection", "layers.{i}.", "layer_norm"),
    *_neck(_HIGH + "model.vision_encoder.neck", "v.sam.neck", _WORDS),
    *_neck(_HIGH + "neck", "v.sam.neck_hd", _WORDS),
    *_downsampling(_HIGH + "proj.conv1", _HIGH + "proj.conv2", _HIGH + "alpha"),
    *_hybrid_aligner("model.aligner.high_res_vision_proj", "model.aligner.vision_proj", "model.aligner.proj"),
)

# What the original repositories carry and no forward pass uses.
POOLING = (r"vision_model\.(vision_tower_low\.)?vision_tower\.attn_pool\..*",)
LAYER_NORMS = (r"vision_model\.(high|low)_layer_norm\.(weight|bias)",)
UNUSED_HEAD = (r"model\.vision_model\.(vision_model\.)?head\..*",)
# Each of the two plans leaves the other's part of the checkpoint to it.
_LANGUAGE_PART = {ORIGINAL: r"language_model\..*", VL: r"model\.language_model\..*|lm_head\.weight"}
_VISION_PART = {
    ORIGINAL: r"(vision_model|aligner)\..*",
    VL: r"model\.(vision_model|aligner|high_res_vision_\w+)(\..*)?",
}


def _inside(name: str) -> str:
    """Where transformers' layout keeps a tensor of its language model."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


TOWERS: dict[tuple[str, bool], Table] = {
    (ORIGINAL, False): Table(ORIGINAL_VL_TABLE, (*POOLING, _LANGUAGE_PART[ORIGINAL])),
    (ORIGINAL, True): Table(ORIGINAL_HYBRID_TABLE, (*POOLING, *LAYER_NORMS, _LANGUAGE_PART[ORIGINAL])),
    (VL, False): Table(VL_TABLE, (*UNUSED_HEAD, _LANGUAGE_PART[VL])),
    (HYBRID, True): Table(HYBRID_TABLE, (*UNUSED_HEAD, _LANGUAGE_PART[VL])),
}
UNUSED = (*POOLING, *LAYER_NORMS, *UNUSED_HEAD)
_SPELLED = "model.vision_model.vision_model."  # as transformers 4 saved the tower


def towers(architecture: str, hybrid: bool, names: Iterable[str]) -> Table:
    """The table of a checkpoint's towers and aligner, in the spelling that its tensor names have.

    Raises KeyError for a class without towers.
    """
    table = TOWERS[architecture, hybrid]
    if not any(name.startswith(_SPELLED) for name in names):
        return table
    return replace(table, rows=_respelled(table.rows))


def _respelled(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return renamed(rows, lambda name: name.replace("model.vision_model.", _SPELLED, 1))


def _every_spelling(architecture: str) -> tuple[tuple[Row, ...], ...]:
    """The tables that the towers of a class may have."""
    tables = [table.rows for (name, _), table in TOWERS.items() if name == architecture]
    return (*tables, *map(_respelled, tables))


LANGUAGE_ORIGINAL = mounted(
    LLAMA,
    ORIGINAL,
    "multi_modality",
    Mount(LLAMA, "language_config", lambda name: "language_model." + name, tied_outside=False),
    drop=(_VISION_PART[ORIGINAL],),
    beside=_every_spelling(ORIGINAL),
)
LANGUAGE, LANGUAGE_HYBRID = (
    mounted(
        LLAMA,
        name,
        model_type,
        Mount(LLAMA, "text_config", _inside, tied_outside=True),
        words=name.replace("ForConditionalGeneration", "Model"),
        drop=(_VISION_PART[VL],),
        beside=_every_spelling(name),
    )
    for name, model_type in ((VL, "deepseek_vl"), (HYBRID, "deepseek_vl_hybrid"))
)
ARCHITECTURES = (LANGUAGE_ORIGINAL, LANGUAGE, LANGUAGE_HYBRID)
