"""What config.json of a compressed-tensors folder says of its weights, checked: other makers' too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.compressed.schemes import label_of
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.diagnosis import DECODER_KEYS
from dsconvert.quantization.gptq_grid import Scheme

# The formats that are read: the kind of weights, its type and bits in config.json (0: 2 to 8 of them).
FORMATS = {
    "pack-quantized": ("int", "int", 0),
    "float-quantized": ("fp8", "float", 8),
    "naive-quantized": ("fp8", "float", 8),
    "nvfp4-pack-quantized": ("nvfp4", "float", 4),
    "mxfp4-pack-quantized": ("mxfp4", "float", 4),
}
ALL = 1 << 30  # rows, or columns, of a block that is a whole row, or a whole tensor
WIDTHS = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True)
class Weights:
    """What a group of settings says of its linears' weights.

    `width` is how many inputs share a scale, -1 for all; `block` the rows and columns of fp8's blocks, and
    `whole` whether that is the tensor.
    """

    kind: str
    bits: int
    sym: bool = True
    width: int = -1
    block: tuple[int, int] = (1, ALL)

    @property
    def type(self) -> str:
        """The name of the type, for tables and limits."""
        return f"w{self.bits}a16" if self.kind == "int" else self.kind

    @property
    def whole(self) -> bool:
        """Whether one scale is for the whole tensor."""
        return self.block == (ALL, ALL)

    @property
    def label(self) -> str:
        """The type with its settings."""
        if self.kind == "int":
            return label_of(Scheme(self.bits, self.width, self.sym))
        return "fp8-block" if self.kind == "fp8" and ALL not in self.block else self.kind


def stated_weights(config: Mapping[str, Any], where: Path) -> tuple[Weights, ...]:
    """What the groups of config.json say; which linear each is about is left to the linears' shapes.

    Raises CheckpointError for settings that are not understood here.
    """
    settings = _settings(config)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unknown(where, "it states no config_groups")
    return tuple(_group(value, settings.get("format"), where) for value in groups.values())


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    for part in (config, *(config.get(key) for key in DECODER_KEYS)):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(found, dict):
            return found
    return {}


def _group(value: object, form: object, where: Path) -> Weights:
    group = value if isinstance(value, dict) else {}
    form, weights = group.get("format") or form, group.get("weights")
    if not isinstance(weights, dict):
        raise _unknown(where, "a group of it states no weights")
    if not isinstance(form, str) or form not in FORMATS:
        raise _unknown(where, f"its format is {quoted(form)}, known: {', '.join(FORMATS)}")
    kind, due, size = FORMATS[form]
    bits, sym, stated = weights.get("num_bits"), weights.get("symmetric", True), weights.get("type", "int")
    fits = isinstance(bits, int) and (1 < bits <= 8 if size == 0 else bits == size)
    if not fits or stated != due or type(sym) is not bool:
        raise _unknown(where, f"it states weights of {quoted(bits)} bits of the type {quoted(stated)}")
    strategy, width = weights.get("strategy"), weights.get("group_size")
    if kind == "fp8":
        return Weights(kind, 8, block=_block(strategy, weights.get("block_structure"), where))
    if strategy == "channel" or (strategy is None and width == -1):
        width = -1
    known = isinstance(width, int) and (width == -1 or width > 0) and width == WIDTHS.get(kind, width)
    if not known or strategy not in (None, "group", "channel", "tensor_group"):
        raise _unknown(where, f"it states the strategy {quoted(strategy)} with groups of {quoted(width)}")
    return Weights(kind, int(bits or 0), sym, int(width or 0))


def _block(strategy: object, stated: object, where: Path) -> tuple[int, int]:
    if strategy in ("tensor", "channel"):
        return (ALL if strategy == "tensor" else 1), ALL
    sides = stated if isinstance(stated, list) else []
    if strategy != "block" or len(sides) != 2 or not all(type(n) is int and 0 < n < ALL for n in sides):
        raise _unknown(where, f"it states the strategy {quoted(strategy)} with blocks of {quoted(stated)}")
    return sides[0], sides[1]


def _unknown(where: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "is not a compressed-tensors folder of a known kind",
        where=where,
        why=f"Of quantization_config {why}",
        hint="Read here: integers of 2 to 8 bits in groups or whole rows, fp8, nvfp4 and mxfp4",
    )
