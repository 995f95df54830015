"""GPTQ's error feedback on EXL2's grid: rows in order of activity, each group's scales found on the way.

The scales are chosen by the walk's own loss: a squared error of row i costs D_i
(dsconvert/quantization/error_feedback.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.exl2.grid import Grid, find_grid, from_codes, to_codes
from converters.exl2.settings import Group
from dsconvert.errors import QuantizationError
from dsconvert.quantization import error_feedback

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Solved:
    """A quantized linear of K inputs, N outputs and G groups, rows in the order of activity.

    `codes` uint8 [K, N], `scales` uint8 [G, N] (scale codes), `largest` float16 [G], `order` int64 [K], the
    input of each row; `weight` float32 [N, K] is what the file stands for. `loss` is
    tr((W-Q) H (W-Q)^T) with the undamped H, `rtn_loss` that of rounding to nearest with the same scales.
    `damp` is the fraction that was used, `dead` the number of inputs that were never active. `fell_back`
    says why the codes are plain round-to-nearest; None when they are not.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    largest: torch.Tensor
    order: torch.Tensor
    weight: torch.Tensor
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    fell_back: str | None


@dataclass(frozen=True, eq=False)
class Problem:
    """A linear ready to be walked: W^T [K, N] in the order of activity, its factor or why there is none."""

    Wt: torch.Tensor
    order: torch.Tensor
    factor: error_feedback.Factor | None
    dead: int
    why: str

    @property
    def cost(self) -> torch.Tensor:
        """What a squared rounding error in each row adds to the walk's loss: [K]; 1 without a factor."""
        return self.Wt.new_ones(len(self.Wt)) if self.factor is None else self.factor.D


def prepare(
    W: torch.Tensor,
    H: torch.Tensor,
    damp: float,
    factorize: error_feedback.Factorize = error_feedback.factorize,
) -> Problem:
    """Order the inputs of W [N, K] by the diagonal of H [K, K] = 2/n X^T X, and factor H in that order.

    Inputs that were never active get weight 0. Raises QuantizationError for weights that are not finite.
    """
    if not bool(W.isfinite().all()):
        raise QuantizationError(
            "has weights that are not finite numbers",
            hint="Fetch the checkpoint again; a training that diverged cannot be quantized",
        )
    diagonal = H.diagonal()
    order = diagonal.nan_to_num().argsort(descending=True, stable=True)
    if not bool(H.isfinite().all()):
        return Problem(W.T[order].contiguous(), order, None, 0, "the Hessian is not finite")
    dead = diagonal == 0
    if bool(dead.all()):
        why = "no input of this linear was ever active"
        return Problem(W.T[order].contiguous(), order, None, int(dead.sum()), why)
    Wt = W.masked_fill(dead, 0).T[order].contiguous()
    factor = factorize(H, dead, order, damp)
    why = "" if factor else "the Hessian is not positive definite at any damping"
    return Problem(Wt, order, factor, int(dead.sum()), why)


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
    groups: Sequence[Group],
    damp: float = 0.05,
    factorize: error_feedback.Factorize = error_feedback.factorize,
) -> Solved:
    """Quantize W [N, K] to `groups` of rows so that tr((W-Q) H (W-Q)^T) is small.

    Both float32 on one device; neither is changed. Where H cannot be factored, or where rounding to nearest
    does better, the codes are those of round-to-nearest and `fell_back` says so. Raises QuantizationError
    for weights that are not finite or too large.
    """
    problem = prepare(W, H, damp, factorize)
    if problem.factor is None:
        plain = _nearest(problem, groups)
        loss = error_feedback.loss(problem.Wt - plain.values, H[problem.order][:, problem.order])
        return _solved(problem, plain, loss, loss, 0.0, problem.why)
    factor = problem.factor
    walked, loss = _walk(problem, factor, groups)
    plain = _nearest(problem, groups, walked.grids)
    rtn_loss = error_feedback.rounding_loss(problem.Wt - plain.values, factor)
    if not loss <= rtn_loss:
        why = f"its loss {loss:.4g} is above round-to-nearest's"
        return _solved(problem, plain, rtn_loss, rtn_loss, factor.damp, why)
    return _solved(problem, walked, loss, rtn_loss, factor.damp, None)


@dataclass(frozen=True, eq=False)
class _Rounded:
    """Codes [K, N], what they stand for, and the grid of each group."""

    codes: torch.Tensor
    values: torch.Tensor
    grids: list[Grid]


def _walk(problem: Problem, factor: error_feedback.Factor, groups: Sequence[Group]) -> tuple[_Rounded, float]:
    """What the walk chooses, and its loss without the damping."""
    Wt, cost = problem.Wt, problem.cost
    starts = _starts(groups)
    bits = {start: group.bits for start, group in zip(starts, groups, strict=True)}
    grids: list[Grid] = []

    def grid_of(run: slice, moved: Callable[[], torch.Tensor]) -> error_feedback.Grid:
        maxq = (1 << bits[run.start]) - 1
        grids.append(find_grid(moved(), bits[run.start], cost[run]))
        scale = grids[-1].scale[None]
        zero = scale.new_full(scale.shape, (maxq + 1) // 2)
        return error_feedback.Grid(scale, zero, [0] * (run.stop - run.start), maxq, half=True)

    codes, loss = error_feedback.walk(Wt, factor, list(starts.values()), grid_of)
    return _Rounded(codes, _values(codes, grids, groups), grids), loss


def _values(codes: torch.Tensor, grids: Sequence[Grid], groups: Sequence[Group]) -> torch.Tensor:
    """What codes [K, N] stand for."""
    import torch

    values = torch.empty(codes.shape, device=codes.device)
    for (start, end), grid, group in zip(_starts(groups).items(), grids, groups, strict=True):
        values[start:end] = from_codes(codes[start:end], grid.scale, group.bits)
    return values


def _nearest(problem: Problem, groups: Sequence[Group], grids: list[Grid] | None = None) -> _Rounded:
    """Each weight to its nearest code, on `grids` or on those of the unmoved weights."""
    import torch

    Wt, cost = problem.Wt, problem.cost
    codes = torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device)
    found: list[Grid] = []
    for (start, end), group in zip(_starts(groups).items(), groups, strict=True):
        part = Wt[start:end]
        found.append(grids[len(found)] if grids else find_grid(part, group.bits, cost[start:end]))
        codes[start:end] = to_codes(part, found[-1].scale, group.bits)
    return _Rounded(codes, _values(codes, found, groups), found)


def _starts(groups: Sequence[Group]) -> dict[int, int]:
    """Where each group starts, and where it ends."""
    starts, row = {}, 0
    for group in groups:
        starts[row] = row + group.rows
        row += group.rows
    return starts


def _solved(
    problem: Problem, rounded: _Rounded, loss: float, rtn_loss: float, damp: float, fell_back: str | None
) -> Solved:
    import torch

    return Solved(
        codes=rounded.codes,
        scales=torch.stack([grid.codes for grid in rounded.grids]),
        largest=torch.stack([grid.largest for grid in rounded.grids]),
        order=problem.order,
        weight=rounded.values[problem.order.argsort()].T.contiguous(),
        loss=loss if math.isfinite(loss) else math.nan,
        rtn_loss=rtn_loss if math.isfinite(rtn_loss) else math.nan,
        damp=damp,
        dead=problem.dead,
        fell_back=fell_back,
    )
