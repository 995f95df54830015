"""What is planted in an output of any format: each defect, and what the failed checks must name.

Rows are counted in the Hugging Face layout but for q and k of a GGUF file, where RoPE's order moves them
within their head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from harm import Blocks, Folder, Output

from converters.gguf.file_types import FILE_TYPES, MIXTURES

L = "model.layers"
ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
PARTS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
PARTS += ("post_attention_layernorm",)


@dataclass(frozen=True)
class Defect:
    """`plant` harms an output and says whether it could; each of `named` must be in a failed check's words.

    There {last} and {before} stand for the numbers of the last two blocks. `quick` says that a look at some
    rows and blocks finds it too.
    """

    plant: Callable[[Output], object]
    named: tuple[str, ...]
    quick: bool = True

    def words(self, layers: int) -> list[str]:
        """`named`, of a model of so many blocks."""
        return [text.format(last=layers - 1, before=layers - 2) for text in self.named]


def attention_removed(output: Output) -> None:
    for layer in range(output.layers):
        output.zero(f"{L}.{layer}.self_attn.o_proj")


def one_attention_removed(output: Output) -> None:
    output.zero(f"{L}.{output.layers - 1}.self_attn.o_proj")


def block_without_effect(output: Output) -> None:
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        output.zero(f"{L}.1.{part}")


def layers_swapped(output: Output, one: int, other: int) -> None:
    """Blocks by number; negative ones from the end."""
    one, other = one % output.layers, other % output.layers
    for part in PARTS:
        output.exchange(f"{L}.{one}.{part}", f"{L}.{other}.{part}")


def rope_order(output: Output) -> None:
    """q and k with each head's halves as pairs, or pairs as halves: the order of the other kind of file."""
    for layer in range(output.layers):
        for part in "qk":
            name = f"{L}.{layer}.self_attn.{part}_proj"
            order = np.arange(_rows(output, name)).reshape(-1, 2, HEAD // 2)
            output.permute(name, order.swapaxes(1, 2).ravel())


def _rows(output: Output, name: str) -> int:
    if isinstance(output, Blocks):
        return len(output.rows(name))
    part = "weight" if f"{name}.weight" in output.tensors else output.packed
    return output.tensors[f"{name}.{part}"].shape[0 if part == "weight" else 1]


HEAD = 64


def swapped(output: Output, name: str, one: int, other: int) -> None:
    order = np.arange(_rows(output, name))
    order[[one, other]] = other, one
    output.permute(name, order)


def head_turned(output: Output) -> None:
    """The rows of one head of v, each moved by one."""
    name = f"{L}.2.self_attn.v_proj"
    order = np.arange(_rows(output, name))
    order[HEAD : 2 * HEAD] = np.roll(order[HEAD : 2 * HEAD], 1)
    output.permute(name, order)


def head_exchanged(output: Output) -> bool:
    """Where both are stored alike."""
    if isinstance(output, Folder) and "lm_head.weight" not in output.tensors:
        return False
    output.exchange("lm_head", "model.embed_tokens")
    return True


def heads_exchanged(output: Output) -> None:
    name = f"{L}.1.self_attn.q_proj"
    order = np.arange(_rows(output, name))
    order[: 2 * HEAD] = np.roll(order[: 2 * HEAD], HEAD)
    output.permute(name, order)


def another_rope_in_factors(output: Output) -> bool:
    """Base 500,000 by another place than its own: a tensor of factors, the other of two spellings."""
    if isinstance(output, Blocks):
        output.add("rope_freqs.weight", (500000.0 / 10000.0) ** (np.arange(0, HEAD, 2) / HEAD))
        return True
    output.config["rope_theta"] = 10000.0
    output.config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    return True


def rope_scaled(output: Output) -> None:
    """Positions divided by 4."""
    if isinstance(output, Blocks):
        arch = output.keys["general.architecture"][1]
        output.keys[f"{arch}.rope.scaling.type"] = ("string", "linear")
        output.keys[f"{arch}.rope.scaling.factor"] = ("float32", 4.0)
    else:
        output.config.pop("rope_parameters", None)
        output.config["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": 4.0}


def claimed(output: Output) -> bool:
    """One tensor said to be of another type of the same size; GPTQ zero points said to be of version 2."""
    if isinstance(output, Blocks):
        return output.claim(f"{L}.1.mlp.up_proj")
    settings = output.config["quantization_config"]
    if output.packed != "qweight":
        return False
    settings["checkpoint_format"] = "gptq_v2"
    return True


def lying(output: Output) -> bool:
    """The file says that it is of another type than its tensors, one with wider limits if there is."""
    if isinstance(output, Folder):
        if output.packed == "qweight":
            return False
        settings = output.config["quantization_config"]
        settings["bits"] = 8.0 if settings["bits"] < 4 else 2.0
        return True
    kind = output.kind(f"{L}.1.mlp.gate_proj")
    other = "q2_k" if kind not in ("q2_k", "q4_0") else "q8_0"
    assert MIXTURES[other].default != kind
    output.keys["general.file_type"] = ("uint32", FILE_TYPES[other])
    return True


DEFECTS: dict[str, Defect] = {
    "attention removed": Defect(
        attention_removed, ("layers.0.self_attn.o_proj", "layers.{last}.self_attn.o_proj")
    ),
    "attention of one block removed": Defect(one_attention_removed, ("layers.{last}.self_attn.o_proj",)),
    "a block without effect": Defect(
        block_without_effect, ("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj")
    ),
    "a block removed": Defect(lambda output: output.remove_block(1), ("layers",)),
    "the last block removed": Defect(lambda output: output.remove_block(output.layers - 1), ("layers",)),
    "rope base 500000": Defect(lambda output: output.set("rope_theta", 500000.0), ("rope_theta",)),
    "rope base elsewhere": Defect(another_rope_in_factors, ("ope",)),
    "rope scaled by 4": Defect(rope_scaled, ("RoPE scaling",)),
    "eps 1e-2": Defect(lambda output: output.set("rms_norm_eps", 1e-2), ("norm_eps",)),
    "blocks 0 and 2 swapped": Defect(lambda output: layers_swapped(output, 0, 2), ("layers.0.", "layers.2.")),
    "the last two blocks swapped": Defect(
        lambda output: layers_swapped(output, -2, -1), ("layers.{before}.", "layers.{last}.")
    ),
    "q and k in the other RoPE order": Defect(rope_order, ("layers.0.self_attn.q_proj", "self_attn.k_proj")),
    "gate and up exchanged": Defect(
        lambda output: output.exchange(f"{L}.2.mlp.gate_proj", f"{L}.2.mlp.up_proj"),
        ("layers.2.mlp.gate_proj", "layers.2.mlp.up_proj"),
    ),
    "k and v exchanged": Defect(
        lambda output: output.exchange(f"{L}.2.self_attn.k_proj", f"{L}.2.self_attn.v_proj"),
        ("layers.2.self_attn.k_proj", "layers.2.self_attn.v_proj"),
    ),
    "norms of two blocks exchanged": Defect(
        lambda output: output.exchange(f"{L}.0.input_layernorm", f"{L}.2.input_layernorm"),
        ("layers.0.input_layernorm", "layers.2.input_layernorm"),
    ),
    "norms of one block exchanged": Defect(
        lambda output: output.exchange(f"{L}.1.input_layernorm", f"{L}.1.post_attention_layernorm"),
        ("layers.1.input_layernorm", "layers.1.post_attention_layernorm"),
    ),
    "head and embedding exchanged": Defect(head_exchanged, ("lm_head", "embed_tokens")),
    "a row zeroed": Defect(
        lambda output: output.zero_row(f"{L}.0.self_attn.v_proj", 70),
        ("layers.0.self_attn.v_proj.weight: row 70",),
        False,
    ),
    "a row times 1.05": Defect(
        lambda output: output.scale_row(f"{L}.3.mlp.down_proj", 9, 1.05),
        ("layers.3.mlp.down_proj.weight: row 9",),
        False,
    ),
    "a row times 1.5": Defect(
        lambda output: output.scale_row(f"{L}.3.mlp.down_proj", 9, 1.5),
        ("layers.3.mlp.down_proj.weight: row 9",),
        False,
    ),
    "two rows swapped": Defect(
        lambda output: swapped(output, f"{L}.1.mlp.up_proj", 3, 400),
        ("layers.1.mlp.up_proj.weight: row 3",),
        False,
    ),
    "a head's rows turned": Defect(head_turned, ("layers.2.self_attn.v_proj",), False),
    "two heads exchanged": Defect(heads_exchanged, ("layers.1.self_attn.q_proj",)),
    "embedding rows swapped": Defect(
        lambda output: swapped(output, "model.embed_tokens", 40, 41), ("embed_tokens.weight: row 40",), False
    ),
    "head rows swapped": Defect(
        lambda output: swapped(output, "lm_head", 40, 41), ("lm_head.weight: row 40",), False
    ),
    "a block's scale doubled": Defect(
        lambda output: output.scale_block(f"{L}.2.mlp.down_proj", 11, 2.0),
        ("layers.2.mlp.down_proj.weight: row 11",),
        False,
    ),
    "another type claimed": Defect(claimed, ("layers.1.mlp.up_proj",)),
    "another file type claimed": Defect(lying, ("type",)),
}
# What makes an output babble: found in every type.
GRAVEST = (
    "attention removed",
    "a block removed",
    "a block without effect",
    "rope base 500000",
    "eps 1e-2",
    "the last two blocks swapped",
)
