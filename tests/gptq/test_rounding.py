"""Plain rounding in a GPTQ file's settings, against loops over single weights; settings are read from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.gptq.pack import dequantize, pack
from converters.gptq.rounding import nearest

torch = pytest.importorskip("torch")
from dsconvert.quantization.gptq_grid import Scheme  # noqa: E402
from dsconvert.quantization.gptq_solver import SolverOptions, round_to_nearest, solve  # noqa: E402

Floats = npt.NDArray[np.float32]
N, K = 32, 128


def weights(seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)


def packed(solved: Any, bits: int) -> Any:
    parts = (getattr(solved, part).numpy() for part in ("codes", "scales", "zeros", "g_idx"))
    return pack(*parts, bits, "gptq_v2")


def by_loops(w: Floats, groups: npt.NDArray[Any], bits: int, sym: bool, mse: bool) -> Floats:
    """Every group of every output on its own, in float64."""
    top, found = 2**bits - 1, np.empty_like(w)
    for n in range(len(w)):
        for g in np.unique(groups):
            part = w[n, groups == g].astype(np.float64)
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            if sym:
                high = max(high, -low)
                low = -high
            plain = [1.0]
            if mse:
                plain += ([top / (top - 1)] if sym else []) + [1 - step / 20 for step in range(1, 15)]
            tries = [rounded(part, low * p, high * p, top, sym) for p in plain]
            found[n, groups == g] = min(tries, key=lambda q: float(np.square(q - part).sum()))
    return found


def rounded(part: npt.NDArray[np.float64], low: float, high: float, top: int, sym: bool) -> Any:
    if sym:
        scale, zero = float(np.float16(np.float32((high - low) / top))), float((top + 1) // 2)
    else:
        scale = (high - low) / top
        scale = float(np.float16(np.float32(scale if round(-low / scale) >= 1 else high / (top - 1))))
        zero = min(max(round(-low / scale), 1), top)
    return (np.clip(np.round(part / scale) + zero, 0, top) - zero) * scale


@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 64), (3, -1), (2, 32)])
def test_is_what_loops_over_groups_find(bits: int, group: int, sym: bool, mse: bool) -> None:
    w, options = weights(), SolverOptions(Scheme(bits, group, sym), mse=mse)
    file = packed(round_to_nearest(torch.from_numpy(w), options), bits)
    found = nearest(w, file, bits, "gptq_v2")
    groups = np.zeros(K, int) if group == -1 else np.arange(K) // group
    best = by_loops(w, groups, bits, sym, mse).astype(np.float32)
    if bits == 8:  # a searched range is mostly the whole one, and which it was is not told from the file
        assert error(w, best) <= error(w, found) * 1.001 <= error(w, best) * 1.15
    else:  # two ranges that cost the same in float64 may not in float32
        assert np.mean(found != best) < 0.002
        np.testing.assert_array_equal(found, dequantize(file, bits, "gptq_v2"))
        np.testing.assert_array_equal(nearest(w[8:20], file, bits, "gptq_v2", 8), found[8:20])


def test_groups_in_the_order_of_activity_are_the_files() -> None:
    w, x = weights(1), np.random.default_rng(2).standard_normal((300, K)) * np.linspace(0.1, 3, K)
    H = torch.from_numpy((2 / 300 * x.T @ x).astype(np.float32))
    solved = solve(torch.from_numpy(w), H, SolverOptions(Scheme(4, 32), act_order=True, dynamic_groups=True))
    assert np.any(np.diff(solved.g_idx.numpy()) < 0)
    found = nearest(w, packed(solved, 4), 4, "gptq_v2")
    expected = by_loops(w, solved.g_idx.numpy(), 4, True, True).astype(np.float32)
    assert np.mean(found != expected) < 0.002


def error(w: Floats, q: Floats) -> float:
    return float(np.square(w - q).sum())


Change = Callable[[Floats], Floats]


@pytest.mark.parametrize(
    "change", [np.zeros_like, lambda q: q * 3, lambda q: q[::-1]], ids=["0", "3", "turned"]
)
def test_does_not_follow_what_a_damaged_file_says(change: Change) -> None:
    """The yardstick comes from the checkpoint's rows: a file's codes have no part in it."""
    w = weights(3)
    file = packed(round_to_nearest(torch.from_numpy(w), SolverOptions(Scheme(4, 32))), 4)
    found = nearest(w, file, 4, "gptq_v2")
    assert error(w, change(found)) > 20 * error(w, found)
