"""Codes, scales and the activation order as the tensors of an EXL2 file, and back.

A file is written by whole words and read by its bytes: down a group's column the codes are one stream of
bits from the lowest bit of the first word on, so code j begins at bit j*b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.exl2.settings import BITS, Group, padded
from dsconvert.errors import QuantizationError
from dsconvert.quantization.bit_packing import pack_rows

Array = npt.NDArray[Any]
PARTS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
SCALE_BITS = 4


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized linear of K inputs, N outputs (a multiple of 32) and G groups of rows as it is stored.

    `q_weight` int32 [R, N], rows in the order of activity; `q_scale` int32 [G, N/8]; `q_scale_max` float16
    [G]; `q_groups` int16 [2G], each group's bits and first row of q_weight; `q_invperm` int32 [K], the row
    of each input.
    """

    q_weight: Array
    q_scale: Array
    q_scale_max: Array
    q_groups: Array
    q_invperm: Array

    def tensors(self, linear: str) -> dict[str, Array]:
        """The five tensors by name, for the linear `linear` (without ".weight")."""
        return {f"{linear}.{part}": getattr(self, part) for part in PARTS}


def pack(
    codes: Array, groups: Sequence[Group], scales: Array, scale_max: Array, permutation: Array
) -> Packed:
    """Pack codes [K, N] and scale codes [G, N], rows in the order of `permutation` [K], float16 maxima [G].

    Row j holds input permutation[j]. Outputs are padded to a multiple of 32 with codes that stand for 0.
    Raises QuantizationError for a code, scale, group or order that the format cannot hold.
    """
    _check(codes, groups, scales, scale_max, permutation)
    inputs, outputs = codes.shape
    extra = padded(outputs) - outputs
    parts: list[Array] = []
    table: list[int] = []
    start = word = 0
    for bits, count in groups:
        rows = np.pad(codes[start : start + count], ((0, 0), (0, extra)), constant_values=1 << (bits - 1))
        parts.append(pack_rows(rows, bits))
        table += (bits, word)
        start, word = start + count, word + count * bits // 32
    words = pack_rows(np.pad(scales, ((0, 0), (0, extra))).T, SCALE_BITS)
    inverse = np.empty(inputs, np.int32)
    inverse[permutation] = np.arange(inputs, dtype=np.int32)
    return Packed(
        q_weight=np.concatenate(parts),
        q_scale=np.ascontiguousarray(words.T),
        q_scale_max=np.ascontiguousarray(scale_max),
        q_groups=np.array(table, np.int16),
        q_invperm=inverse,
    )


def stored_groups(packed: Packed) -> tuple[Group, ...]:
    """The groups that q_groups names: a group ends where the next begins, the last with q_weight."""
    bits, first = packed.q_groups.reshape(-1, 2).astype(np.int64).T
    rows = np.diff(first, append=len(packed.q_weight)) * 32 // bits
    return tuple(Group(int(b), int(n)) for b, n in zip(bits, rows, strict=True))


def unpack(packed: Packed) -> tuple[Array, Array]:
    """The codes uint8 [K, N], rows in the order of activity, and the scale codes uint8 [G, N]."""
    codes = np.empty((len(packed.q_invperm), packed.q_weight.shape[1]), np.uint8)
    start = word = 0
    for bits, rows in stored_groups(packed):
        end = word + rows * bits // 32
        codes[start : start + rows] = _read_stream(packed.q_weight[word:end], bits)
        start, word = start + rows, end
    return codes, np.ascontiguousarray(_read_stream(packed.q_scale.T, SCALE_BITS).T)


def dequantize(packed: Packed, outputs: int | None = None) -> npt.NDArray[np.float32]:
    """The weights that the file stands for, in the runtime's float16 rounding: float32 [N, K].

    With `outputs` only the first of them, without padding.
    """
    codes, scales = unpack(packed)
    codes, scales = codes[:, :outputs], scales[:, :outputs]
    steps = effective_scales(scales, packed.q_scale_max)
    weights = np.empty(codes.shape, np.float16)
    start = 0
    for step, (bits, rows) in zip(steps, stored_groups(packed), strict=True):
        part = codes[start : start + rows].astype(np.float32)
        part -= 1 << (bits - 1)
        part *= step  # exact in float32: the assignment rounds once
        weights[start : start + rows] = part
        start += rows
    return weights[packed.q_invperm].T.astype(np.float32, order="C")


