"""A folder of quantized linears as a WeightSource: what its codes stand for, by Hugging Face names.

How a format stores a linear, and what rounding to it makes of other weights, is told by a `Kind`, of which
each format has one or a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.safetensors_reader import Stored
from dsconvert.errors import CheckpointError
from dsconvert.models.weights import Array, Floats

AT_ONCE = 1 << 22  # weights that are unpacked together
S = TypeVar("S")


@dataclass(frozen=True)
class Kind(Generic[S]):
    """How linears are read: `rows` gives rows `start` to `stop` - 1, float32 [n, inputs], and raises
    CheckpointError; `nearest` what plain rounding makes of another's rows that stand at `start`.
    """

    rows: Callable[[Linear[S], int, int], Floats]
    nearest: Callable[[Linear[S], int, Floats], Floats]


@dataclass(frozen=True)
class Linear(Generic[S]):
    """A quantized matrix: its name without ".weight", size and type, what is stated of it, its tensors."""

    name: str
    outputs: int
    inputs: int
    type: str
    settings: S
    kind: Kind[S] = field(repr=False)
    parts: Mapping[str, Stored] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True, eq=False)
class QuantizedSource(Generic[S]):
    """Quantized linears appear as NAME.weight [N, K], the rest as stored.

    `linears` are named without ".weight". Of the tensors in `cut` only so many first values count.
    """

    checkpoint: Checkpoint
    linears: Mapping[str, Linear[S]] = field(repr=False)
    cut: Mapping[str, int] = field(repr=False, default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that holds config.json and the weights."""
        return self.checkpoint.folder

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(one.outputs * one.inputs for one in self.linears.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name, without reading weights."""
        parts = {f"{name}.{part}" for name, one in self.linears.items() for part in one.parts}
        plain = {name: shape for name, shape in self.checkpoint.shapes().items() if name not in parts}
        plain |= {name: (count,) for name, count in self.cut.items()}
        return plain | {f"{name}.weight": (one.outputs, one.inputs) for name, one in self.linears.items()}

    def dtype(self, name: str) -> str:
        """ "gptq4" and the like for a quantized linear, else the stored type."""
        one = self.linear(name)
        return self.checkpoint.dtype(name) if one is None else one.type

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in the files, all of its parts."""
        one = self.linear(name)
        return self.checkpoint.tensors[name].nbytes if one is None else one.nbytes

    def float32(self, name: str) -> Floats:
        """The tensor's values in float32, dequantized where need be; raises CheckpointError."""
        one = self.linear(name)
        if one is None:
            return self.checkpoint.float32(name)[: self.cut.get(name)]
        found, step = np.empty((one.outputs, one.inputs), np.float32), max(32, AT_ONCE // one.inputs & -32)
        for start in range(0, one.outputs, step):
            found[start : start + step] = one.kind.rows(one, start, min(start + step, one.outputs))
        return found

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1; of a quantized linear only theirs are read."""
        one = self.linear(name)
        if one is None:
            return self.checkpoint.rows(name, start, stop)
        return one.kind.rows(one, min(start, one.outputs), min(stop, one.outputs))

    def nearest(self, name: str, start: int, rows: Floats) -> Floats | None:
        """What plain rounding makes of rows `start` and following of another's tensor `name`."""
        one = self.linear(name)
        return (
            self.checkpoint.nearest(name, start, rows) if one is None else one.kind.nearest(one, start, rows)
        )

    def linear(self, name: str) -> Linear[S] | None:
        """The quantized linear whose weight `name` is."""
        return self.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def quantized_source(
    checkpoint: Checkpoint, linears: Mapping[str, Linear[S]], mark: str, cut: Mapping[str, int] | None = None
) -> QuantizedSource[S]:
    """The source; CheckpointError where there is no linear, each of which has a tensor named *.`mark`."""
    if linears:
        return QuantizedSource(checkpoint, linears, cut or {})
    raise CheckpointError(
        "holds no quantized linear", where=checkpoint.folder, why=f"No tensor is named *.{mark}"
    )


def parts_of(checkpoint: Checkpoint, linear: str, names: tuple[str, ...]) -> dict[str, Stored]:
    """Those of the tensors LINEAR.NAME that there are."""
    tensors = checkpoint.tensors
    return {name: tensors[f"{linear}.{name}"] for name in names if f"{linear}.{name}" in tensors}


def marked(checkpoint: Checkpoint, *marks: str) -> dict[str, None]:
    """The linears that have a tensor of one of these names, in the files' order."""
    found = (name.rpartition(".") for name in checkpoint.tensors)
    return {linear: None for linear, _, part in found if part in marks}


def told(stored: Stored) -> str:
    """Type and shape of a stored tensor, for messages."""
    return f"{stored.dtype} {list(stored.shape)}"


def damaged(path: Path, why: str, also: str = "") -> CheckpointError:
    """The error for tensors that cannot be what they and the settings say."""
    hint = "Fetch or make this folder again" + also
    return CheckpointError("contradicts itself", where=path, why=why, hint=hint)
