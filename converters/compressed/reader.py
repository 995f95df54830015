"""A compressed-tensors folder as a WeightSource: what its codes stand for, by Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.compressed.stated import Weights, stated_weights
from converters.compressed.stored import LAYOUTS, Layout, damaged
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.quantized import Linear, QuantizedSource, marked, parts_of, quantized_source, told
from dsconvert.checkpoints.safetensors_reader import Stored, mapped_values
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import quoted
from dsconvert.models.config import load_json

PARTS = tuple(dict.fromkeys(part for layout in LAYOUTS.values() for part in layout.types))


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> QuantizedSource[Weights]:
    """Open a compressed-tensors folder of any maker: integers of 2 to 8 bits, fp8, nvfp4, mxfp4.

    Reads headers and shapes only, and config.json unless that is `stated`. Raises CheckpointError when the
    settings are missing or unknown, when a quantized linear lacks a part, or when shapes and settings do not
    agree.
    """
    config = load_json(folder / "config.json") if stated is None else stated
    weights = stated_weights(config, folder)
    checkpoint = Checkpoint(folder, *open_weights(folder), stated=config)
    names = marked(checkpoint, "weight_scale", "weight_packed")
    linears = {name: _opened(checkpoint, name, weights) for name in names}
    return quantized_source(checkpoint, linears, "weight_scale")


def _opened(checkpoint: Checkpoint, linear: str, stated: tuple[Weights, ...]) -> Linear[Weights]:
    """A linear after its parts have been checked against each other and against the settings.

    Shapes tell which group of settings it is of; patterns of names, which may be anyone's, are not run.
    """
    parts = parts_of(checkpoint, linear, PARTS)
    faults = []
    for weights in stated:
        layout = LAYOUTS[weights.kind]
        fault = _missing(layout, weights, parts)
        if not fault:
            outputs, inputs = _size(linear, layout, parts)
            fault = _misshapen(layout.shapes(outputs, inputs, weights), parts, weights)
            if not fault:
                return Linear(linear, outputs, inputs, weights.type, weights, layout.kind, parts)
        faults.append(fault)
    where = next(iter(parts.values()))
    raise damaged(where, f"{quoted(linear)}: {faults[0]}")


def _missing(layout: Layout, weights: Weights, parts: Mapping[str, Stored]) -> str:
    """What is there and should not be, is not, or is of another type; "" for nothing."""
    due = set(layout.types) - set(layout.optional) - ({"weight_zero_point"} if weights.sym else set())
    for part in sorted(due - parts.keys()):
        return f"there is no {part}"
    for part, stored in parts.items():
        if part not in layout.types or (part == "weight_zero_point" and weights.sym):
            return f"there is a {part}, and config.json states none"
        if stored.dtype not in layout.types[part] or 0 in stored.shape:
            return f"{part} is stored as {told(stored)}"
    return ""


def _misshapen(shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Stored], weights: Weights) -> str:
    """What of the stored tensors has another shape than the settings ask for, "" for nothing."""
    for part, stored in parts.items():
        if stored.shape != shapes[part]:
            return f"{part} has shape {list(stored.shape)}; {weights.label} asks for {list(shapes[part])}"
    return ""


def _size(linear: str, layout: Layout, parts: Mapping[str, Stored]) -> tuple[int, int]:
    """Outputs and inputs: as the file states them, or of the codes' shape."""
    stored = parts.get("weight_shape", parts[layout.mark])
    size = list(stored.shape)
    if "weight_shape" in parts:
        size = mapped_values(stored).ravel().tolist()
    elif layout.mark == "weight_packed":
        size = [*size[:1], *(2 * n for n in size[1:])]  # two codes in a byte
    if len(size) != 2 or not all(0 < n < 1 << 31 for n in size):
        raise damaged(stored, f"{linear} has the size {size[:4]}")
    return size[0], size[1]
