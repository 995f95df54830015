"""Error feedback: round a linear's weights column by column so that tr((W-Q) H (W-Q)^T) stays small.

The paper (GPTQ, Frantar et al. 2022, arXiv 2210.17323) walks the columns with the rows of Cholesky(H^-1).
Here H = U D U^T is factored instead, U unit upper triangular: the same codes (QuIP, Chee et al. 2023,
arXiv 2307.13304, theorem 6: LDLQ is OPTQ) from one factorisation, without an inverse. Column i is rounded at
W_i + sum_{j<i} Err_j U_ji, Err = W - Q, and adds D_i (that value - Q_i)^2 to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 128
TRIES = 3  # rungs of the damping ladder
WEAKEST = 1e-6  # least pivot of U D^1/2 over the greatest; below it the factor is noise

# Called before step i with the columns [width, N] of the run that begins there, as far as they have moved.
Find = Callable[[int, "torch.Tensor"], None]
# Called at step i with the values [N] to round; gives what the chosen codes stand for, in new memory.
Round = Callable[[int, "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, eq=False)
class Factor:
    """H + shift = U D U^T in the walk's order; `damp` is the fraction of mean(diag H) that `shift` is."""

    U: torch.Tensor
    D: torch.Tensor
    shift: float
    damp: float


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
    Wt: torch.Tensor, factor: Factor, starts: Mapping[int, int], find: Find, rounded: Round
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of W one by one, `Wt` [K, N] in the walk's order; gives Err [K, N] and losses [N].

    What came before a block of columns reaches it by one matmul. `starts` maps the steps where a run
    begins, for which `find` is to choose a grid, to where it ends, in order; a run has BLOCK columns at the
    most. The losses, of each output, are the diagonal of Err^T (H + shift) Err.
    """
    import torch

    U = factor.U
    Err = torch.empty_like(Wt)
    losses = torch.zeros(Wt.shape[1], dtype=torch.float64, device=Wt.device)
    for i1, i2 in _blocks(len(Wt), starts):
        S = U[:i1, i1:i2].T @ Err[:i1]
        Ub = U[i1:i2, i1:i2].T.contiguous()
        miss = torch.empty_like(S)
        for i in range(i1, i2):
            b = i - i1
            if i in starts:
                part = slice(b, starts[i] - i1)
                pending = S[part] + Ub[part, :b] @ Err[i1:i]
                find(i, Wt[i : starts[i]] + _settled(Ub[part, part], pending))
            w = torch.addmv(S[b], Err[i1:i].T, Ub[b, :b]).add_(Wt[i])
            q = rounded(i, w)
            torch.sub(w, q, out=miss[b])
            torch.sub(Wt[i], q, out=Err[i])
        losses += factor.D[i1:i2] @ miss.square_()
    return Err, losses


def _blocks(inputs: int, starts: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Blocks of BLOCK columns at the most that no run crosses."""
    i1 = 0
    ends = list(starts.values()) or [*range(BLOCK, inputs, BLOCK), inputs]
    for end, following in zip(ends, [*ends[1:], inputs + BLOCK + 1], strict=True):
        if following - i1 > BLOCK:
            yield i1, end
            i1 = end


def _settled(Ug: torch.Tensor, pending: torch.Tensor) -> torch.Tensor:
    """What a whole run moves by when its columns, still free, make up for all errors before it."""
    import torch

    moved: torch.Tensor = torch.linalg.solve_triangular(Ug, pending, upper=False, unitriangular=True)
    return moved


def rounding_loss(error: torch.Tensor, factor: Factor) -> float:
    """The loss without damping of errors [K, N] in the walk's order, by sums of squares."""
    import torch

    losses = torch.zeros(error.shape[1], dtype=torch.float64, device=error.device)
    for i1 in range(0, error.shape[0], BLOCK):
        i2 = min(i1 + BLOCK, error.shape[0])
        losses += factor.D[i1:i2] @ (factor.U[:i2, i1:i2].T @ error[:i2]).square_()
    return undamped(losses, error, factor)


def undamped(losses: torch.Tensor, error: torch.Tensor, factor: Factor) -> float:
    """The loss without damping, given the losses of each output [N] with it and the errors [K, N]."""
    import torch

    squares = torch.zeros_like(losses)
    for i in range(0, len(error), BLOCK):
        squares += error[i : i + BLOCK].square().sum(0)
    return float((losses - factor.shift * squares).clamp_(min=0).sum())


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
