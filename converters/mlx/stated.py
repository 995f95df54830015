"""What config.json of an MLX folder says of its weights, checked: other makers' too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.mlx.affine import BITS, GROUP_SIZES, Affine
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.diagnosis import quantization_of


@dataclass(frozen=True)
class Stated:
    """The settings of linears, and `own` those of single ones by their path; None: not quantized."""

    usual: Affine
    own: Mapping[str, Affine | None] = field(default_factory=dict)

    def of(self, linear: str) -> Affine | None:
        """The settings of a linear."""
        return self.own.get(linear, self.usual)


def stated_settings(config: Mapping[str, Any], where: Path) -> Stated:
    """What `quantization` of config.json says, or `quantization_config` where it is missing.

    Raises CheckpointError for settings that are not understood here.
    """
    found = quantization_of(config)
    own: dict[str, Affine | None] = {path: None for path, value in found.items() if value is False}
    for path, value in found.items():
        if isinstance(value, dict) and {"bits", "group_size"} & value.keys():
            own[path] = _affine(value, where)
    return Stated(_affine(found, where), own)


def _affine(settings: Mapping[str, Any], where: Path) -> Affine:
    bits, width, mode = settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine")
    if mode != "affine" or type(bits) is not int or bits not in BITS or type(width) is not int:
        raise _unknown(where, f"{quoted(bits)} bits, mode {quoted(mode)}, groups of {quoted(width)}")
    if width not in GROUP_SIZES:
        raise _unknown(where, f"groups of {quoted(width)}")
    return Affine(bits, width)


def _unknown(where: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "is not an MLX folder of a known kind",
        where=where,
        why=f"It states {found}",
        hint=f"Read here: the mode affine with {', '.join(map(str, BITS))} bits in groups of 32, 64 or 128",
    )
