"""MLX's affine weights: weight = scale * code + bias, a scale and a bias for each group of inputs.

Source of the rule for rounding: mlx 0.32, `mx.quantize`. Scales and biases are stored in the weights' own
type, so that a runtime computes in it; a code is found by the scale before that is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.checkpoints.rounding import nearest as stored_as

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
LEAST = np.float32(1e-7)  # the least step of a group's range


@dataclass(frozen=True)
class Affine:
    """Settings of a linear: bits of a code, and how many inputs share a scale and a bias."""

    bits: int = 4
    group_size: int = 64

    @property
    def maxq(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def type(self) -> str:
        """The name of the type, for tables and limits."""
        return f"mlx{self.bits}"

    @property
    def label(self) -> str:
        """The type with its groups."""
        return f"mlx-{self.bits}bit-{self.group_size}g"

    def groups(self, inputs: int) -> int:
        """How many groups so many inputs are."""
        return inputs // self.group_size


def grids(rows: Floats, settings: Affine) -> tuple[Floats, Floats]:
    """Scale and bias of each group of some rows [n, K], before they are stored: two arrays [n, G].

    The end of a group's range that is larger is met by the nearest code to it from 0, which is thereby met.
    """
    groups = rows.reshape(len(rows), -1, settings.group_size)
    low, high = groups.min(2), groups.max(2)
    below = np.abs(low) > np.abs(high)
    step = np.maximum((high - low) / np.float32(settings.maxq), LEAST)
    step, edge = np.where(below, step, -step), np.where(below, low, high)
    steps = np.rint(edge / step)
    met = steps != 0
    scales = np.where(met, edge / np.where(met, steps, np.float32(1)), step)
    return scales, np.where(met, edge, np.float32(0))


def codes_of(rows: Floats, scales: Floats, biases: Floats, settings: Affine) -> Codes:
    """The nearest codes of some rows [n, K] for scales and biases [n, G]; ties go to the even code."""
    groups = rows.reshape(*scales.shape, settings.group_size)
    codes = np.rint((groups - biases[..., None]) / scales[..., None])
    found: Codes = np.clip(codes, 0, settings.maxq).astype(np.uint8).reshape(rows.shape)
    return found


def weights_of(codes: npt.NDArray[Any], scales: Floats, biases: Floats) -> Floats:
    """What codes [n, K] stand for, float32, with scales and biases [n, G]."""
    weights = codes.astype(np.float32).reshape(*scales.shape, -1)
    weights *= scales[..., None]
    weights += biases[..., None]
    return weights.reshape(codes.shape)


def nearest(rows: Floats, settings: Affine, dtype: str) -> Floats:
    """What `mx.quantize` makes of some rows [n, K], float32, with scales and biases stored as `dtype`."""
    scales, biases = grids(rows, settings)
    codes = codes_of(rows, scales, biases, settings)
    return weights_of(codes, stored(scales, dtype), stored(biases, dtype))


def stored(numbers: Floats, dtype: str) -> Floats:
    """Scales or biases as a folder of `dtype` ("bf16", "f16", "f32") holds them."""
    found = stored_as(numbers, dtype)
    assert found is not None  # one of three types
    return found
