"""An MLX folder as a WeightSource: what its codes stand for, by Hugging Face names.

By the format's description: a row's codes lie one behind the other, without a gap, in its little-endian
words, and weight = scale * code + bias, with a scale and a bias for each run of `group_size` inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from converters.mlx.affine import Affine, Floats, nearest, weights_of
from converters.mlx.stated import stated_settings
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.quantized import (
    Kind,
    Linear,
    QuantizedSource,
    damaged,
    marked,
    parts_of,
    quantized_source,
    told,
)
from dsconvert.checkpoints.safetensors_reader import mapped_values
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import quoted
from dsconvert.models.config import load_json
from dsconvert.models.weights import widened
from dsconvert.quantization.bit_stream import fields

PARTS = ("weight", "scales", "biases")
NUMBERS = ("f16", "bf16", "f32")


def _rows(one: Linear[Affine], start: int, stop: int) -> Floats:
    codes = fields(mapped_values(one.parts["weight"])[start:stop], one.settings.bits, one.inputs)
    return weights_of(codes, _numbers(one, "scales", start, stop), _numbers(one, "biases", start, stop))


def _numbers(one: Linear[Affine], part: str, start: int, stop: int) -> Floats:
    stored = one.parts[part]
    found = widened(stored.rows(start, stop))
    if not np.isfinite(found).all():
        raise damaged(stored.path, f"{one.name}.{part} holds a value that is not a finite number")
    return found


KIND = Kind(_rows, lambda one, start, rows: nearest(rows, one.settings, one.parts["scales"].dtype))


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> QuantizedSource[Affine]:
    """Open an MLX folder of any maker: affine weights of any width that MLX has, matrices of different ones.

    Reads headers and shapes only, and config.json unless that is `stated`. Raises CheckpointError when the
    settings are missing or unknown, when a quantized matrix lacks a part, or when shapes and settings do not
    agree.
    """
    config = load_json(folder / "config.json") if stated is None else stated
    settings = stated_settings(config, folder)
    checkpoint = Checkpoint(folder, *open_weights(folder), stated=config)
    words = (name.removesuffix(".weight") for name, t in checkpoint.tensors.items() if t.dtype == "u32")
    names = marked(checkpoint, "scales", "biases") | dict.fromkeys(words)
    linears = {name: _opened(checkpoint, name, settings.of(name)) for name in names}
    return quantized_source(checkpoint, linears, "scales")


def _opened(checkpoint: Checkpoint, linear: str, settings: Affine | None) -> Linear[Affine]:
    """A matrix after its parts have been checked against each other and against the settings."""
    parts = parts_of(checkpoint, linear, PARTS)
    where = next((part.path for part in parts.values()), checkpoint.folder)
    for part in PARTS:
        if part not in parts:
            raise damaged(where, f"{quoted(linear)} has no {part}")
        stored, due = parts[part], ("u32",) if part == "weight" else NUMBERS
        if stored.dtype not in due or len(stored.shape) != 2 or 0 in stored.shape:
            raise damaged(where, f"{quoted(f'{linear}.{part}')} is stored as {told(stored)}")
    if settings is None:
        raise damaged(where, f"{quoted(linear)} is quantized, and config.json says that it is not")
    outputs, groups = parts["scales"].shape
    inputs = groups * settings.group_size
    asked = {"weight": (outputs, inputs * settings.bits // 32), "biases": (outputs, groups)}
    for part, shape in asked.items():
        if parts[part].shape != shape:
            raise damaged(
                where,
                f"{quoted(f'{linear}.{part}')} has shape {list(parts[part].shape)}; {settings.label} and "
                f"scales of {list(parts['scales'].shape)} ask for {list(shape)}",
            )
    if parts["biases"].dtype != parts["scales"].dtype:
        raise damaged(where, f"{quoted(linear)} has biases in another type than its scales")
    return Linear(linear, outputs, inputs, settings.type, settings, KIND, parts)
