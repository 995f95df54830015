"""What each kind of weights stores of a linear, and what that means, by the format's description alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.compressed import rounded
from converters.compressed.floats import E2M1, E4M3, from_nibbles
from converters.compressed.stated import Weights
from converters.compressed.unpack import integers
from dsconvert.checkpoints import quantized
from dsconvert.checkpoints.quantized import Kind, Linear
from dsconvert.checkpoints.safetensors_reader import Stored, mapped_values
from dsconvert.errors import CheckpointError
from dsconvert.models.weights import widened
from dsconvert.quantization.bit_stream import fields
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.plain_rounding import nearest_on_grid

Floats = npt.NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]
NUMBERS = ("f16", "bf16", "f32")


@dataclass(frozen=True)
class Layout:
    """How a kind of weights is stored.

    `mark` is the tensor that every linear of the kind has, `types` those of all of its tensors; `optional`
    may be missing. `shapes` are those due.
    """

    mark: str
    types: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...]
    shapes: Callable[[int, int, Weights], Shapes]
    kind: Kind[Weights]


def _integer_shapes(outputs: int, inputs: int, weights: Weights) -> Shapes:
    groups = 1 if weights.width == -1 else -(-inputs // weights.width)
    shapes: Shapes = {
        "weight_packed": (outputs, -(-inputs * weights.bits // 32)),
        "weight_scale": (outputs, groups),
        "weight_shape": (2,),
        "weight_g_idx": (inputs,),
    }
    zeros = {"weight_zero_point": (-(-outputs * weights.bits // 32), groups)}
    return shapes if weights.sym else {**shapes, **zeros}


def _width(one: Linear[Weights]) -> int:
    """How many inputs share a scale."""
    return one.inputs if one.settings.width == -1 else one.settings.width


def _integer_rows(one: Linear[Weights], start: int, stop: int) -> Floats:
    bits = one.settings.bits
    codes, zeros = fields(mapped_values(one.parts["weight_packed"])[start:stop], bits, one.inputs), None
    if not one.settings.sym:
        zeros = fields(mapped_values(one.parts["weight_zero_point"]).T, bits, one.outputs)[:, start:stop].T
    return integers(codes, _numbers(one, start, stop), zeros, _group(one), bits)


def _integer_nearest(one: Linear[Weights], start: int, rows: Floats) -> Floats:
    scales = _numbers(one, start, start + len(rows)).T
    return nearest_on_grid(rows, scales, _group(one), Scheme(one.settings.bits, -1, one.settings.sym))


def _numbers(one: Linear[Weights], start: int, stop: int) -> Floats:
    """Rows of the scales that are plain numbers."""
    stored = one.parts["weight_scale"]
    scales = widened(stored.rows(start, stop))
    if not np.isfinite(scales).all():
        raise damaged(stored, "a scale is not a finite number")
    return scales


def _group(one: Linear[Weights]) -> npt.NDArray[np.int32]:
    """The group of each input: runs of inputs, unless the file says which, as before 2026."""
    if "weight_g_idx" not in one.parts:
        return np.arange(one.inputs, dtype=np.int32) // _width(one)
    group = np.array(mapped_values(one.parts["weight_g_idx"]), np.int32)
    if group.min() < 0 or group.max() >= -(-one.inputs // _width(one)):
        raise damaged(one.parts["weight_g_idx"], f"weight_g_idx goes from {group.min()} to {group.max()}")
    return group


def _fp8_shapes(outputs: int, inputs: int, weights: Weights) -> Shapes:
    down, across = weights.block
    scales = (1,) if weights.whole else (-(-outputs // down), -(-inputs // across))
    return {"weight": (outputs, inputs), "weight_scale": scales}


def _fp8_rows(one: Linear[Weights], start: int, stop: int) -> Floats:
    down, across = one.settings.block
    first, end = start // down, -(-stop // down)
    scales = _numbers(one, first, end).reshape(end - first, -1)
    rows, columns = np.arange(start, stop) // down - first, np.arange(one.inputs) // across
    values: Floats = _e4m3(one, "weight", start, stop) * scales[rows][:, columns]
    return values


def _e4m3(one: Linear[Weights], part: str, start: int, stop: int) -> Floats:
    values: Floats = E4M3[mapped_values(one.parts[part])[start:stop]]
    if np.isnan(values).any():
        raise damaged(one.parts[part], f"{part} holds a byte that is not a number")
    return values


def _nv_shapes(outputs: int, inputs: int, weights: Weights) -> Shapes:
    scales = (outputs, inputs // rounded.GROUP)
    return {"weight_packed": (outputs, inputs // 2), "weight_scale": scales, "weight_global_scale": (1,)}


def _nv_rows(one: Linear[Weights], start: int, stop: int) -> Floats:
    whole = one.parts["weight_global_scale"]
    (by,) = widened(whole.rows(0, 1)).ravel()
    if not (np.isfinite(by) and by > 0):
        raise damaged(whole, f"weight_global_scale is {by:g}")
    scales = _e4m3(one, "weight_scale", start, stop) / by
    return _e2m1(one, start, stop) * scales.repeat(rounded.GROUP, 1)


def _e2m1(one: Linear[Weights], start: int, stop: int) -> Floats:
    return E2M1[from_nibbles(mapped_values(one.parts["weight_packed"])[start:stop])]


def _mx_shapes(outputs: int, inputs: int, weights: Weights) -> Shapes:
    return {"weight_packed": (outputs, inputs // 2), "weight_scale": (outputs, inputs // rounded.MX_GROUP)}


def _mx_rows(one: Linear[Weights], start: int, stop: int) -> Floats:
    codes = mapped_values(one.parts["weight_scale"])[start:stop]
    if (codes == 255).any():
        raise damaged(one.parts["weight_scale"], "a scale is 255, which is not a number")
    exponents = codes.astype(np.int32).repeat(rounded.MX_GROUP, 1) - 127
    found: Floats = np.ldexp(_e2m1(one, start, stop), exponents)
    return found


INTEGER = {"weight_packed": ("i32",), "weight_scale": NUMBERS, "weight_shape": ("i64", "i32")}
INTEGER |= {"weight_zero_point": ("i32",), "weight_g_idx": ("i32",)}
FP8 = {"weight": ("f8_e4m3",), "weight_scale": NUMBERS}
NVFP4 = {"weight_packed": ("u8",), "weight_scale": ("f8_e4m3",), "weight_global_scale": ("f32",)}
MXFP4 = {"weight_packed": ("u8",), "weight_scale": ("u8", "f8_e8m0")}
LAYOUTS = {
    "int": Layout(
        "weight_packed", INTEGER, ("weight_g_idx",), _integer_shapes, Kind(_integer_rows, _integer_nearest)
    ),
    "fp8": Layout(
        "weight", FP8, (), _fp8_shapes, Kind(_fp8_rows, lambda one, at, rows: rounded.nearest_fp8(rows))
    ),
    "nvfp4": Layout(
        "weight_packed", NVFP4, (), _nv_shapes,
        Kind(_nv_rows, lambda one, at, rows: rounded.nearest_nvfp4(rows)),
    ),
    "mxfp4": Layout(
        "weight_packed", MXFP4, (), _mx_shapes,
        Kind(_mx_rows, lambda one, at, rows: rounded.nearest_mxfp4(rows)),
    ),
}  # fmt: skip


def damaged(stored: Stored, why: str) -> CheckpointError:
    """The error for a tensor that cannot be what it says."""
    return quantized.damaged(
        stored.path, why, "; before 2026 the package packed 3, 5, 6 and 7 bits otherwise"
    )
