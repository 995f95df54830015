"""The schemes of `dsconvert compressed`, as a table: what each stores of a linear, and says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from converters.compressed import rounded
from converters.compressed.floats import Floats
from converters.compressed.rounded import BLOCK, GROUP, MX_GROUP, Weight
from dsconvert.checkpoints.safetensors_writer import Piece
from dsconvert.errors import UsageError
from dsconvert.quantization.gptq_grid import Scheme

PACKED = "pack-quantized"
GROUP_SIZES = (32, 64, 128, -1)
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # type and shape of stored tensors, by the last part of names


@dataclass(frozen=True)
class Row:
    """A scheme: `format` is how config.json calls what it stores, `type` how tables call its weights.

    Integers have `bits`, and are solved with error feedback on calibration text. Of the others `shapes` gives
    what they store of N outputs and K inputs, K a multiple of `width`, and `pieces` makes it, rounded to
    nearest; `weights` and `activations` is what config.json says of them.
    """

    name: str
    format: str
    type: str
    bits: int = 0
    width: int = 32
    shapes: Callable[[int, int], Shapes] = lambda outputs, inputs: {}
    pieces: Callable[[Weight], dict[str, Piece]] = lambda weight: {}
    weights: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] | None = None

    @property
    def four_bit(self) -> bool:
        """Whether it is one of four-bit floats, which can be solved too."""
        return self.weights.get("num_bits") == 4


def _fp8_shapes(outputs: int, inputs: int) -> Shapes:
    grid = (-(-outputs // BLOCK), -(-inputs // BLOCK))
    return {"weight": ("F8_E4M3", (outputs, inputs)), "weight_scale": ("F32", grid)}


def _nv_shapes(outputs: int, inputs: int) -> Shapes:
    return {
        "weight_packed": ("U8", (outputs, inputs // 2)),
        "weight_scale": ("F8_E4M3", (outputs, inputs // GROUP)),
        "weight_global_scale": ("F32", (1,)),
    }


def _mx_shapes(outputs: int, inputs: int) -> Shapes:
    return {
        "weight_packed": ("U8", (outputs, inputs // 2)),
        "weight_scale": ("U8", (outputs, inputs // MX_GROUP)),
    }


def _fp8_pieces(weight: Weight) -> dict[str, Piece]:
    def codes(rows: Floats) -> bytes:
        return rounded.block_codes(rows, rounded.block_scales(rows)).tobytes()

    making = {"weight": codes, "weight_scale": lambda rows: rounded.block_scales(rows).tobytes()}
    return _streamed(weight, _fp8_shapes(weight.outputs, weight.inputs), making)


def _nv_pieces(weight: Weight) -> dict[str, Piece]:
    shapes = _nv_shapes(weight.outputs, weight.inputs)

    def scales(rows: Floats) -> bytes:
        return rounded.nv_scales(rows, rounded.global_scale(weight.largest())).tobytes()

    def codes(rows: Floats) -> bytes:
        scale = rounded.global_scale(weight.largest())
        return rounded.nv_codes(rows, rounded.nv_scales(rows, scale), scale).tobytes()

    kind, shape = shapes.pop("weight_global_scale")
    whole = Piece(kind, shape, lambda: iter([rounded.global_scale(weight.largest()).tobytes()]))
    making = {"weight_packed": codes, "weight_scale": scales}
    return {**_streamed(weight, shapes, making), "weight_global_scale": whole}


def _mx_pieces(weight: Weight) -> dict[str, Piece]:
    def codes(rows: Floats) -> bytes:
        return rounded.mx_codes(rows, rounded.mx_scales(rows)).tobytes()

    making = {"weight_packed": codes, "weight_scale": lambda rows: rounded.mx_scales(rows).tobytes()}
    return _streamed(weight, _mx_shapes(weight.outputs, weight.inputs), making)


def _streamed(
    weight: Weight, shapes: Shapes, making: Mapping[str, Callable[[Floats], bytes]]
) -> dict[str, Piece]:
    """Pieces whose bytes are made of 128 rows at a time, when they are written."""

    def chunks(make: Callable[[Floats], bytes]) -> Iterator[bytes | memoryview]:
        return map(make, weight.blocks())

    return {part: Piece(kind, shape, partial(chunks, making[part])) for part, (kind, shape) in shapes.items()}


FLOAT: dict[str, Any] = {"type": "float", "symmetric": True, "dynamic": False}
FP8 = {**FLOAT, "num_bits": 8, "strategy": "block", "group_size": None, "block_structure": [BLOCK, BLOCK]}
DYNAMIC = {**FLOAT, "num_bits": 8, "strategy": "group", "group_size": BLOCK, "dynamic": True}
NV = {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": GROUP}
MX = {**FLOAT, "num_bits": 4, "strategy": "group", "group_size": MX_GROUP, "scale_dtype": "torch.uint8"}
SCHEMES = {
    row.name: row
    for row in (
        *(Row(f"w{bits}a16", PACKED, f"w{bits}a16", bits) for bits in (2, 3, 4, 5, 6, 8)),
        Row("fp8-block", "float-quantized", "fp8", 0, 1, _fp8_shapes, _fp8_pieces, FP8, DYNAMIC),
        Row(
            "nvfp4a16", "nvfp4-pack-quantized", "nvfp4", 0, GROUP, _nv_shapes, _nv_pieces,
            {**NV, "scale_dtype": "torch.float8_e4m3fn"},
        ),
        Row("mxfp4a16", "mxfp4-pack-quantized", "mxfp4", 0, MX_GROUP, _mx_shapes, _mx_pieces, MX),
    )
}  # fmt: skip
INTEGERS = tuple(row.name for row in SCHEMES.values() if row.bits)
NAMED = re.compile(r"(w[0-9]+a16)(?:-([0-9]+)g)?(-asym)?")


def scheme_of(name: str) -> Row:
    """The row of a scheme; raises UsageError for a name that is none."""
    if name not in SCHEMES:
        raise UsageError(f"the scheme {name!r} is not known", hint="Known: " + ", ".join(SCHEMES))
    return SCHEMES[name]


def label_of(scheme: Scheme) -> str:
    """What integers of a scheme are called: w4a16-128g, w3a16-32g-asym, w8a16 where a row shares a scale."""
    group = "" if scheme.group_size == -1 else f"-{scheme.group_size}g"
    return f"w{scheme.bits}a16{group}" + ("" if scheme.sym else "-asym")


def schemes_named(text: str, sizes: Iterable[int], sym: bool) -> list[Scheme]:
    """The schemes of integers that a name stands for: w4a16 for those of all `sizes` of groups.

    Raises UsageError for a name that is none.
    """
    found = NAMED.fullmatch(text)
    if not found or found[1] not in INTEGERS:
        raise UsageError(
            f"type {text[:40]!r} is unknown",
            hint=f"Take some of {', '.join(INTEGERS)}, or with more: w4a16-32g, w3a16-64g-asym",
        )
    bits = SCHEMES[found[1]].bits
    return [Scheme(bits, size, sym and not found[3]) for size in ([int(found[2])] if found[2] else sizes)]


def integer_weights(scheme: Scheme) -> dict[str, object]:
    """What config.json says of integer weights."""
    whole = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else scheme.group_size,
        "dynamic": False,
    }
