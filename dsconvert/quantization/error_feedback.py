"""Error feedback: round a linear's weights column by column so that tr((W-Q) H (W-Q)^T) stays small.

The paper (GPTQ, Frantar et al. 2022, arXiv 2210.17323) walks the columns with the rows of Cholesky(H^-1).
Here H = U D U^T is factored instead, U unit upper triangular: the same codes (QuIP, Chee et al. 2023,
arXiv 2307.13304, theorem 6: LDLQ is OPTQ) from one factorisation, without an inverse. Column i is rounded at
W_i + sum_{j<i} Err_j U_ji, Err = W - Q, and adds D_i (that value - Q_i)^2 to the loss.
"""

from __future__ import annotations

import weakref
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BLOCK = 128
TRIES = 3  # rungs of the damping ladder
WEAKEST = 1e-6  # least pivot of U D^1/2 over the greatest; below it the factor is noise


@dataclass(frozen=True, eq=False)
class Grid:
    """What columns are rounded to: scale * (code - zero) + low, code 0 ... maxq, or scale * values[code].

    `scale`, `zero` and `low` [G, N], of the weights' type, `low` only where it is not 0; column i of a run is
    on row group[i]. With `half` it is rounded to float16.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    group: Sequence[int]
    maxq: int
    half: bool = False
    low: torch.Tensor | None = None
    values: tuple[float, ...] = ()


# Gives the grid of a run of columns, when the walk has come to it; the function given with it tells what the
# columns [width, N] would be if they, still free, made up for all errors before them.
GridOf = Callable[[slice, Callable[[], "torch.Tensor"]], Grid]


@dataclass(frozen=True, eq=False)
class Factor:
    """H + shift = U D U^T in the walk's order; `damp` is the fraction of mean(diag H) that `shift` is."""

    U: torch.Tensor
    D: torch.Tensor
    shift: float
    damp: float


# As `factorize`.
Factorize = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", float], "Factor | None"]


def factorize(H: torch.Tensor, dead: torch.Tensor, columns: torch.Tensor, damp: float) -> Factor | None:
    """Factor the damped H [K, K] in the order `columns`, in float64; None when no rung of the ladder will do.

    `dead` bool [K] are the inputs that were never active; their pivots are 1. Damping grows tenfold, twice
    at the most, where H is not positive definite.
    """

    mean = float(H.diagonal().double().sum()) / int((~dead).sum())
    flipped = columns.flip(0)
    for rung in range(TRIES):
        fraction = damp * 10**rung if damp else (0.0, 0.01, 0.1)[rung]
        L, failed = _cholesky(H, flipped, dead, fraction * mean)
        pivots = L.diagonal().clone()
        if not failed and float(pivots.min()) > WEAKEST * float(pivots.max()):
            U = L.div_(pivots).to(H.dtype)
            del L  # before U is turned round: a second float64 matrix would be the peak of the whole solve
            return Factor(U.flip(0, 1), pivots.flip(0).square().to(H.dtype), fraction * mean, fraction)
    return None


def shared_factors() -> Factorize:
    """`factorize` for linears one after the other: those with the same inputs, one H, share a factor.

    The last one is kept until another H comes, or until its own is dropped.
    """
    import torch

    kept: list[tuple[weakref.ref[torch.Tensor], torch.Tensor, float, Factor | None]] = []

    def found(H: torch.Tensor, dead: torch.Tensor, columns: torch.Tensor, damp: float) -> Factor | None:
        for own, order, fraction, factor in kept:
            if own() is H and fraction == damp and torch.equal(order, columns):
                return factor
        kept.clear()  # before the next one takes its memory
        factor = factorize(H, dead, columns, damp)
        kept.append((weakref.ref(H, lambda _: kept.clear()), columns, damp, factor))
        return factor

    return found


