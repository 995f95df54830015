"""How llama.cpp's CPU code rounds the activations that it multiplies weights with, by the weights' type.

ggml converts the second operand of a product to the `vec_dot_type` of the first (ggml-cpu.c): float16 and
bfloat16 for weights of these types, blocks of 32 or 256 eight-bit integers for quantized ones. On a CPU that
alone moves a quantized model's perplexity by some tenths of a percent, whoever wrote the file. Run with the
same rounding, the file's weights give what the runtime should give, so that the rest is a defect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.experts import Observer
from dsconvert.proof.latent_rounding import absorb, halves

if TYPE_CHECKING:
    import torch

Rounding = Callable[["torch.Tensor"], "torch.Tensor"]


def exact(x: torch.Tensor) -> torch.Tensor:
    """float32 weights: products in float32."""
    return x


def to_float16(x: torch.Tensor) -> torch.Tensor:
    """ggml's f16."""
    return x.half().to(x.dtype)


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """ggml's bf16."""
    return x.bfloat16().to(x.dtype)


def blocks_of_32(x: torch.Tensor) -> torch.Tensor:
    """ggml's q8_0 and q8_1: -127 ... 127 times a float16 scale."""
    blocks = x.float().reshape(*x.shape[:-1], -1, 32)
    top = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    rounded: torch.Tensor = (blocks * (top.new_tensor(127.0) / top)).round() * (top / 127).half().float()
    return rounded.reshape(x.shape).to(x.dtype)


def blocks_of_256(x: torch.Tensor) -> torch.Tensor:
    """ggml's q8_k: the value of largest size becomes -127, the scale is float32."""
    blocks = x.float().reshape(*x.shape[:-1], -1, 256)
    top = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    top = top.where(top != 0, 1e-30)
    inverse = top.new_tensor(-127.0) / top  # -127 / top is its reciprocal times -127
    rounded: torch.Tensor = (blocks * inverse).round().clamp(max=127) * (1 / inverse)
    return rounded.reshape(x.shape).to(x.dtype)


# By the type of the weights; every type that a GGUF file is read in.
ROUNDINGS: dict[str, Rounding] = {
    "f32": exact,
    "f16": to_float16,
    "bf16": to_bfloat16,
    **dict.fromkeys(
        ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "nvfp4", "q1_0"), blocks_of_32
    ),
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"), blocks_of_256),
    **dict.fromkeys(("iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), blocks_of_256),
    **dict.fromkeys(("tq1_0", "tq2_0", "iq1_s", "iq1_m"), blocks_of_256),
}


def rounding(decoder: st.Decoder, name: str) -> Rounding:
    """How the runtime rounds what it multiplies the tensor `name` with."""
    return ROUNDINGS[decoder.source.dtype(name)]


def rounded_inputs(
    decoder: st.Decoder, block: st.Block, types: Mapping[str, str] | None = None
) -> Mapping[str, Observer]:
    """What makes a block round the input of each matrix as the runtime does; see
    `torch_decoder.run_block`.

    The block itself is changed where it has latent attention. `types` are those of the file's tensors by its
    own names, without them those of the decoder's source.
    """
    experts = (name for names in decoder.experts[block.index] for name in names)
    found: dict[str, Observer] = {name: rounding(decoder, name) for name in (*block.linears, *experts)}
    if decoder.config.latent is None:
        return found
    output = next(name for name in block.linears if name.endswith("o_proj.weight"))
    keys, values = (ROUNDINGS[kind] for kind in halves(decoder, block.index, types or {}))
    return found | {output: absorb(decoder, block, keys, values, rounding(decoder, output))}
