"""The EXL2 solver against the OBQ formula with full inverses, and its fallbacks."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from converters.exl2.grid import find_grid, from_codes, to_codes
from converters.exl2.pack import dequantize, pack
from converters.exl2.settings import Group
from converters.exl2.solver import Problem, Solved, solve
from dsconvert.errors import QuantizationError

F64 = npt.NDArray[np.float64]
MIXES = {
    "2": (Group(2, 64), Group(2, 64)),
    "8-4-3": (Group(8, 32), Group(4, 64), Group(4, 64), Group(3, 32)),
    "6-5 past 128": (Group(6, 32), Group(5, 128), Group(5, 128), Group(5, 64)),
    "3, short": (Group(3, 128), Group(3, 96)),
}


def problem(outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a Hessian of correlated inputs whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * inputs, inputs // 4, generator=generator) @ torch.randn(
        inputs // 4, inputs, generator=generator
    )
    x += 0.5 * torch.randn(x.shape, generator=generator)
    x *= torch.exp(0.7 * torch.randn(inputs, generator=generator))
    return torch.randn(outputs, inputs, generator=generator) * 0.02, 2 / len(x) * x.T @ x


def naive(weights: F64, hessian: F64, groups: tuple[Group, ...], damp: float) -> tuple[F64, F64]:
    """Codes [K, N], rows by activity, and the weights that they stand for [N, K], by the OBQ formula.

    One column at a time: the error over the diagonal of the inverse goes to every column left, and the
    column is eliminated from the inverse (Frantar et al. 2022, equations 2 and 3). What an error costs is
    one over the diagonal of the inverse as it will be then.
    """
    W = weights.copy()
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian)))
    codes, values = np.zeros(W.T.shape), np.zeros_like(W)
    row = 0
    for bits, rows in groups:
        part = order[row : row + rows]
        cost, ahead = [], inverse.copy()
        for k in part:
            cost.append(1 / ahead[k, k])
            ahead -= np.outer(ahead[k], ahead[k]) / ahead[k, k]
        moved = torch.from_numpy(W[:, part].T.astype(np.float32))
        scale = find_grid(moved, bits, torch.tensor(cost).float()).scale
        for k in part:
            q = to_codes(torch.from_numpy(W[:, k].astype(np.float32)), scale, bits)
            codes[row] = q.numpy()
            values[:, k] = from_codes(q, scale, bits).numpy()
            error = (W[:, k] - values[:, k]) / inverse[k, k]
            line = inverse[k].copy()
            left = order[row:]
            W[:, left] -= np.outer(error, line[left])
            inverse -= np.outer(line, line) / line[k]
            row += 1
    return codes, values


@pytest.mark.parametrize("groups", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_the_codes_are_those_of_the_formula(groups: tuple[Group, ...], damp: float) -> None:
    inputs = sum(group.rows for group in groups)
    W, H = problem(24, inputs, seed=inputs)
    solved = solve(W, H, groups, damp)
    codes, values = naive(W.double().numpy(), H.double().numpy(), groups, damp)
    # float32 against float64: a value on the edge of two codes may fall to either, and what follows moves
    same = (solved.codes.numpy() == codes).mean()
    assert same > 0.98, same
    assert solved.loss == pytest.approx(loss_of(W, H, solved.weight), rel=1e-3)
    reference = loss_of(W, H, torch.from_numpy(values).float())
    assert solved.loss == pytest.approx(reference, rel=0.03)
    assert solved.loss < solved.rtn_loss
    assert solved.fell_back is None


def loss_of(W: torch.Tensor, H: torch.Tensor, Q: torch.Tensor) -> float:
    return float(losses_of(W, H, Q).sum())


def losses_of(W: torch.Tensor, H: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """The loss of each output."""
    E = (W - Q).double()
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("groups", MIXES.values(), ids=MIXES.keys())
def test_the_file_stands_for_the_weights_that_were_solved(groups: tuple[Group, ...]) -> None:
    W, H = problem(40, sum(group.rows for group in groups), seed=3)
    solved = solve(W, H, groups)
    packed = pack(*arrays(solved, groups))
    np.testing.assert_array_equal(dequantize(packed, 40), solved.weight.numpy())


def arrays(solved: Solved, groups: tuple[Group, ...]) -> tuple[Any, ...]:
    codes, scales, largest, order = (
        part.numpy() for part in (solved.codes, solved.scales, solved.largest, solved.order)
    )
    return codes, groups, scales, largest, order


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_large_weight_of_a_massive_activation_does_not_spoil_its_output(bits: int, sign: int) -> None:
    W, H = problem(24, 128, seed=9)
    H[5] *= 300
    H[:, 5] *= 300
    W[7, 5] = sign * 3 * W.abs().max()
    groups = (Group(bits, 128),)
    losses = losses_of(W, H, solve(W, H, groups).weight)
    assert losses[7] < 25 * losses.median()  # its steps are three times as wide as those of the others
    with mock.patch.object(Problem, "cost", property(lambda self: torch.ones(128))):
        blind = losses_of(W, H, solve(W, H, groups).weight)
    assert losses[7] < blind[7] / 10


def test_active_inputs_come_first() -> None:
    W, H = problem(8, 128, seed=4)
    solved = solve(W, H, (Group(4, 128),))
    diagonal = H.diagonal()[solved.order]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())


def test_dead_inputs_get_no_weight() -> None:
    W, H = problem(8, 64, seed=5)
    H[10], H[:, 10] = 0, 0
    solved = solve(W, H, (Group(4, 64),))
    assert solved.dead == 1
    assert bool((solved.weight[:, 10] == 0).all())
    assert solved.fell_back is None


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda H: H.fill_(float("nan")), "not finite"),
        (lambda H: H.zero_(), "ever active"),
        (lambda H: H.sub_(2 * torch.diag(H.diagonal())), "positive definite"),
    ],
)
def test_without_a_usable_hessian_weights_are_rounded_to_nearest(spoil: Any, why: str) -> None:
    W, H = problem(8, 64, seed=6)
    spoil(H)
    solved = solve(W, H, (Group(5, 64),))
    assert solved.fell_back is not None
    assert why in solved.fell_back
    step, error = W.abs().amax(1) / 15.5, (W - solved.weight).abs()
    assert bool((error.amax(1) < 1.2 * step).all())  # an outlier may be clipped for the sake of the rest
    assert float(error.square().mean()) < float(step.square().mean()) / 12  # less than 32 even levels leave


def test_weights_that_are_no_numbers_are_refused() -> None:
    W, H = problem(8, 64, seed=7)
    W[0, 0] = math.inf
    with pytest.raises(QuantizationError, match="not finite numbers"):
        solve(W, H, (Group(4, 64),))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_nearly_the_same() -> None:
    W, H = problem(24, 128, seed=8)
    groups = MIXES["2"]
    here, there = solve(W, H, groups), solve(W.cuda(), H.cuda(), groups)
    assert (here.codes == there.codes.cpu()).float().mean() > 0.98
    assert there.loss == pytest.approx(here.loss, rel=0.03)