def _cholesky(
    H: torch.Tensor, flipped: torch.Tensor, dead: torch.Tensor, shift: float
) -> tuple[torch.Tensor, bool]:
    """The lower factor of the damped H in float64, in the order `flipped`, and whether it failed.

    Cholesky of a matrix with rows and columns reversed is an upper factor of the matrix itself. One float64
    matrix is all that it takes: LAPACK's layout is the transpose's, so the factor replaces the matrix.
    """
    import torch

    A = torch.empty(H.shape, dtype=torch.float64, device=H.device)
    for start in range(0, len(A), BLOCK):
        rows = flipped[start : start + BLOCK]
        A[start : start + BLOCK] = H[rows[:, None], flipped]
    A.diagonal().add_(dead[flipped].double()).add_(shift)
    info = torch.empty(0, dtype=torch.int32, device=H.device)
    torch.linalg.cholesky_ex(A.mT, out=(A.mT, info))
    return A.mT, bool(info)


def walk(
    Wt: torch.Tensor, factor: Factor, ends: Sequence[int], grid_of: GridOf
) -> tuple[torch.Tensor, float]:
    """Round the columns of W one by one, `Wt` [K, N] in the walk's order; returns codes [K, N] and the loss.

    As `walk_rows`; the loss is the sum of the outputs'.
    """
    codes, _, losses = walk_rows(Wt, factor, ends, grid_of)
    return codes, float(losses.sum())


