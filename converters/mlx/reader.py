"""An MLX folder as a WeightSource: what its codes stand for, by Hugging Face names.

By the format's description: a row's codes lie one behind the other, without a gap, in its little-endian
words, and weight = scale * code + bias, with a scale and a bias for each run of `group_size` inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.mlx.affine import Affine, Floats, nearest, weights_of
from converters.mlx.stated import stated_settings
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.safetensors_reader import Stored, mapped_values
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.config import load_json
from dsconvert.models.weights import Array, widened
from dsconvert.quantization.bit_stream import fields

PARTS = ("weight", "scales", "biases")
NUMBERS = ("f16", "bf16", "f32")
AT_ONCE = 1 << 22  # weights that are unpacked together


@dataclass(frozen=True)
class Linear:
    """A quantized matrix, of a linear or an embedding: its size, its settings, its stored tensors."""

    outputs: int
    inputs: int
    settings: Affine
    parts: Mapping[str, Stored]


def weights(one: Linear, start: int, stop: int) -> Floats:
    """Rows `start` to `stop` - 1, float32; raises CheckpointError for scales that are no numbers."""
    codes = fields(mapped_values(one.parts["weight"])[start:stop], one.settings.bits, one.inputs)
    return weights_of(codes, _numbers(one, "scales", start, stop), _numbers(one, "biases", start, stop))


def _numbers(one: Linear, part: str, start: int, stop: int) -> Floats:
    stored = one.parts[part]
    found = widened(stored.rows(start, stop))
    if not np.isfinite(found).all():
        raise _damaged(stored.path, f"{part} holds a value that is not a finite number")
    return found


@dataclass(frozen=True, eq=False)
class MLXModel:
    """A folder as a WeightSource: quantized matrices appear as NAME.weight [N, K], the rest as stored."""

    checkpoint: Checkpoint
    linears: Mapping[str, Linear] = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder that holds config.json and the weights."""
        return self.checkpoint.folder

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name, without reading weights."""
        plain = {n: s for n, s in self.checkpoint.shapes().items() if not self._is_part(n)}
        return plain | {f"{name}.weight": (one.outputs, one.inputs) for name, one in self.linears.items()}

    def dtype(self, name: str) -> str:
        """ "mlx4" and the like for a quantized matrix, else the stored type."""
        one = self._linear(name)
        return self.checkpoint.dtype(name) if one is None else one.settings.type

    def float32(self, name: str) -> Floats:
        """The tensor's values in float32, dequantized where need be; raises CheckpointError."""
        one = self._linear(name)
        if one is None:
            return self.checkpoint.float32(name)
        found, step = np.empty((one.outputs, one.inputs), np.float32), max(1, AT_ONCE // one.inputs)
        for start in range(0, one.outputs, step):
            found[start : start + step] = weights(one, start, min(start + step, one.outputs))
        return found

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1; of a quantized matrix only theirs are read."""
        one = self._linear(name)
        if one is None:
            return self.checkpoint.rows(name, start, stop)
        return weights(one, min(start, one.outputs), min(stop, one.outputs))

    def nearest(self, name: str, start: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """What plain rounding makes of rows `start` and following of another's tensor `name`."""
        one = self._linear(name)
        if one is None:
            return self.checkpoint.nearest(name, start, rows)
        return nearest(rows, one.settings, one.parts["scales"].dtype)

    def _linear(self, name: str) -> Linear | None:
        return self.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def _is_part(self, name: str) -> bool:
        linear, _, part = name.rpartition(".")
        return part in PARTS and linear in self.linears


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> MLXModel:
    """Open an MLX folder of any maker: affine weights of any width that MLX has, matrices of different ones.

    Reads headers and shapes only, and config.json unless that is `stated`. Raises CheckpointError when the
    settings are missing or unknown, when a quantized matrix lacks a part, or when shapes and settings do not
    agree.
    """
    config = load_json(folder / "config.json") if stated is None else stated
    settings = stated_settings(config, folder)
    checkpoint = Checkpoint(folder, *open_weights(folder), stated=config)
    names = [name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith((".scales", ".biases"))]
    names += [n.removesuffix(".weight") for n, t in checkpoint.tensors.items() if t.dtype == "u32"]
    if not names:
        raise CheckpointError("holds no quantized matrix", where=folder, why="No tensor is named *.scales")
    return MLXModel(
        checkpoint, {name: _opened(checkpoint, name, settings.of(name)) for name in dict.fromkeys(names)}
    )


def _opened(checkpoint: Checkpoint, linear: str, settings: Affine | None) -> Linear:
    """A matrix after its parts have been checked against each other and against the settings."""
    tensors = checkpoint.tensors
    parts = {part: tensors[f"{linear}.{part}"] for part in PARTS if f"{linear}.{part}" in tensors}
    where = next((part.path for part in parts.values()), checkpoint.folder)
    for part in PARTS:
        if part not in parts:
            raise _damaged(where, f"{quoted(linear)} has no {part}")
        stored, due = parts[part], ("u32",) if part == "weight" else NUMBERS
        if stored.dtype not in due or len(stored.shape) != 2 or 0 in stored.shape:
            raise _damaged(
                where, f"{quoted(f'{linear}.{part}')} is stored as {stored.dtype} {list(stored.shape)}"
            )
    if settings is None:
        raise _damaged(where, f"{quoted(linear)} is quantized, and config.json says that it is not")
    outputs, groups = parts["scales"].shape
    inputs = groups * settings.group_size
    asked = {"weight": (outputs, inputs * settings.bits // 32), "biases": (outputs, groups)}
    for part, shape in asked.items():
        if parts[part].shape != shape:
            raise _damaged(
                where,
                f"{quoted(f'{linear}.{part}')} has shape {list(parts[part].shape)}; {settings.label} and "
                f"scales of {list(parts['scales'].shape)} ask for {list(shape)}",
            )
    if parts["biases"].dtype != parts["scales"].dtype:
        raise _damaged(where, f"{quoted(linear)} has biases in another type than its scales")
    return Linear(outputs, inputs, settings, parts)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError("contradicts itself", where=path, why=why, hint="Fetch or make this folder again")
