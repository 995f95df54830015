"""An EXL2 folder as a WeightSource: what its integers stand for, by Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from converters.exl2 import rounding
from converters.exl2.pack import PARTS, Packed, dequantize
from converters.exl2.settings import BITS, Group, bits_of, padded
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
from dsconvert.checkpoints.safetensors_reader import Stored, mapped_values
from dsconvert.checkpoints.weight_files import open_unindexed
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.config import ModelConfig, load_json
from dsconvert.models.tensor_table import expand
from dsconvert.models.weights import Floats

STORED_AS = {"q_weight": "i32", "q_scale": "i32", "q_scale_max": "f16", "q_groups": "i16", "q_invperm": "i32"}
DIMENSIONS = {"q_weight": 2, "q_scale": 2, "q_scale_max": 1, "q_groups": 1, "q_invperm": 1}
HEAD_LINEAR = "lm_head"


@dataclass(frozen=True)
class Layout:
    """The groups of a linear's inputs, and whether it has a bias."""

    groups: tuple[Group, ...]
    bias: bool


def bits_taken(one: Linear[Layout]) -> int:
    """Bits that a linear takes in the file, padding and bias too."""
    return bits_of(one.inputs, one.outputs, one.settings.groups, one.settings.bias)


def width_of(groups: tuple[Group, ...]) -> int:
    """The widest codes that the average row of such groups would fill."""
    average = sum(bits * rows for bits, rows in groups) / sum(rows for _, rows in groups)
    return next(bits for bits in BITS if bits <= average)


def per_weight(model: QuantizedSource[Layout]) -> float:
    """Bits per weight of the decoder's quantized linears, without the head."""
    linears = [one for name, one in model.linears.items() if name != HEAD_LINEAR]
    return sum(map(bits_taken, linears)) / max(1, sum(one.outputs * one.inputs for one in linears))


def packed(one: Linear[Layout]) -> Packed:
    """The stored tensors of a quantized linear, mapped; CheckpointError."""
    found = Packed(*(mapped_values(one.parts[part]) for part in PARTS))
    path = one.parts["q_weight"].path
    if not np.array_equal(np.sort(found.q_invperm), np.arange(len(found.q_invperm))):
        raise damaged(path, f"{one.name}.q_invperm is not a permutation of {len(found.q_invperm)} inputs")
    if not np.isfinite(found.q_scale_max).all():
        raise damaged(path, f"{one.name}.q_scale_max holds a value that is not a finite number")
    return found


def _rows(one: Linear[Layout], start: int, stop: int) -> Floats:
    whole = packed(one)
    first, last = start // 8, -(-stop // 8)  # eight scales of columns share a word
    part = Packed(
        whole.q_weight[:, 8 * first : 8 * last],
        whole.q_scale[:, first:last],
        whole.q_scale_max,
        whole.q_groups,
        whole.q_invperm,
    )
    return dequantize(part)[start - 8 * first : stop - 8 * first]


KIND = Kind(_rows, lambda one, start, rows: rounding.nearest(rows, packed(one)))


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> QuantizedSource[Layout]:
    """Open an EXL2 folder: every safetensors file in it, as the runtime does, whatever an index says.

    Reads headers and tables of groups only, and config.json unless that is `stated`. Outputs are the config's
    where the file pads them. Raises CheckpointError when a quantized linear lacks a part or its
    parts contradict each other.
    """
    config = load_json(folder / "config.json") if stated is None else stated
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if settings and method != "exl2":
        raise CheckpointError(
            "is not an EXL2 folder", where=folder, why=f"It states quant_method {quoted(method)}"
        )
    checkpoint = Checkpoint(folder, *open_unindexed(folder), stated=config)
    outputs = _stated_outputs(checkpoint.config)
    linears = {name: _opened(checkpoint, name, outputs) for name in marked(checkpoint, "q_weight")}
    cut = {f"{name}.bias": one.outputs for name, one in linears.items() if one.settings.bias}
    return quantized_source(checkpoint, linears, "q_weight", cut)


def _stated_outputs(config: ModelConfig) -> dict[str, int]:
    """The outputs of every linear of the model that config.json describes, by tensor name."""
    arch = ARCHITECTURES.get(config.architecture)
    specs = expand(arch.table, config) if arch else []
    return {name: spec.source[0] for spec in specs if len(spec.source) == 2 for name in spec.names}


def _opened(checkpoint: Checkpoint, linear: str, outputs: Mapping[str, int]) -> Linear[Layout]:
    """A quantized linear after its parts have been checked against each other."""
    parts = _parts(checkpoint, linear)
    weight, inputs = parts["q_weight"], parts["q_invperm"].shape[0]
    rows, columns = weight.shape
    groups = _groups(linear, parts["q_groups"], rows, inputs)
    expected = {"q_scale": (len(groups), columns // 8), "q_scale_max": (len(groups),)}
    for part, shape in expected.items():
        if columns % 32 or parts[part].shape != shape:
            raise damaged(
                parts[part].path,
                f"{linear}.{part} has shape {list(parts[part].shape)}; {len(groups)} groups and a q_weight "
                f"of {list(weight.shape)} ask for {list(shape)}, columns being a multiple of 32",
            )
    stated = outputs.get(f"{linear}.weight", columns)
    count = stated if padded(stated) == columns else columns
    bias = checkpoint.tensors.get(f"{linear}.bias")
    if bias is not None and bias.shape not in ((columns,), (count,)):
        raise damaged(
            bias.path, f"{linear}.bias has shape {list(bias.shape)} where there are {columns} columns"
        )
    layout = Layout(groups, bias is not None)
    return Linear(linear, count, inputs, f"exl2_{width_of(groups)}", layout, KIND, parts)


def _parts(checkpoint: Checkpoint, linear: str) -> dict[str, Stored]:
    """The five tensors of a linear, each of its type."""
    parts = parts_of(checkpoint, linear, PARTS)
    for part, dtype in STORED_AS.items():
        if part not in parts:
            raise damaged(checkpoint.folder, f"{quoted(linear)} has a q_weight and no {part}")
        stored = parts[part]
        if stored.dtype != dtype or len(stored.shape) != DIMENSIONS[part] or 0 in stored.shape:
            raise damaged(stored.path, f"{quoted(f'{linear}.{part}')} is stored as {told(stored)}")
    return parts


def _groups(linear: str, stored: Stored, rows: int, inputs: int) -> tuple[Group, ...]:
    """The groups of a linear, in the order that the runtime asks for and over all its inputs."""
    table = mapped_values(stored).tolist()
    bits, first = table[0::2], [*table[1::2], rows]
    whole = len(table) % 2 == 0 and set(bits) <= set(BITS) and bits == sorted(bits, reverse=True)
    if whole and first[0] == 0:
        words = [end - start for start, end in pairwise(first)]
        counts = [count * 32 // width for width, count in zip(bits, words, strict=True)]
        exact = all(count % width == 0 < count for width, count in zip(bits, words, strict=True))
        if exact and sum(counts) == inputs:
            return tuple(Group(*group) for group in zip(bits, counts, strict=True))
    raise damaged(
        stored.path,
        f"{linear}.q_groups is {quoted(table)}: it does not divide {inputs} inputs and {rows} rows of "
        "words into groups of falling width, each a multiple of 32 inputs",
    )
