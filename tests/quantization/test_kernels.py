"""The compiled loops against torch's operations, which do the same on other devices."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dsconvert.compile import kernel
from dsconvert.quantization import error_feedback, gptq_grid, kernels
from dsconvert.quantization.gptq_grid import Scheme, find_by_torch, find_grid
from dsconvert.quantization.gptq_solver import SolverOptions, solve
from dsconvert.quantization.kernels.half import to_half


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


ORDERS = ({}, {"act_order": True}, {"act_order": True, "dynamic_groups": True})


@pytest.mark.parametrize("order", ORDERS, ids=["natural", "static", "dynamic"])
@pytest.mark.parametrize(("bits", "group", "sym"), [(4, 128, True), (2, 32, False), (3, -1, True)])
def test_a_solution_is_what_torch_finds(
    bits: int, group: int, sym: bool, order: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(600, 300, seed=1) @ normal(300, 300, seed=2).mul_(0.1).add_(torch.eye(300))
    W, H = normal(150, 300, seed=3) * 0.02, x.T @ x / 300
    options = SolverOptions(Scheme(bits, group, sym), **order)
    compiled = solve(W, H, options)
    monkeypatch.setattr(gptq_grid, "_by_kernel", find_by_torch)
    monkeypatch.setattr(error_feedback, "_round", error_feedback.round_by_torch)
    plain = solve(W, H, options)
    assert plain.fell_back is None
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(compiled, part), getattr(plain, part)), part
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bits", "sym"), list(itertools.product((2, 3, 4, 8), (True, False))))
def test_ranges_are_those_that_torch_finds(bits: int, sym: bool, dtype: torch.dtype) -> None:
    w = normal(96, 130, seed=bits, dtype=dtype) * torch.logspace(-7, 3, 130, dtype=dtype)
    w[:, ::3].abs_()
    w[:, 1::6].abs_().neg_()
    w[:, 16] = 0
    cost, scheme = normal(96, seed=9, dtype=dtype).exp_(), Scheme(bits, 96, sym)
    for given in (None, cost):
        for here, there in zip(find_grid(w, scheme, given), find_by_torch(w, scheme, given), strict=True):
            assert here.dtype == dtype
            # sums are added up in another order: two ranges that cost the same may change places
            assert (here == there).double().mean() > (0.98 if dtype == torch.float32 else 0.999)


@pytest.mark.parametrize("half", [False, True])
def test_a_run_is_rounded_as_torch_rounds_it(half: bool) -> None:
    W, U = normal(100, 130) * 0.02, normal(100, 100, seed=1).mul_(0.05).triu_(1) + torch.eye(100)
    W1, D = W + normal(100, 130, seed=2) * 0.001, normal(100, seed=3).exp_()
    group = [i % 3 for i in range(100)]
    scale = (normal(3, 130, seed=4).abs_() * 0.01 + 0.001).half().double()
    grid = error_feedback.Grid(scale, torch.full_like(scale, 4), group, 7, half)
    found = []
    for run in (error_feedback._round, error_feedback.round_by_torch):
        codes, Err = torch.empty(W.shape, dtype=torch.uint8), torch.empty_like(W)
        losses = torch.zeros(130, dtype=torch.float64)
        run(W1.clone(), W, U, D, 0.1, grid, codes, Err, losses)
        found.append((codes, Err, losses))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-12, atol=1e-15)
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-9)
    values = W - found[0][1]
    exact = (found[0][0].double() - 4) * scale[group]
    assert torch.allclose(values, exact.half().double() if half else exact, rtol=1e-9, atol=1e-12)


@kernel
def halves(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = to_half(values[i])


def test_halves_are_numpys() -> None:
    """Every float16, all that lies halfway between two, and what float32 has beside that."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2
    near = np.concatenate([every, between, [65519.996, 65520, 1e30, np.inf, 1e-40]]).astype(np.float32)
    values = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))])
    values = np.concatenate([values, -values])
    out = np.empty_like(values)
    halves(values, out)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    W = normal(64, 700)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = find_grid(W, Scheme(3, 64, False), torch.ones(64, dtype=torch.float64))
    finally:
        torch.set_num_threads(before)
    for here, there in zip(
        found, find_by_torch(W, Scheme(3, 64, False), torch.ones(64).double()), strict=True
    ):
        assert torch.equal(here, there)


def test_a_damaged_cache_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loader says to a file that is not its own: anything."""
    calls, discarded = [], []

    def damaged(*given: object) -> None:
        calls.append(given)
        if len(calls) == 1:
            raise EOFError("no pickle")

    monkeypatch.setattr("dsconvert.compile.discard", discarded.append)
    kernels.by_outputs(damaged, 3)
    assert discarded == [Path(kernels.__file__).parent]
    assert calls == [(0, 0), (0, 0), (0, 3)]
