"""Rows that a quantizer of blocks finds hard."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.gguf.kernels.kq_lanes import SUPER

Rows = npt.NDArray[np.float32]


def adversarial() -> dict[str, Rows]:
    """One row each, of eight super-blocks."""
    rng = np.random.default_rng(15)
    columns = 8 * SUPER
    at = np.arange(columns)
    normal = rng.standard_normal(columns).astype(np.float32)
    outlier = normal * np.float32(1e-3)
    outlier[77] = 1000
    largest = np.finfo(np.float32).max
    rows = {
        "zeros": np.zeros(columns),
        "negative zeros": np.full(columns, -0.0),
        "zeros of both signs": np.where(normal > 0, 0.0, -0.0),
        "a constant": np.full(columns, 0.375),
        "a negative constant": np.full(columns, -0.375),
        "the largest float": np.full(columns, largest),
        "the largest float, both signs": np.where(normal > 0, largest, -largest),
        "one outlier": outlier,
        "one value, else zeros": np.where(at == 300, -2.5, 0.0),
        "one value in each sub-block, the last": np.where(at % 16 == 15, normal, 0.0),
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "positive, far from zero": np.abs(normal) + 100,
        "negative, far from zero": -np.abs(normal) - 1000,
        "near constant": 1 + normal * 1e-7,
        "negative, near constant": -1 + normal * 1e-7,
        "integers": np.round(normal * 5),
        "a ramp": at - 1000.0,
        "halves": (at % 32) / 2 - 4,
        "denormals": normal * 1e-40,
        "the smallest denormals": np.round(normal) * 1.4e-45,
        "next to denormals": normal * 1e-37,
        "below the threshold of zero": normal * 1e-16,
        "around the threshold of zero": normal * 1e-15,
        "huge": normal * 1e37,
        "squares overflow": normal * 1e20,
        "cubes underflow": normal * 1e-14,
        "every other sub-block zero": np.where(at // 32 % 2, normal, 0.0),
        "every other super-block zero": np.where(at // SUPER % 2, normal, 0.0),
        "growing sub-blocks": normal * np.exp2(at // 16 % 16),
    }
    return {key: np.asarray(row, dtype=np.float32)[None] for key, row in rows.items()}
