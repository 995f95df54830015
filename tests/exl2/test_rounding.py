"""Plain rounding in an EXL2 file's own groups and order, against loops over groups and columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.exl2.pack import Packed, pack
from converters.exl2.settings import Group

torch = pytest.importorskip("torch")
from converters.exl2.rounding import TRIED, nearest  # noqa: E402

K, N = 160, 64
GROUPS = (Group(6, 32), Group(4, 64), Group(2, 32), Group(2, 32))
Floats = npt.NDArray[np.float32]


def weights() -> Floats:
    return np.random.default_rng(4).standard_normal((N, K)).astype(np.float32) * np.float32(0.05)


def file(order: npt.NDArray[Any]) -> Packed:
    """A file of random codes: only its order and its groups count."""
    rng = np.random.default_rng(5)
    codes = np.concatenate([rng.integers(0, 1 << b, (rows, N)) for b, rows in GROUPS]).astype(np.uint8)
    scales = rng.integers(0, 16, (len(GROUPS), N)).astype(np.uint8)
    return pack(codes, GROUPS, scales, np.full(len(GROUPS), 0.01, np.float16), order)


def column(w: npt.NDArray[Any], scale: float, bits: int) -> npt.NDArray[Any]:
    zero = 1 << (bits - 1)
    codes = np.clip(np.round(w / np.float32(scale)), -zero, zero - 1)
    return np.float16(codes * np.float32(scale)).astype(np.float32)


def by_loops(w: Floats, order: npt.NDArray[Any]) -> Floats:
    """Of each group the best largest scale, of each column the best of all sixteen shares of it."""
    found, start = np.empty_like(w), 0
    for bits, rows in GROUPS:
        inputs = order[start : start + rows]
        part = w[:, inputs]
        base = np.abs(part).max(1) / (((1 << bits) - 1) / 2)
        tries = []
        for multiplier in TRIED:
            step = np.float16(np.float32(np.float16(multiplier * base.max())) / 256)
            shares = [float(np.float16((code + 1) ** 2 * np.float32(step))) for code in range(16)]
            made = [
                min((column(one, s, bits) for s in shares), key=lambda q, one=one: np.square(q - one).sum())
                for one in part
            ]
            tries.append(np.stack(made))
        found[:, inputs] = min(tries, key=lambda q, part=part: float(np.square(q - part).sum()))
        start += rows
    return found


def test_is_near_what_loops_over_all_scales_find() -> None:
    w, order = weights(), np.random.default_rng(6).permutation(K)
    found, best = nearest(w, file(order)), by_loops(w, order)
    error, least = (float(np.square(q - w).sum()) for q in (found, best))
    # it leaves out scales far from those that just hold a column
    assert least <= error * 1.0001
    assert error <= 1.02 * least
