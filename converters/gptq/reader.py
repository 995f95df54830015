"""A GPTQ folder as a WeightSource: what its integers stand for, by Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.gptq import rounding
from converters.gptq.pack import PARTS, STORED_LESS, Array, Packed, dequantize
from converters.gptq.shapes import BITS
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
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.config import load_json
from dsconvert.models.diagnosis import DECODER_KEYS
from dsconvert.models.weights import Floats
from dsconvert.quantization.bit_packing import FIELDS, unpack_rows

STORED_AS = {"qweight": ("i32",), "qzeros": ("i32",), "scales": ("f16", "f32"), "g_idx": ("i32",)}
ALSO = "; settings that differ per linear are not read"


@dataclass(frozen=True)
class Stated:
    """What a folder says of its linears; `keys` is all of its quantization_config."""

    bits: int
    group_size: int
    form: str
    keys: Mapping[str, Any]


def packed(one: Linear[Stated], first: int = 0, last: int | None = None) -> Packed:
    """The stored tensors of outputs `first` to `last` - 1, multiples of 32, checked; CheckpointError."""
    last = one.outputs if last is None else last
    parts = {part: mapped_values(stored) for part, stored in one.parts.items()}
    words = slice(first * one.settings.bits // FIELDS, last * one.settings.bits // FIELDS)
    found = Packed(
        parts["qweight"][:, first:last],
        parts["qzeros"][:, words],
        parts["scales"][:, first:last],
        parts.get("g_idx", runs(one)),  # some tools leave it out where groups are runs of inputs
    )
    _check_values(one, found)
    return found


def runs(one: Linear[Stated]) -> Array:
    """The group of each input where groups are runs of inputs, int32 [inputs]."""
    width = one.inputs if one.settings.group_size == -1 else one.settings.group_size
    return np.arange(one.inputs, dtype=np.int32) // np.int32(width)


def _rows(one: Linear[Stated], start: int, stop: int) -> Floats:
    first, last = start // FIELDS * FIELDS, -(-stop // FIELDS) * FIELDS  # whole words of zero points
    part = dequantize(packed(one, first, last), one.settings.bits, one.settings.form)
    return part[start - first : stop - first]


def _nearest(one: Linear[Stated], start: int, rows: Floats) -> Floats:
    return rounding.nearest(rows, packed(one), one.settings.bits, one.settings.form, start)


KIND = Kind(_rows, _nearest)


def _check_values(one: Linear[Stated], found: Packed) -> None:
    path, groups, bits = one.parts["qweight"].path, len(found.scales), one.settings.bits
    if found.g_idx.min() < 0 or found.g_idx.max() >= groups:
        raise damaged(path, f"{one.name}.g_idx goes from {found.g_idx.min()} to {found.g_idx.max()} "
                            f"where there are {groups} groups", ALSO)  # fmt: skip
    if not np.isfinite(found.scales).all():
        raise damaged(path, f"{one.name}.scales holds a value that is not a finite number", ALSO)
    if STORED_LESS[one.settings.form] and int(unpack_rows(found.qzeros.T, bits).max()) == (1 << bits) - 1:
        raise CheckpointError(
            "holds a zero point that tools read in two ways",
            where=path,
            why=f"{one.name}.qzeros has a field of all ones: 0 to some readers, {1 << bits} to others",
            hint="Save this model in the gptq_v2 format with the tool that made it",
        )


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> QuantizedSource[Stated]:
    """Open a GPTQ folder: v1 or v2, 2, 3, 4 or 8 bits, symmetric or not, groups in any order.

    Reads the headers only, and config.json unless that is `stated`. Raises CheckpointError when the settings
    are missing or unknown, when a quantized linear lacks a part, or when shapes and settings do not agree.
    """
    config = load_json(folder / "config.json") if stated is None else stated
    settings = _settings(folder, config)
    bits, group_size = _whole(folder, settings, "bits"), _whole(folder, settings, "group_size")
    form = settings.get("checkpoint_format", settings.get("format", "gptq"))
    method = settings.get("quant_method", "gptq")
    known = method == "gptq" and isinstance(form, str) and form in STORED_LESS
    if not known or bits not in BITS or not (group_size == -1 or group_size > 0):
        found = f"quant_method {quoted(method)}, format {quoted(form)}, {bits} bits, group {group_size}"
        raise CheckpointError(
            "is not a GPTQ folder of a known kind",
            where=folder,
            why=f"It states {found}",
            hint="Known: gptq and gptq_v2 with 2, 3, 4 or 8 bits",
        )
    checkpoint = Checkpoint(folder, *open_weights(folder), stated=config)
    of_all = Stated(bits, group_size, form, settings)
    linears = {name: _opened(checkpoint, name, of_all) for name in marked(checkpoint, "qweight")}
    return quantized_source(checkpoint, linears, "qweight")


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The quantization settings: those of config.json, else of the legacy file."""
    for part in (config, *(config.get(key) for key in DECODER_KEYS)):
        value = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(value, dict):
            return value
    if (folder / "quantize_config.json").exists():
        return load_json(folder / "quantize_config.json")
    raise CheckpointError(
        "has no quantization_config",
        where=folder / "config.json",
        hint="This is not a quantized folder; give the one that `dsconvert gptq` wrote",
    )


def _whole(folder: Path, settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"states {key} as {quoted(value)}, should be a whole number", where=folder)
    return value


def _opened(checkpoint: Checkpoint, linear: str, stated: Stated) -> Linear[Stated]:
    """A quantized linear after its parts have been checked against each other."""
    parts, bits, group_size = parts_of(checkpoint, linear, PARTS), stated.bits, stated.group_size
    for part in PARTS:
        if part not in parts and part != "g_idx":
            raise damaged(checkpoint.folder, f"{quoted(linear)} has a qweight and no {part}", ALSO)
    for part, stored in parts.items():
        if stored.dtype not in STORED_AS[part] or 0 in stored.shape:
            why = f"{quoted(f'{linear}.{part}')} is stored as {told(stored)}"
            raise damaged(stored.path, why, ALSO)
    codes = parts["qweight"]
    if len(codes.shape) != 2 or codes.shape[0] % bits or codes.shape[1] % FIELDS:
        why = f"{linear}.qweight of shape {list(codes.shape)} holds no {bits}-bit words"
        raise damaged(codes.path, why, ALSO)
    outputs, inputs = codes.shape[1], codes.shape[0] // bits * FIELDS
    groups = -(-inputs // (inputs if group_size == -1 else group_size))
    words = outputs * bits // FIELDS
    due = {"qweight": codes.shape, "qzeros": (groups, words), "scales": (groups, outputs), "g_idx": (inputs,)}
    for part, stored in parts.items():
        if stored.shape != due[part]:
            why = f"{linear}.{part} has shape {list(stored.shape)}; {bits} bits, group {group_size} and a "
            why += f"qweight of {list(codes.shape)} ask for {list(due[part])}"
            raise damaged(stored.path, why, ALSO)
    return Linear(linear, outputs, inputs, f"gptq{bits}", stated, KIND, parts)
