"""The GPTQ solver against the OBQ formula with full inverses, and against the optimum of tiny problems."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gptq_problems import ORDERS, direct_loss, label, problem

from dsconvert.errors import QuantizationError, UsageError
from dsconvert.quantization import error_feedback
from dsconvert.quantization.gptq_grid import Scheme, find_grid, to_codes
from dsconvert.quantization.gptq_solver import SolverOptions, round_to_nearest, solve

F64 = npt.NDArray[np.float64]


def naive_grid(w: F64, scheme: Scheme, cost: F64 | None) -> tuple[F64, F64]:
    """Scale and zero point per row of w [N, group]: min-max, or of other ranges the one that costs least."""
    maxq, fractions = scheme.maxq, [1.0]
    if cost is not None:
        fractions += [maxq / (maxq - 1)] * scheme.sym + [percent / 100 for percent in range(95, 25, -5)]
    scales, zeros = np.zeros(len(w)), np.zeros(len(w))
    for n, row in enumerate(w):
        low, high = min(row.min(), 0.0), max(row.max(), 0.0)
        if scheme.sym:
            high = max(-low, high)
            low = -high
        best = math.inf
        for p in fractions:
            scale = (high - low) * p / maxq
            if not scheme.sym and np.round(-low * p / scale) < 1:
                scale = high * p / (maxq - 1)
            scale = float(np.float16(scale))
            zero = (maxq + 1) // 2 if scheme.sym else np.clip(np.round(-low * p / scale), 1, maxq)
            codes = np.clip(np.round(row / scale) + zero, 0, maxq)
            squares = (scale * (codes - zero) - row) ** 2
            total = squares.sum() if cost is None else (cost * squares).sum()
            if total < best:
                best, scales[n], zeros[n] = total, scale, zero
    return scales, zeros


def eliminated(inverse: F64, k: int) -> F64:
    """The inverse of H without row and column k (Frantar et al. 2022, equation 3)."""
    return inverse - np.outer(inverse[k], inverse[k]) / inverse[k, k]


def naive_gptq(weights: F64, hessian: F64, options: SolverOptions) -> tuple[F64, F64, F64, F64]:
    """Codes [N, K], scales and zeros [G, N], group of each column, by the OBQ formula of the paper.

    One column at a time: the error over the diagonal of the inverse goes to every column left, and the
    column is eliminated from the inverse. What a squared rounding costs is one over that diagonal.
    """
    scheme, (outputs, inputs) = options.scheme, weights.shape
    width = scheme.width(inputs)
    W, H = weights.copy(), hessian.copy()
    dead = np.diag(H) == 0
    mean = np.diag(H).sum() / (~dead).sum()
    W[:, dead] = 0
    H[dead, dead] = 1
    perm = np.argsort(-np.diag(hessian), kind="stable") if options.act_order else np.arange(inputs)
    by_step = not options.act_order or options.dynamic_groups
    group_of = np.empty(inputs, int)
    group_of[perm if by_step else np.arange(inputs)] = np.arange(inputs) // width
    damped = np.linalg.inv(H + options.damp * mean * np.eye(inputs))
    inverse, cost = damped, np.zeros(inputs)
    for k in perm:
        cost[k] = 1 / inverse[k, k]
        inverse = eliminated(inverse, k)

    def grid(columns: Any) -> tuple[F64, F64]:
        return naive_grid(W[:, columns], scheme, cost[columns] if options.mse else None)

    scales, zeros = np.zeros((2, scheme.groups(inputs), outputs))
    if not by_step or width == inputs:
        for g in range(scheme.groups(inputs)):
            scales[g], zeros[g] = grid(np.flatnonzero(group_of == g))
    inverse, codes, left = damped, np.zeros_like(W), list(perm)
    while left:
        k, g = left[0], group_of[left[0]]
        if by_step and width < inputs and (inputs - len(left)) % width == 0:
            scales[g], zeros[g] = grid(left[:width])
        codes[:, k] = np.clip(np.round(W[:, k] / scales[g]) + zeros[g], 0, scheme.maxq)
        error = (W[:, k] - scales[g] * (codes[:, k] - zeros[g])) / inverse[k, k]
        W[:, left] -= np.outer(error, inverse[k, left])
        inverse = eliminated(inverse, k)
        left.pop(0)
    return codes, scales, zeros, group_of.astype(float)


CASES = [
    SolverOptions(Scheme(bits, group, sym), mse=mse, **order)
    for bits, group, sym, order, mse in itertools.product(
        (2, 3, 4, 8), (32, 64, 128, -1), (True, False), ORDERS, (True, False)
    )
    if mse or (group == 64 and bits in (2, 4))
]


@pytest.mark.parametrize("options", CASES, ids=label)
def test_codes_are_those_of_the_naive_formula(options: SolverOptions) -> None:
    W, H = problem(6, 224, seed=CASES.index(options))  # blocks and groups with a short one at the end
    solved = solve(W, H, options)
    codes, scales, zeros, group_of = naive_gptq(W.numpy(), H.numpy(), options)
    assert solved.fell_back is None
    np.testing.assert_array_equal(solved.g_idx.numpy(), group_of)
    np.testing.assert_array_equal(solved.scales.numpy(), scales.astype(np.float16))
    np.testing.assert_array_equal(solved.zeros.numpy(), zeros)
    np.testing.assert_array_equal(solved.codes.numpy().T, codes)
    assert solved.dequantized().shape == W.shape


@pytest.mark.parametrize("damp", [0.0, 0.001, 0.05])
def test_damping_and_dead_columns_are_those_of_the_naive_formula(damp: float) -> None:
    W, H = problem(6, 160, seed=5)
    dead = [0, 33, 159]
    H[dead] = 0
    H[:, dead] = 0
    options = SolverOptions(Scheme(4, 32), act_order=True, damp=damp)
    solved = solve(W, H, options)
    codes = naive_gptq(W.numpy(), H.numpy(), options)[0]
    np.testing.assert_array_equal(solved.codes.numpy().T, codes)
    assert (solved.dead, solved.damp) == (3, damp)
    assert not solved.dequantized()[:, dead].any()


def massive(outputs: int, inputs: int, seed: int) -> tuple[Any, Any]:
    """Input K/3 is enormous for a few tokens, along one direction with all others; row 2 weighs it much."""
    W, H = problem(outputs, inputs, seed)
    direction = torch.randn(inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    direction[inputs // 3] = 200
    W[2, inputs // 3] = -20 * W[2].abs().max()
    return W, H + 0.1 * H.diagonal().mean() * torch.outer(direction, direction)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("order", ORDERS, ids=["natural", "static", "dynamic"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_enormous_input_spoils_no_output(sign: int, order: dict[str, bool], group: int) -> None:
    """On a min-max grid, making up for its rounding moves the other weights of row 2 out of their grids."""
    W, H = massive(6, 256, seed=group)
    W[2] *= sign
    options = SolverOptions(Scheme(3, group), **order)
    solved, plain = solve(W, H, options), solve(W, H, dataclasses.replace(options, mse=False))
    lost = [direct_loss((W - s.dequantized())[2:3], H) for s in (solved, plain)]
    assert lost[0] < 0.1 * lost[1]


@pytest.mark.parametrize(
    "options", [SolverOptions(), SolverOptions(Scheme(3, 64, False), act_order=True)], ids=label
)
def test_losses_are_what_they_say(options: SolverOptions) -> None:
    W, H = problem(32, 256, seed=1, dtype=torch.float32)
    before = W.clone(), H.clone()
    solved = solve(W, H, options)
    rounded = round_to_nearest(W, options, H.diagonal())
    assert solved.loss == pytest.approx(direct_loss(W - solved.dequantized(), H), rel=1e-4)
    assert solved.rtn_loss == pytest.approx(direct_loss(W - rounded.dequantized(), H), rel=1e-4)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    assert math.isnan(rounded.loss)


@pytest.mark.parametrize("damp", [0.01, 10.0])
def test_losses_hold_where_damping_is_most_of_them(damp: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 256, generator=generator)  # far fewer tokens than inputs: errors vanish in H
    W, H = torch.randn(16, 256, generator=generator), 2 / 6 * x.T @ x
    solved = solve(W, H, SolverOptions(Scheme(8, 64), damp=damp))
    error = W - solved.dequantized()
    damping = solved.damp * float(H.diagonal().mean() * error.square().sum())
    assert solved.loss == pytest.approx(direct_loss(error, H), rel=1e-3)
    assert 0 < solved.loss < damping


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ORDERS, ids=["natural", "static", "dynamic"])
def test_clearly_better_than_rounding_on_correlated_inputs(bits: int, order: dict[str, bool]) -> None:
    W, H = problem(64, 256, seed=bits, dtype=torch.float32)
    solved = solve(W, H, SolverOptions(Scheme(bits, 64), **order))
    assert solved.fell_back is None
    assert solved.loss < 0.5 * solved.rtn_loss


def test_float32_finds_what_float64_finds() -> None:
    W, H = problem(64, 384, seed=9)
    for options in (SolverOptions(), SolverOptions(Scheme(2, 32, False), act_order=True)):
        exact, single = solve(W, H, options), solve(W.float(), H.float(), options)
        assert single.loss == pytest.approx(exact.loss, rel=0.02)
        assert (single.codes == exact.codes).float().mean() > 0.95


@pytest.mark.parametrize("inputs", [2, 3])
@pytest.mark.parametrize("sym", [True, False])
def test_never_below_the_optimum_and_near_it(inputs: int, sym: bool) -> None:
    found, best, rounded = [], [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, inputs, generator=generator, dtype=torch.float64)
        x += 2 * torch.randn(8, 1, generator=generator, dtype=torch.float64)
        W, H = torch.randn(1, inputs, generator=generator, dtype=torch.float64), x.T @ x
        solved = solve(W, H, SolverOptions(Scheme(2, -1, sym), damp=0.0))
        scale, zero = float(solved.scales[0, 0]), int(solved.zeros[0, 0])
        grid = itertools.product(range(4), repeat=inputs)
        losses = [direct_loss(W - (torch.tensor([c], dtype=torch.float64) - zero) * scale, H) for c in grid]
        best.append(min(losses))
        found.append(solved.loss)
        rounded.append(solved.rtn_loss)
        # `loss` is summed another way than the optimum: equal up to rounding
        assert min(losses) <= solved.loss * (1 + 1e-5) + 1e-9
        assert solved.loss <= solved.rtn_loss
    assert sum(f <= b * (1 + 1e-4) + 1e-9 for f, b in zip(found, best, strict=True)) >= 30
    assert sum(found) < 1.6 * sum(best)
    assert sum(found) < sum(rounded)


def test_damping_climbs_the_ladder_where_it_must() -> None:
    W, H = problem(8, 64, seed=2)
    values, vectors = torch.linalg.eigh(H)
    values[0] = -0.05 * H.diagonal().mean()
    solved = solve(W, vectors @ torch.diag(values) @ vectors.T, SolverOptions(Scheme(4, 32), damp=0.01))
    assert (solved.damp, solved.fell_back) == (0.1, None)


def test_falls_back_by_name() -> None:
    W, H = problem(8, 64, seed=2, dtype=torch.float32)
    options = SolverOptions(Scheme(4, 32))
    rounded = round_to_nearest(W, options)
    bad = H.clone()
    bad[3, 5] = math.nan
    negative = H - 10 * H.diagonal().max() * torch.ones_like(H)
    cases = {"finite": bad, "positive definite": negative, "active": torch.zeros_like(H)}
    for reason, hessian in cases.items():
        solved = solve(W, hessian, options)
        assert reason in str(solved.fell_back)
        assert torch.equal(solved.codes, rounded.codes)
        assert torch.equal(solved.scales, rounded.scales)


def test_groups_are_runs_of_columns_unless_asked_otherwise() -> None:
    W, H = problem(8, 128, seed=4)
    runs = torch.arange(128, dtype=torch.int32) // 32
    static = SolverOptions(Scheme(4, 32), act_order=True)
    dynamic = dataclasses.replace(static, dynamic_groups=True)
    assert torch.equal(solve(W, H, static).g_idx, runs)
    moved = solve(W, H, dynamic).g_idx
    assert not torch.equal(moved, runs)
    assert torch.equal(moved.bincount(), runs.bincount())
    first = H.diagonal().argsort(descending=True)[:32]
    assert not moved[first].any()
    assert (static.desc_act, dynamic.desc_act) == (False, True)
    assert not SolverOptions(Scheme(4, -1), act_order=True, dynamic_groups=True).desc_act


def test_a_run_repeats() -> None:
    W, H = problem(16, 128, seed=6, dtype=torch.float32)
    first, second = (solve(W, H, SolverOptions(act_order=True)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert first.loss == second.loss


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("mse", [True, False])
def test_grids_suit_float16_and_the_v1_format(bits: int, sym: bool, mse: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(40, 64, generator=generator) * torch.logspace(-7, 3, 40)[:, None]
    w[::3].abs_()
    w[1::6].abs_().neg_()
    w[16] = 0
    scheme = Scheme(bits, 64, sym)
    scale, zero = find_grid(w.T, scheme, torch.ones(64) if mse else None)
    assert torch.equal(scale.half().float(), scale)
    assert (scale > 0).all()
    assert zero.min() >= 1
    assert zero.max() <= scheme.maxq
    codes = to_codes(w, scale[:, None], zero[:, None], scheme.maxq)
    assert codes.min() >= 0
    assert codes.max() <= scheme.maxq
    error = ((codes - zero[:, None]) * scale[:, None] - w).abs()
    if not mse:  # half a step; the symmetric grid has no code for its upper end; float16 is 2^-11 coarse
        normal = scale > 2.0**-14
        assert (error.amax(1) <= scale * (0.5 + bits * 2.0**-8 * sym + scheme.maxq * 2.0**-11))[normal].all()
    assert not error[16].any()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_search_lowers_the_error_of_every_group(bits: int, sym: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(200, 64, generator=generator)
    scheme = Scheme(bits, 64, sym)
    errors = []
    cost = torch.randn(64, generator=generator).mul_(2).exp_()
    for given in (None, torch.ones(64), cost):
        scale, zero = (part[:, None] for part in find_grid(w.T, scheme, given))
        errors.append(((to_codes(w, scale, zero, scheme.maxq) - zero) * scale - w).square() @ cost)
    assert (errors[2] <= errors[0] * (1 + 1e-5)).all()
    assert errors[2].sum() < 0.9 * errors[1].sum()
    assert errors[1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_weight_has_a_code_where_it_counts(bits: int, sign: int) -> None:
    """Of the symmetric grid's ends only the lower one is the range's."""
    w = torch.linspace(-0.5, sign, 64)
    cost = torch.ones(64)
    cost[-1] = 1e6
    for given, most in ((None, 1.0), (cost, 0.05)):
        scale, zero = find_grid(w[:, None], Scheme(bits, 64), given)
        codes = to_codes(w, scale, zero, Scheme(bits, 64).maxq)
        missed = float(((codes[-1] - zero) * scale - sign).abs() / scale)
        assert missed <= most
        assert given is not None or missed > 0.4


def test_refuses_what_has_no_faithful_value() -> None:
    W, H = problem(4, 64, seed=0, dtype=torch.float32)
    for value in (math.nan, math.inf, 1e30):
        broken = W.clone()
        broken[1, 1] = value
        with pytest.raises(QuantizationError):
            solve(broken, H, SolverOptions())
        with pytest.raises(QuantizationError):
            round_to_nearest(broken, SolverOptions())


def test_refuses_what_makes_no_sense() -> None:
    W, H = problem(4, 64, seed=0, dtype=torch.float32)
    for w, h in ((W[0], H), (W, H[:32]), (W, H.double()), (W.to(torch.int8), H), (W[:, :0], H[:0, :0])):
        with pytest.raises(UsageError):
            solve(w, h, SolverOptions())
    for damp in (-0.1, math.nan, math.inf):
        with pytest.raises(UsageError):
            solve(W, H, SolverOptions(damp=damp))


@pytest.mark.cuda
def test_cuda_finds_what_the_cpu_finds() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    W, H = problem(256, 1024, seed=7, dtype=torch.float32)
    for options in (SolverOptions(), SolverOptions(Scheme(3, 64, False), act_order=True)):
        here, there = solve(W, H, options), solve(W.cuda(), H.cuda(), options)
        assert there.codes.device.type == "cuda"
        assert there.loss == pytest.approx(here.loss, rel=0.02)
        assert (there.codes.cpu() == here.codes).float().mean() > 0.9


def test_linears_with_the_same_inputs_share_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    factorize = error_feedback.factorize

    def counted(H: torch.Tensor, *rest: Any) -> error_feedback.Factor | None:
        made.append(len(H))
        return factorize(H, *rest)

    monkeypatch.setattr(error_feedback, "factorize", counted)
    shared, options = error_feedback.shared_factors(), SolverOptions(Scheme(4, 32), act_order=True)
    (W, H), (V, _), (_, other) = (problem(8, 64, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    for weight, hessian, count in ((W, H, 1), (V, H, 1), (V, other, 2), (W, H, 3)):
        found = solve(weight, hessian, options, shared)
        assert len(made) == count
        assert torch.equal(found.codes, solve(weight, hessian, options, factorize).codes)
    solve(W, H, dataclasses.replace(options, damp=0.1), shared)
    solve(W, H, dataclasses.replace(options, act_order=False, damp=0.1), shared)
    assert len(made) == 5


def test_a_shared_factor_goes_with_its_inputs() -> None:
    shared, H = error_feedback.shared_factors(), problem(8, 64, seed=1)[1]
    order = torch.arange(64)
    factor = weakref.ref(shared(H, H.diagonal() == 0, order, 0.05).U)  # type: ignore[union-attr]
    gc.collect()
    assert factor() is not None
    del H
    gc.collect()
    assert factor() is None
