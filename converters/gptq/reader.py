"""A GPTQ folder as a WeightSource: what its integers stand for, by Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gptq import rounding
from converters.gptq.pack import PARTS, STORED_LESS, Packed, dequantize
from converters.gptq.shapes import BITS
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.safetensors_reader import values
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.config import load_json
from dsconvert.models.diagnosis import DECODER_KEYS
from dsconvert.models.weights import Array
from dsconvert.quantization.bit_packing import unpack_rows

STORED_AS = {"qweight": ("i32",), "qzeros": ("i32",), "scales": ("f16", "f32"), "g_idx": ("i32",)}


@dataclass(frozen=True, eq=False)
class GPTQModel:
    """A GPTQ folder as a WeightSource: quantized linears appear as NAME.weight [N, K], the rest as stored.

    `settings` are its quantization_config.
    """

    checkpoint: Checkpoint
    bits: int
    group_size: int
    checkpoint_format: str
    linears: Mapping[str, tuple[int, int]] = field(repr=False)  # linear -> outputs, inputs
    settings: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that holds config.json and the weights."""
        return self.checkpoint.folder

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name, without reading weights."""
        plain = {n: s for n, s in self.checkpoint.shapes().items() if not self._is_part(n)}
        return plain | {f"{linear}.weight": shape for linear, shape in self.linears.items()}

    def dtype(self, name: str) -> str:
        """ "gptq4" and the like for a quantized linear, else the stored type."""
        quantized = name.removesuffix(".weight") in self.linears and name.endswith(".weight")
        return f"gptq{self.bits}" if quantized else self.checkpoint.dtype(name)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values in float32, dequantized where need be; raises CheckpointError."""
        if name.endswith(".weight") and name.removesuffix(".weight") in self.linears:
            packed = self.packed(name.removesuffix(".weight"))
            return dequantize(packed, self.bits, self.checkpoint_format)
        return self.checkpoint.float32(name)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1; a quantized linear is unpacked whole for them."""
        if name.endswith(".weight") and name.removesuffix(".weight") in self.linears:
            return self.float32(name)[start:stop]
        return self.checkpoint.rows(name, start, stop)

    def nearest(self, name: str, start: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """What plain rounding makes of rows `start` and following of another's tensor `name`."""
        linear = name.removesuffix(".weight")
        if not (name.endswith(".weight") and linear in self.linears):
            return self.checkpoint.nearest(name, start, rows)
        return rounding.nearest(rows, self.packed(linear), self.bits, self.checkpoint_format, start)

    def packed(self, linear: str) -> Packed:
        """The stored tensors of a quantized linear (named without ".weight"), checked; CheckpointError."""
        tensors = self.checkpoint.tensors
        inputs = self.linears[linear][1]
        parts = {p: values(tensors[f"{linear}.{p}"]) for p in PARTS if f"{linear}.{p}" in tensors}
        if "g_idx" not in parts:  # as some tools leave it out where groups are runs of inputs
            parts["g_idx"] = self.runs(inputs)
        packed = Packed(**parts)
        self._check_values(linear, packed)
        return packed

    def runs(self, inputs: int) -> npt.NDArray[np.int32]:
        """The group of each input where groups are runs of inputs, int32 [inputs]."""
        width = inputs if self.group_size == -1 else self.group_size
        return np.arange(inputs, dtype=np.int32) // np.int32(width)

    def _is_part(self, name: str) -> bool:
        linear, _, part = name.rpartition(".")
        return part in PARTS and linear in self.linears

    def _check_values(self, linear: str, packed: Packed) -> None:
        path, groups = self.checkpoint.tensors[f"{linear}.qweight"].path, len(packed.scales)
        if packed.g_idx.min() < 0 or packed.g_idx.max() >= groups:
            raise _damaged(path, f"{linear}.g_idx goes from {packed.g_idx.min()} to {packed.g_idx.max()} "
                                 f"where there are {groups} groups")  # fmt: skip
        if not np.isfinite(packed.scales).all():
            raise _damaged(path, f"{linear}.scales holds a value that is not a finite number")
        less = STORED_LESS[self.checkpoint_format]
        if less and int(unpack_rows(packed.qzeros.T, self.bits).max()) == (1 << self.bits) - 1:
            raise CheckpointError(
                "holds a zero point that tools read in two ways",
                where=path,
                why=f"{linear}.qzeros has a field of all ones: 0 to some readers, {1 << self.bits} to others",
                hint="Save this model in the gptq_v2 format with the tool that made it",
            )


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> GPTQModel:
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
    linears = {
        name.removesuffix(".qweight"): _shape(checkpoint, name.removesuffix(".qweight"), bits, group_size)
        for name in checkpoint.tensors
        if name.endswith(".qweight")
    }
    if not linears:
        raise CheckpointError("holds no quantized linear", where=folder, why="No tensor is named *.qweight")
    return GPTQModel(checkpoint, bits, group_size, form, linears, settings)


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


def _shape(checkpoint: Checkpoint, linear: str, bits: int, group_size: int) -> tuple[int, int]:
    """Outputs and inputs of a quantized linear, after its parts have been checked against each other."""
    parts = {p: checkpoint.tensors.get(f"{linear}.{p}") for p in PARTS}
    qweight = parts["qweight"]
    assert qweight is not None
    for part, stored in parts.items():
        if stored is None and part != "g_idx":
            raise _damaged(checkpoint.folder, f"{quoted(linear)} has a qweight and no {part}")
        if stored is not None and (stored.dtype not in STORED_AS[part] or 0 in stored.shape):
            why = f"{quoted(f'{linear}.{part}')} is stored as {stored.dtype} {list(stored.shape)}"
            raise _damaged(stored.path, why)
    if len(qweight.shape) != 2 or qweight.shape[0] % bits or qweight.shape[1] % 32:
        raise _damaged(
            qweight.path, f"{linear}.qweight of shape {list(qweight.shape)} holds no {bits}-bit words"
        )
    outputs, inputs = qweight.shape[1], qweight.shape[0] // bits * 32
    width = inputs if group_size == -1 else group_size
    groups = -(-inputs // width)
    expected = {"qzeros": (groups, outputs * bits // 32), "scales": (groups, outputs), "g_idx": (inputs,)}
    for part, shape in expected.items():
        stored = parts[part]
        if stored is not None and stored.shape != shape:
            raise _damaged(
                stored.path,
                f"{linear}.{part} has shape {list(stored.shape)}; {bits} bits, group {group_size} and a "
                f"qweight of {list(qweight.shape)} ask for {list(shape)}",
            )
    return outputs, inputs


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "contradicts itself",
        where=path,
        why=why,
        hint="Fetch or make this folder again; settings that differ per linear are not read",
    )