def walk_rows(
    Wt: torch.Tensor, factor: Factor, ends: Sequence[int], grid_of: GridOf
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [K, N], errors Err = W - Q [K, N] and losses [N], float64, of the walk; `Wt` [K, N] in its order.

    What came before a block of columns reaches it by one matmul. `ends` are the steps where runs of columns
    end, BLOCK in each at the most. The loss is Err^T H Err, without the damping.
    """
    import torch

    U, D = factor.U, factor.D
    Err, codes = torch.empty_like(Wt), torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device)
    losses = torch.zeros(Wt.shape[1], dtype=torch.float64, device=Wt.device)
    for i1, i2 in _blocks(ends):
        S = U[:i1, i1:i2].T @ Err[:i1]
        for j1, j2 in _runs(i1, i2, ends):
            run = slice(j1, j2)
            S1, U1 = S[j1 - i1 : j2 - i1].addmm_(U[i1:j1, run].T, Err[i1:j1]), U[run, run].contiguous()
            grid = grid_of(run, partial(_settled, Wt[run], S1, U1))
            _round(S1.add_(Wt[run]), Wt[run], U1, D[run], factor.shift, grid, codes[run], Err[run], losses)
    return codes, Err, losses.clamp_(min=0)


def _blocks(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Blocks of BLOCK columns at the most that no run crosses."""
    i1 = 0
    for end, following in zip(ends, [*ends[1:], ends[-1] + BLOCK + 1], strict=True):
        if following - i1 > BLOCK:
            yield i1, end
            i1 = end


def _runs(i1: int, i2: int, ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of a block."""
    inside = ends[bisect(ends, i1) : bisect(ends, i2)]
    return zip([i1, *inside], inside, strict=False)


def _settled(W: torch.Tensor, S: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
    """W and what a whole run moves by when its columns, still free, make up for all errors S before it."""
    import torch

    moved: torch.Tensor = torch.linalg.solve_triangular(U.T, S, upper=False, unitriangular=True)
    return moved.add_(W)


def _round(
    W1: torch.Tensor,
    W: torch.Tensor,
    U: torch.Tensor,
    D: torch.Tensor,
    shift: float,
    grid: Grid,
    codes: torch.Tensor,
    Err: torch.Tensor,
    losses: torch.Tensor,
) -> None:
    """Round the columns of a run, W1 [width, N]: W with the errors before the run made up for.

    Writes `codes` and `Err`, and adds each output's loss without the damping `shift` to `losses`.
    """
    if W.device.type == "cpu":
        from dsconvert.quantization.kernels import by_outputs
        from dsconvert.quantization.kernels.sweep import sweep

        group = np.asarray(grid.group, np.int64)
        low = grid.scale[:, :0] if grid.low is None else grid.low
        values = W.new_tensor(grid.values)
        rest = (grid.scale, grid.zero, low, values, group, grid.maxq, grid.half, codes, Err, losses)
        by_outputs(sweep, W.shape[1], W1, W, U, D, shift, *rest)
    else:
        round_by_torch(W1, W, U, D, shift, grid, codes, Err, losses)


def round_by_torch(
    W1: torch.Tensor,
    W: torch.Tensor,
    U: torch.Tensor,
    D: torch.Tensor,
    shift: float,
    grid: Grid,
    codes: torch.Tensor,
    Err: torch.Tensor,
    losses: torch.Tensor,
) -> None:
    """As `kernels.sweep.sweep`, on any device."""
    import torch

    miss, Ut = torch.empty_like(W1), U.T.contiguous()
    for i, g in enumerate(grid.group):
        w = torch.addmv(W1[i], Err[:i].T, Ut[i, :i])
        codes[i], q = nearest(w, grid, g)
        q = q.half().to(q.dtype) if grid.half else q
        torch.sub(w, q, out=miss[i])
        torch.sub(W[i], q, out=Err[i])
    losses += D @ miss.square_() - shift * Err.square().sum(0)


def nearest(w: torch.Tensor, grid: Grid, g: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of `w` [N] on row g of the grid, in its dtype, and what they stand for."""
    import torch

    scale, none = grid.scale[g], grid.scale[g] == 0  # where a scale is 0 all codes are alike
    if grid.values:
        values = w.new_tensor(grid.values)
        edges = (values[1:] + values[:-1]) * 0.5
        q = torch.searchsorted(edges, (w / scale).masked_fill(none, 0).contiguous(), right=True)
        return q.to(w.dtype), values[q].mul_(scale)
    low = 0.0 if grid.low is None else grid.low[g]
    q = ((w - low) / scale).round_().add_(grid.zero[g]).clamp_(0, grid.maxq).where(~none, grid.zero[g])
    value = (q - grid.zero[g]).mul_(scale)
    return q, value if grid.low is None else value.add_(low)


def rounding_loss(error: torch.Tensor, factor: Factor) -> float:
    """The loss without damping of errors [K, N] in the walk's order, by sums of squares."""
    return float(rounding_losses(error, factor).sum())


def rounding_losses(error: torch.Tensor, factor: Factor) -> torch.Tensor:
    """As `rounding_loss`, of each output: float64 [N]."""
    import torch

    losses = torch.zeros(error.shape[1], dtype=torch.float64, device=error.device)
    for i1 in range(0, len(error), BLOCK):
        i2 = min(i1 + BLOCK, len(error))
        losses += factor.D[i1:i2] @ (factor.U[:i2, i1:i2].T @ error[:i2]).square_()
        losses -= factor.shift * error[i1:i2].square().sum(0)
    return losses.clamp_(min=0)


def both_losses(
    error: torch.Tensor, factor: Factor, columns: torch.Tensor, dead: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses [N] of errors [K, N] without the damping and with it; `columns` is the factor's order.

    Sets the errors of `dead` inputs to 0: the factor gives an input without any activity a pivot of 1.
    """
    import torch

    damping = error.square().sum(0, dtype=torch.float64) * factor.shift
    error[dead] = 0
    losses = rounding_losses(error[columns], factor)
    return losses, losses + damping


def row_losses(factor: Factor) -> torch.Tensor:
    """What a squared rounding error at each step adds to the undamped loss, errors being independent: [K].

    Err = R U^-1 for roundings R, so tr(Err H Err^T) is the sum of R_i^2 (D_i - shift |row i of U^-1|^2).
    """
    import torch

    eye = torch.eye(len(factor.U), dtype=factor.U.dtype, device=factor.U.device)
    inverse = torch.linalg.solve_triangular(factor.U, eye, upper=True, unitriangular=True)
    losses: torch.Tensor = (factor.D - factor.shift * inverse.square_().sum(1)).clamp_(min=0)
    return losses


def loss(error: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H E^T) in float64 for errors [K, N]."""
    e = error.double()
    return float((H.double() @ e).mul_(e).sum())
