"""An EXL2 folder as a WeightSource: what its integers stand for, by Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.exl2 import rounding
from converters.exl2.pack import PARTS, Packed, dequantize
from converters.exl2.settings import BITS, Group, bits_of, padded
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.safetensors_reader import Stored, mapped_values
from dsconvert.checkpoints.weight_files import open_unindexed
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.config import ModelConfig, load_json
from dsconvert.models.tensor_table import expand
from dsconvert.models.weights import Array

STORED_AS = {"q_weight": "i32", "q_scale": "i32", "q_scale_max": "f16", "q_groups": "i16", "q_invperm": "i32"}
DIMENSIONS = {"q_weight": 2, "q_scale": 2, "q_scale_max": 1, "q_groups": 1, "q_invperm": 1}
HEAD_LINEAR = "lm_head"
# Which width's thresholds hold from how many bits per weight on.
LIMITS = ((7.5, 8), (5.8, 6), (4.8, 5), (3.8, 4), (2.8, 3), (0.0, 2))


@dataclass(frozen=True)
class Linear:
    """A quantized linear of the folder; `outputs` without the columns that pad it."""

    outputs: int
    inputs: int
    groups: tuple[Group, ...]
    bias: bool

    @property
    def bits(self) -> int:
        """Bits that it takes in the file, padding too."""
        return bits_of(self.inputs, self.outputs, self.groups, self.bias)

    @property
    def width(self) -> int:
        """The widest codes that its average row would fill."""
        average = sum(bits * rows for bits, rows in self.groups) / self.inputs
        return next(bits for bits in BITS if bits <= average)


@dataclass(frozen=True, eq=False)
class EXL2Model:
    """An EXL2 folder as a WeightSource: quantized linears appear as NAME.weight [N, K], the rest as stored.

    Columns that pad a linear, and values that pad its bias, are left out.
    """

    checkpoint: Checkpoint
    linears: Mapping[str, Linear] = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder that holds config.json and the weights."""
        return self.checkpoint.folder

    @property
    def bits(self) -> float:
        """Bits per weight of the decoder's quantized linears, without the head."""
        return self._per_weight([linear for name, linear in self.linears.items() if name != HEAD_LINEAR])

    @property
    def head_bits(self) -> float:
        """Bits per weight of the head; 16 where it is not quantized."""
        return self._per_weight([self.linears[HEAD_LINEAR]]) if HEAD_LINEAR in self.linears else 16.0

    @property
    def limits(self) -> str:
        """The name of the thresholds that fit the blocks' bits per weight."""
        return f"exl2_{next(bits for least, bits in LIMITS if self.bits >= least)}"

    @staticmethod
    def _per_weight(linears: list[Linear]) -> float:
        return sum(one.bits for one in linears) / max(1, sum(one.outputs * one.inputs for one in linears))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name, without reading weights."""
        plain = {n: s for n, s in self.checkpoint.shapes().items() if not self._is_part(n)}
        for name, one in self.linears.items():
            plain[f"{name}.weight"] = (one.outputs, one.inputs)
            if one.bias:
                plain[f"{name}.bias"] = (one.outputs,)
        return plain

    def dtype(self, name: str) -> str:
        """ "exl2_4" and the like for a quantized linear, after its average width; else the stored type."""
        linear = self._linear(name)
        return self.checkpoint.dtype(name) if linear is None else f"exl2_{self.linears[linear].width}"

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values in float32, dequantized where need be; raises CheckpointError."""
        linear = self._linear(name)
        if linear is not None:
            return self._dequantized(linear, 0, self.linears[linear].outputs)
        values = self.checkpoint.float32(name)
        owner = name.removesuffix(".bias")
        return values[: self.linears[owner].outputs] if owner in self.linears else values

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1; of a quantized linear only their columns are read."""
        linear = self._linear(name)
        if linear is None:
            return self.checkpoint.rows(name, start, stop)
        outputs = self.linears[linear].outputs
        return self._dequantized(linear, min(start, outputs), min(stop, outputs))

    def nearest(self, name: str, start: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """What plain rounding makes of rows `start` and following of another's tensor `name`."""
        linear = self._linear(name)
        if linear is None:
            return self.checkpoint.nearest(name, start, rows)
        return rounding.nearest(rows, self.packed(linear))

    def packed(self, linear: str) -> Packed:
        """The stored tensors of a quantized linear (named without ".weight"), mapped; CheckpointError."""
        packed = Packed(*(mapped_values(self.checkpoint.tensors[f"{linear}.{part}"]) for part in PARTS))
        path = self.checkpoint.tensors[f"{linear}.q_weight"].path
        if not np.array_equal(np.sort(packed.q_invperm), np.arange(len(packed.q_invperm))):
            raise _damaged(path, f"{linear}.q_invperm is not a permutation of {len(packed.q_invperm)} inputs")
        if not np.isfinite(packed.q_scale_max).all():
            raise _damaged(path, f"{linear}.q_scale_max holds a value that is not a finite number")
        return packed

    def _dequantized(self, linear: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        packed = self.packed(linear)
        first, last = start // 8, -(-stop // 8)  # eight scales of columns share a word
        part = Packed(
            packed.q_weight[:, 8 * first : 8 * last],
            packed.q_scale[:, first:last],
            packed.q_scale_max,
            packed.q_groups,
            packed.q_invperm,
        )
        return dequantize(part)[start - 8 * first : stop - 8 * first]

    def _linear(self, name: str) -> str | None:
        linear = name.removesuffix(".weight")
        return linear if name.endswith(".weight") and linear in self.linears else None

    def _is_part(self, name: str) -> bool:
        linear, _, part = name.rpartition(".")
        return part in PARTS and linear in self.linears


def open_model(folder: Path, stated: dict[str, Any] | None = None) -> EXL2Model:
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
    linears = {
        name.removesuffix(".q_weight"): _open_linear(checkpoint, name.removesuffix(".q_weight"), outputs)
        for name in checkpoint.tensors
        if name.endswith(".q_weight")
    }
    if not linears:
        raise CheckpointError("holds no quantized linear", where=folder, why="No tensor is named *.q_weight")
    return EXL2Model(checkpoint, linears)


def _stated_outputs(config: ModelConfig) -> dict[str, int]:
    """The outputs of every linear of the model that config.json describes, by tensor name."""
    arch = ARCHITECTURES.get(config.architecture)
    specs = expand(arch.table, config) if arch else []
    return {name: spec.source[0] for spec in specs if len(spec.source) == 2 for name in spec.names}


def _open_linear(checkpoint: Checkpoint, linear: str, outputs: Mapping[str, int]) -> Linear:
    """A quantized linear after its parts have been checked against each other."""
    parts = _parts(checkpoint, linear)
    weight, inputs = parts["q_weight"], parts["q_invperm"].shape[0]
    rows, columns = weight.shape
    groups = _groups(linear, parts["q_groups"], rows, inputs)
    expected = {"q_scale": (len(groups), columns // 8), "q_scale_max": (len(groups),)}
    for part, shape in expected.items():
        if columns % 32 or parts[part].shape != shape:
            raise _damaged(
                parts[part].path,
                f"{linear}.{part} has shape {list(parts[part].shape)}; {len(groups)} groups and a q_weight "
                f"of {list(weight.shape)} ask for {list(shape)}, columns being a multiple of 32",
            )
    stated = outputs.get(f"{linear}.weight", columns)
    count = stated if padded(stated) == columns else columns
    bias = checkpoint.tensors.get(f"{linear}.bias")
    if bias is not None and bias.shape not in ((columns,), (count,)):
        raise _damaged(
            bias.path, f"{linear}.bias has shape {list(bias.shape)} where there are {columns} columns"
        )
    return Linear(count, inputs, groups, bias is not None)


def _parts(checkpoint: Checkpoint, linear: str) -> dict[str, Stored]:
    """The five tensors of a linear, each of its type."""
    parts: dict[str, Stored] = {}
    for part, dtype in STORED_AS.items():
        stored = checkpoint.tensors.get(f"{linear}.{part}")
        if stored is None:
            raise _damaged(checkpoint.folder, f"{quoted(linear)} has a q_weight and no {part}")
        if stored.dtype != dtype or len(stored.shape) != DIMENSIONS[part] or 0 in stored.shape:
            why = f"{quoted(f'{linear}.{part}')} is stored as {stored.dtype} {list(stored.shape)}"
            raise _damaged(stored.path, why)
        parts[part] = stored
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
    raise _damaged(
        stored.path,
        f"{linear}.q_groups is {quoted(table)}: it does not divide {inputs} inputs and {rows} rows of "
        "words into groups of falling width, each a multiple of 32 inputs",
    )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError("contradicts itself", where=path, why=why, hint="Fetch or make this folder again")
