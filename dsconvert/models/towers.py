"""Image towers as tables: the rows of their parts, and what a kind of models with towers has.

GGUF names are as llama.cpp's clip has them, where it has any. Dimensions: c, f, n the width, MLP and
positions of the transformer whose output is projected ("vit" its depth), p its patch; s, m, g those of SAM (g
its grid), rel the rows of a relative position table (by layer); a, b, e the channels of its neck and
convolutions; d the decoder's width, h its half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsconvert.models.tensor_table import Row, Table, renamed

Part = dict[str, Any]


@dataclass(frozen=True)
class TowerModel:
    """A kind of models with image towers.

    `hf_class` is transformers' class, in whose names the towers are run, `projector` the type of the
    projector file. `tables` are those of the towers and the aligner by the class that config.json names;
    where several kinds share a class, `claims` says of a config.json whether it is of this one. `kinds` are
    transformers' model types of the towers by their keys in config.json. `configs` are the towers' parts of
    transformers' config, from the sizes of the transformer whose output is projected, of SAM's ({} without
    one) and the decoder's width; `torch_model` makes the model without weights of such a config, less what
    sees no picture. `unused` are patterns of tensors that no forward pass uses, `generating` of those that
    make pictures, `renames` and `making` their names and their config in transformers' layout, from the
    original's. `roles` are the words for the user and the model in a prompt, `around` the tokens that stand
    before and after a picture there; without words a prompt is what was said. `chained` says that the
    second transformer takes SAM's output; `positions` and `tokens` count, from a VisionConfig, the rows of
    its position table and a picture's embeddings.
    """

    hf_class: str
    projector: str
    tables: Mapping[str, Table]
    kinds: Mapping[str, str]
    claims: Callable[[Mapping[str, Any]], bool]
    configs: Callable[[Part, Part, int], dict[str, Part]]
    torch_model: Callable[[Part], Any]
    unused: tuple[str, ...] = ()
    generating: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    making: Callable[[Mapping[str, Any]], dict[str, Part]] = lambda raw: {}
    chained: bool = False
    positions: Callable[[Any], int] = lambda vision: int(vision.vit.grid**2)
    tokens: Callable[[Any], int] = lambda vision: int(vision.vit.grid**2)
    roles: tuple[str, str] = ("User", "Assistant")
    around: tuple[str, str] = ("", "")


def pair(
    hf: str, gguf: str, *shape: str, part: tuple[int, tuple[str, ...]] | None = None, depth: str = ""
) -> tuple[Row, ...]:
    """The rows of a weight and its bias."""
    return tuple(
        Row(f"{hf}.{kind}", f"{gguf}.{kind}", "vision", size, part=part, depth=depth)
        for kind, size in (("weight", shape), ("bias", shape[:1]))
    )


def one(hf: str, gguf: str, *shape: str, depth: str = "") -> Row:
    """A row whose names are whole."""
    return Row(hf, gguf, "vision", shape, depth=depth)


def siglip(at: str, names: dict[str, str], fused: bool) -> tuple[Row, ...]:
    """A SigLIP tower under `at`; `names` are the layout's words."""
    return (
        _position(at + names["position"], fused),
        *pair(at + names["patch"], "v.patch_embd", "c", "3", "p", "p"),
        *pair(at + names["norm"], "v.post_ln", "c"),
        *blocks(at + names["layer"], names["ln"], names["out"], "attn.qkv" if fused else ""),
    )


def blocks(layer: str, ln: str, out: str, fused: str) -> tuple[Row, ...]:
    """The blocks of a transformer with biases; `fused` is the one tensor of q, k and v, "" for three."""
    rows: list[Row] = []
    for i in ("1", "2"):
        rows += pair(f"{layer}{ln}{i}", f"v.blk.{{i}}.ln{i}", "c", depth="vit")
    for k, letter in enumerate("qkv"):
        rows += pair(
            layer + (fused or f"self_attn.{letter}_proj"),
            f"v.blk.{{i}}.attn_{letter}",
            "c",
            "c",
            part=(k, ("c", "c", "c")) if fused else None,
            depth="vit",
        )
    rows += pair(layer + out, "v.blk.{i}.attn_out", "c", "c", depth="vit")
    rows += pair(layer + "mlp.fc1", "v.blk.{i}.ffn_up", "f", "c", depth="vit")
    rows += pair(layer + "mlp.fc2", "v.blk.{i}.ffn_down", "c", "f", depth="vit")
    return tuple(rows)


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