def effective_scales(scales: Array, scale_max: Array) -> npt.NDArray[np.float32]:
    """What codes are multiplied by: float16 values as float32 [G, N] of scale codes and maxima [G]."""
    part = (scale_max.astype(np.float32) / np.float32(256)).astype(np.float16).astype(np.float32)
    square = np.square(scales.astype(np.float32) + 1)
    return (square * part[:, None]).astype(np.float16).astype(np.float32)


def stored_shapes(
    linear: str, outputs: int, groups: Sequence[Group]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type ("I32", "F16", "I16") and shape of the five tensors of a linear, by name."""
    columns, count = padded(outputs), len(groups)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "q_weight": ("I32", (sum(g.bits * g.rows for g in groups) // 32, columns)),
        "q_scale": ("I32", (count, columns // 8)),
        "q_scale_max": ("F16", (count,)),
        "q_groups": ("I16", (2 * count,)),
        "q_invperm": ("I32", (sum(g.rows for g in groups),)),
    }
    return {f"{linear}.{part}": shape for part, shape in shapes.items()}


def _read_stream(words: Array, bits: int) -> npt.NDArray[np.uint8]:
    """The values of `bits` bits in the columns of int32 [R, N], uint8 [R*32/bits, N], byte by byte."""
    rows, columns = words.shape
    stream = np.zeros((4 * rows + 1, columns), np.uint16)  # one byte more: the last value looks ahead
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, columns, 4)
    stream[:-1] = octets.transpose(0, 2, 1).reshape(4 * rows, columns)
    at = np.arange(rows * 32 // bits) * bits
    values: npt.NDArray[np.uint16] = stream[at // 8]
    if 8 % bits:
        values |= stream[at // 8 + 1] << np.uint16(8)
    values >>= (at % 8).astype(np.uint16)[:, None]
    values &= np.uint16((1 << bits) - 1)
    return values.astype(np.uint8)


def _check(
    codes: Array, groups: Sequence[Group], scales: Array, scale_max: Array, permutation: Array
) -> None:
    if any(bits not in BITS or rows <= 0 or rows % 32 for bits, rows in groups):
        raise _fault("a group has a width or a number of rows that EXL2 does not have", str(list(groups)))
    if [bits for bits, _ in groups] != sorted((bits for bits, _ in groups), reverse=True):
        raise _fault("groups are not in the order of falling widths", str(list(groups)))
    shapes = [codes.shape, scales.shape, scale_max.shape, permutation.shape]
    rows = sum(group.rows for group in groups)
    if shapes != [(rows, codes.shape[-1]), (len(groups), codes.shape[-1]), (len(groups),), (rows,)]:
        raise _fault("groups, codes and scales do not fit", f"{list(groups)}; {shapes}")
    if not np.array_equal(np.sort(permutation), np.arange(rows)):
        raise _fault("the order of the inputs is not a permutation", f"of {rows}")
    if codes.dtype != np.uint8 or scales.dtype != np.uint8:
        raise _fault("codes are not bytes", f"They are {codes.dtype} and {scales.dtype}")
    if int(scales.max()) >= 1 << SCALE_BITS:
        raise _fault("a scale code is above 15", f"The largest is {int(scales.max())}")
    if scale_max.dtype != np.float16 or not np.isfinite(scale_max).all() or (scale_max < 0).any():
        raise _fault("a largest scale is not a finite positive float16 value", str(scale_max))
    start = 0
    for group in groups:
        most = int(codes[start : start + group.rows].max())
        if most >= 1 << group.bits:
            raise _fault(f"a code is outside 0 ... {(1 << group.bits) - 1}", f"The largest is {most}")
        start += group.rows


def _fault(what: str, why: str) -> QuantizationError:
    hint = "This is a fault of dsconvert; please report it with the command"
    return QuantizationError(what, why=why, hint=hint)
