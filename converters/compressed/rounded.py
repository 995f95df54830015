"""Weights rounded to nearest in the schemes of small floats: the tensors of a linear, made in a stream.

fp8-block: E4M3 with a float32 scale for each block of 128 by 128, what DeepSeek-V3 is published in. nvfp4a16:
E2M1 with an E4M3 scale for each 16 inputs, and one number for the whole tensor, by which scales are divided.
mxfp4a16: E2M1 with a power of two for each 32 inputs. The rules for scales are those of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from converters.compressed.floats import (
    E2M1,
    E2M1_MAX,
    E4M3,
    E4M3_MAX,
    Codes,
    Floats,
    to_e2m1,
    to_e4m3,
    to_nibbles,
)

BLOCK, GROUP, MX_GROUP = 128, 16, 32
ONE = np.uint8(0x38)  # 1 in E4M3: the scale of a group of zeros
Rows = Callable[[int, int], Floats]  # rows `start` to `stop` - 1 of a weight, in float32


@dataclass(frozen=True)
class Weight:
    """A linear's weight [N, K] on its way: its rows, and the largest magnitude of what shares its range."""

    outputs: int
    inputs: int
    rows: Rows
    largest: Callable[[], float] = lambda: 0.0

    def blocks(self, step: int = BLOCK) -> Iterator[Floats]:
        """Its rows, so many at a time."""
        for start in range(0, self.outputs, step):
            yield self.rows(start, min(start + step, self.outputs))


def largest(weight: Weight) -> float:
    """The largest magnitude of a weight."""
    return max((float(np.abs(rows).max()) for rows in weight.blocks()), default=0.0)


def global_scale(amax: float) -> np.float32:
    """What nvfp4's scales are divided by, so that the largest group's is E4M3's largest."""
    return np.float32(E4M3_MAX * E2M1_MAX / amax) if amax > 0 else np.float32(1)


def block_scales(rows: Floats) -> Floats:
    """The scales of a row of blocks, float32 [ceil(K / 128)]."""
    scales: Floats = _fp8_scales(np.abs(rows).max(0, keepdims=True))[0]
    return scales


def block_codes(rows: Floats, scales: Floats) -> Codes:
    """The codes of a row of blocks with these scales."""
    return to_e4m3(rows / scales.repeat(BLOCK)[: rows.shape[1]])


def _fp8_scales(sizes: Floats) -> Floats:
    """Scales for runs of 128 magnitudes, of bf16's precision, so that no reader rounds them: upwards."""
    columns = sizes.shape[1]
    padded = np.zeros((len(sizes), -(-columns // BLOCK) * BLOCK), np.float32)
    padded[:, :columns] = sizes
    scales = padded.reshape(len(sizes), -1, BLOCK).max(2) / np.float32(E4M3_MAX)
    bits = scales.view(np.uint32) + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)
    return np.where(scales > 0, bits.view(np.float32), np.float32(1))


def nv_scales(rows: Floats, scale: np.float32) -> Codes:
    """The E4M3 scales of some rows [n, K / 16]."""
    codes = to_e4m3(_group_largest(rows, GROUP) / np.float32(E2M1_MAX) * scale)
    return np.where(codes == 0, ONE, codes)


def nv_codes(rows: Floats, scales: Codes, scale: np.float32) -> Codes:
    """The codes of some rows, two in a byte."""
    return to_nibbles(to_e2m1(rows / (E4M3[scales] / scale).repeat(GROUP, 1)))


def mx_scales(rows: Floats) -> Codes:
    """The exponents of some rows [n, K / 32], less 127: the next power above 1.75 counts as reached."""
    bits = _group_largest(rows, MX_GROUP).view(np.uint32).astype(np.int64) + (1 << 21)
    exponents = np.clip((bits >> 23) - 2, 0, 254)  # 2: the exponent of E2M1's largest
    return np.where(bits >> 23 == 0, 127, exponents).astype(np.uint8)


def mx_codes(rows: Floats, scales: Codes) -> Codes:
    """The codes of some rows, two in a byte."""
    return to_nibbles(to_e2m1(np.ldexp(rows, 127 - scales.astype(np.int32).repeat(MX_GROUP, 1))))


def _group_largest(rows: Floats, width: int) -> Floats:
    return np.ascontiguousarray(np.abs(rows).reshape(len(rows), -1, width).max(2))


def nearest_fp8(rows: Floats) -> Floats:
    """Rows rounded to E4M3 with a scale for each 128 values of a row: a block's own needs all of its rows."""
    wide = _fp8_scales(np.abs(rows)).repeat(BLOCK, 1)[:, : rows.shape[1]]
    return E4M3[to_e4m3(rows / wide)] * wide


def nearest_nvfp4(rows: Floats) -> Floats:
    """Rows rounded to nearest in nvfp4, by the range of these rows alone."""
    scale = global_scale(float(np.abs(rows).max()))
    scales = nv_scales(rows, scale)
    wide = (E4M3[scales] / scale).repeat(GROUP, 1)
    return E2M1[to_e2m1(rows / wide)] * wide


def nearest_mxfp4(rows: Floats) -> Floats:
    """Rows rounded to nearest in mxfp4."""
    exponents = mx_scales(rows).astype(np.int32).repeat(MX_GROUP, 1) - 127
    found: Floats = np.ldexp(E2M1[to_e2m1(np.ldexp(rows, -exponents))], exponents)
    return found