def sam(at: str, patch: str, layer: str, ln: str) -> tuple[Row, ...]:
    """The blocks of SAM's image encoder under `at`, whose names hardly differ."""
    layer, deep = at + layer, "sam"
    rows = [
        one(at + "pos_embed", "v.sam.pos_embd.weight", "1", "g", "g", "s"),
        *pair(at + patch, "v.sam.patch_embd", "s", "3", "r", "r"),
        *pair(layer + ln + "1", "v.sam.blk.{i}.pre_ln", "s", depth=deep),
        *pair(layer + "attn.qkv", "v.sam.blk.{i}.attn.qkv", "3s", "s", depth=deep),
        *pair(layer + "attn.proj", "v.sam.blk.{i}.attn.out", "s", "s", depth=deep),
    ]
    for axis in "hw":
        hf, gguf = f"{layer}attn.rel_pos_{axis}", f"v.sam.blk.{{i}}.attn.pos_{axis}.weight"
        rows.append(one(hf, gguf, "rel", "hd", depth=deep))
    rows += pair(layer + ln + "2", "v.sam.blk.{i}.post_ln", "s", depth=deep)
    rows += pair(layer + "mlp.lin1", "v.sam.blk.{i}.mlp.lin1", "m", "s", depth=deep)
    rows += pair(layer + "mlp.lin2", "v.sam.blk.{i}.mlp.lin2", "s", "m", depth=deep)
    return tuple(rows)


def neck(hf: str, gguf: str, words: tuple[str, str, str, str]) -> tuple[Row, ...]:
    """Two convolutions with norms, from SAM's width to the channels of its output."""
    return (
        one(f"{hf}.{words[0]}.weight", f"{gguf}.0.weight", "a", "s", "1", "1"),
        *pair(f"{hf}.{words[1]}", f"{gguf}.1", "a"),
        one(f"{hf}.{words[2]}.weight", f"{gguf}.2.weight", "a", "a", "3", "3"),
        *pair(f"{hf}.{words[3]}", f"{gguf}.3", "a"),
    )


def downsampling(first: str, second: str) -> tuple[Row, ...]:
    """The convolutions that halve SAM's grid twice."""
    return (
        one(first + ".weight", "v.sam.net_2.weight", "b", "a", "3", "3"),
        one(second + ".weight", "v.sam.net_3.weight", "e", "b", "3", "3"),
    )


def aligner(first: str, second: str) -> tuple[Row, ...]:
    """Two linears from the tower's width to the decoder's."""
    return (*pair(first, "mm.0", "d", "c"), *pair(second, "mm.1", "d", "d"))


def clip(at: str, layer: str, fused: str) -> tuple[Row, ...]:
    """CLIP on SAM's output in place of patches, with a class token and a norm before, none after."""
    return (
        one(at + "embeddings.class_embedding", "v.class_embd", "c"),
        one(at + "embeddings.position_embedding.weight", "v.position_embd.weight", "n", "c"),
        *pair(at + "pre_layrnorm", "v.pre_ln", "c"),
        *blocks(at + layer, "layer_norm", "self_attn.out_proj", fused),
    )


def queried(at: str, queries: str) -> tuple[Row, ...]:
    """A gated transformer on SAM's output: queries for pictures of two sizes, each of which sees all."""
    layer, rows = at + "layers.{i}.", [one(at + "norm.weight", "v.post_ln.weight", "c")]
    for hf, gguf, *shape in (
        ("input_layernorm", "ln1", "c"),
        ("self_attn.o_proj", "attn_out", "c", "c"),
        ("post_attention_layernorm", "ln2", "c"),
        ("mlp.gate_proj", "ffn_gate", "f", "c"),
        ("mlp.up_proj", "ffn_up", "f", "c"),
        ("mlp.down_proj", "ffn_down", "c", "f"),
    ):
        rows.append(one(f"{layer}{hf}.weight", f"v.blk.{{i}}.{gguf}.weight", *shape, depth="vit"))
    for letter, size in (("q", "c"), ("k", "kv"), ("v", "kv")):
        rows += pair(f"{layer}self_attn.{letter}_proj", f"v.blk.{{i}}.attn_{letter}", size, "c", depth="vit")
    for side, count in (("768", "144"), ("1024", "256")):
        rows.append(one(queries.format(side) + ".weight", f"v.resample_query_{side}.weight", count, "c"))
    return tuple(rows)


def ends(projector: str, inputs: str, separator: str, newline: bool) -> tuple[Row, ...]:
    """One linear to the decoder's width, and what stands after a picture, and after each line of it."""
    last = one("model.image_newline", "v.image_newline", "d")
    return (
        *pair(projector, "mm.model.fc", "d", inputs),
        one(separator, "v.view_seperator", "d"),
        *((last,) if newline else ()),
    )


NUMBERS, WORDS = ("0", "1", "2", "3"), ("conv1", "layer_norm1", "conv2", "layer_norm2")  # a neck's parts
SPELLED = "model.vision_model.vision_model."  # as transformers 4 saved a tower


def respelled(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows under the names that transformers 4 gave them."""
    return renamed(rows, lambda name: name.replace("model.vision_model.", SPELLED, 1))


def spelled(table: Table, names: Iterable[str]) -> Table:
    """The table in the spelling that a checkpoint's tensor names have."""
    old = any(name.startswith(SPELLED) for name in names)
    return replace(table, rows=respelled(table.rows)) if old else table
