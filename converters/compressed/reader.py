"""A compressed-tensors folder as a WeightSource: what its codes stand for, by Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.compressed.stated import Weights, stated_weights
from converters.compressed.stored import KINDS, Floats, Kind, Linear
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.safetensors_reader import Stored, mapped_values
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.config import load_json
from dsconvert.models.weights import Array

PARTS = tuple(dict.fromkeys(part for kind in KINDS.values() for part in kind.types))
AT_ONCE = 1 << 22  # weights that are unpacked together


@dataclass(frozen=True, eq=False)
class CompressedModel:
    """A folder as a WeightSource: quantized linears appear as NAME.weight [N, K], the rest as stored."""

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
        """ "w4a16" and the like for a quantized linear, else the stored type."""
        linear = self._linear(name)
        return self.checkpoint.dtype(name) if linear is None else self.linears[linear].weights.type

    def float32(self, name: str) -> Floats:
        """The tensor's values in float32, dequantized where need be; raises CheckpointError."""
        linear = self._linear(name)
        if linear is None:
            return self.checkpoint.float32(name)
        one = self.linears[linear]
        found, step = np.empty((one.outputs, one.inputs), np.float32), max(1, AT_ONCE // one.inputs)
        for start in range(0, one.outputs, step):
            found[start : start + step] = self.rows(name, start, min(start + step, one.outputs))
        return found

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1; of a quantized linear only theirs are read."""
        linear = self._linear(name)
        if linear is None:
            return self.checkpoint.rows(name, start, stop)
        one = self.linears[linear]
        return KINDS[one.weights.kind].rows(one, min(start, one.outputs), min(stop, one.outputs))

    def nearest(self, name: str, start: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """What plain rounding makes of rows `start` and following of another's tensor `name`."""
        linear = self._linear(name)
        if linear is None:
            return self.checkpoint.nearest(name, start, rows)
        one = self.linears[linear]
        return KINDS[one.weights.kind].nearest(one, start, rows)

    def _linear(self, name: str) -> str | None:
        linear = name.removesuffix(".weight")
        return linear if name.endswith(".weight") and linear in self.linears else None

    def _is_part(self, name: str) -> bool:
        linear, _, part = name.rpartition(".")
        return part in PARTS and linear in self.linears


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> CompressedModel:
    """Open a compressed-tensors folder of any maker: integers of 2 to 8 bits, fp8, nvfp4, mxfp4.

    Reads headers and shapes only, and config.json unless that is `stated`. Raises CheckpointError when the
    settings are missing or unknown, when a quantized linear lacks a part, or when shapes and settings do not
    agree.
    """
    config = load_json(folder / "config.json") if stated is None else stated
    weights = stated_weights(config, folder)
    checkpoint = Checkpoint(folder, *open_weights(folder), stated=config)
    tensors = checkpoint.tensors
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    names += [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    if not names:
        raise CheckpointError(
            "holds no quantized linear", where=folder, why="No tensor is named *.weight_scale"
        )
    return CompressedModel(
        checkpoint, {name: _opened(checkpoint, name, weights) for name in dict.fromkeys(names)}
    )


def _opened(checkpoint: Checkpoint, linear: str, stated: tuple[Weights, ...]) -> Linear:
    """A linear after its parts have been checked against each other and against the settings.

    Shapes tell which group of settings it is of; patterns of names, which may be anyone's, are not run.
    """
    tensors = checkpoint.tensors
    parts = {part: tensors[f"{linear}.{part}"] for part in PARTS if f"{linear}.{part}" in tensors}
    faults = []
    for weights in stated:
        kind = KINDS[weights.kind]
        fault = _missing(kind, weights, parts)
        if not fault:
            outputs, inputs = _size(linear, kind, parts)
            fault = _misshapen(kind.shapes(outputs, inputs, weights), parts, weights)
            if not fault:
                return Linear(outputs, inputs, weights, parts)
        faults.append(fault)
    where = next(iter(parts.values())).path
    raise _damaged(where, f"{quoted(linear)}: {faults[0]}")


def _missing(kind: Kind, weights: Weights, parts: Mapping[str, Stored]) -> str:
    """What is there and should not be, is not, or is of another type; "" for nothing."""
    due = set(kind.types) - set(kind.optional) - ({"weight_zero_point"} if weights.sym else set())
    for part in sorted(due - parts.keys()):
        return f"there is no {part}"
    for part, stored in parts.items():
        if part not in kind.types or (part == "weight_zero_point" and weights.sym):
            return f"there is a {part}, and config.json states none"
        if stored.dtype not in kind.types[part] or 0 in stored.shape:
            return f"{part} is stored as {stored.dtype} {list(stored.shape)}"
    return ""


def _misshapen(shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Stored], weights: Weights) -> str:
    """What of the stored tensors has another shape than the settings ask for, "" for nothing."""
    for part, stored in parts.items():
        if stored.shape != shapes[part]:
            return f"{part} has shape {list(stored.shape)}; {weights.label} asks for {list(shapes[part])}"
    return ""


def _size(linear: str, kind: Kind, parts: Mapping[str, Stored]) -> tuple[int, int]:
    """Outputs and inputs: as the file states them, or of the codes' shape."""
    stored = parts.get("weight_shape", parts[kind.mark])
    size = list(stored.shape)
    if "weight_shape" in parts:
        size = mapped_values(stored).ravel().tolist()
    elif kind.mark == "weight_packed":
        size = [*size[:1], *(2 * n for n in size[1:])]  # two codes in a byte
    if len(size) != 2 or not all(0 < n < 1 << 31 for n in size):
        raise _damaged(stored.path, f"{linear} has the size {size[:4]}")
    return size[0], size[1]


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "contradicts itself",
        where=path,
        why=why,
        hint="Fetch or make this folder again; before 2026 the package packed 3, 5, 6 and 7 bits otherwise",
    )
