"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round a linear's weights to a grid, column by column.

The paper walks the columns with the rows of Cholesky(H^-1). Here H = U D U^T is factored instead, U unit
upper triangular: the same codes (QuIP, Chee et al. 2023, arXiv 2307.13304, theorem 6: LDLQ is OPTQ) from one
factorisation, without an inverse. Column i is rounded at W_i + sum_{j<i} Err_j U_ji, Err = W - Q, and adds
D_i (that value - Q_i)^2 to the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from converters.gptq.grid import Scheme, find_grid, to_codes
from dsconvert.errors import QuantizationError, UsageError

if TYPE_CHECKING:
    import torch

BLOCK = 128
TRIES = 3  # rungs of the damping ladder
WEAKEST = 1e-6  # least pivot of U D^1/2 over the greatest; below it the factor is noise


@dataclass(frozen=True)
class Options:
    """How to solve. `damp` is a fraction of the mean of H's diagonal, added to it.

    With `act_order` the columns of largest diagonal go first; groups stay runs of original columns with
    scales found beforehand, unless `dynamic_groups` makes them of columns as they are walked (then the
    file needs desc_act). Without `act_order` a group's scales are found when the walk reaches it.
    """

    scheme: Scheme = field(default_factory=Scheme)
    act_order: bool = False
    dynamic_groups: bool = False
    damp: float = 0.01
    mse: bool = False

    @property
    def desc_act(self) -> bool:
        """Whether groups are no runs of original columns, which the file must say."""
        return self.act_order and self.dynamic_groups and self.scheme.group_size != -1


@dataclass(frozen=True, eq=False)
class Solved:
    """A quantized linear of K inputs, N outputs and G groups, laid out as the file has it.

    `codes` uint8 [K, N], `scales` float16 [G, N], `zeros` uint8 [G, N], `g_idx` int32 [K]. `loss` is
    tr((W-Q) H (W-Q)^T) with the undamped H, `rtn_loss` that of round-to-nearest. `damp` is the fraction
    that was used, `dead` the number of inputs that were never active. `fell_back` says why the codes are
    plain round-to-nearest; None when they are not.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    fell_back: str | None

    def dequantized(self) -> torch.Tensor:
        """The weights that the file stands for: float32 [N, K]."""
        scales, zeros = self.scales.float()[self.g_idx], self.zeros.float()[self.g_idx]
        return (self.codes.float().sub_(zeros).mul_(scales)).T.contiguous()


@dataclass(frozen=True, eq=False)
class _Factor:
    """H + shift = U D U^T in the walk's order; `damp` is the fraction that `shift` came from."""

    U: torch.Tensor
    D: torch.Tensor
    shift: float
    damp: float


@dataclass(frozen=True, eq=False)
class _Order:
    """The walk: original column of each step, its group, and the steps where a grid is found (to where)."""

    columns: torch.Tensor
    group: list[int]
    starts: dict[int, int]


def solve(W: torch.Tensor, H: torch.Tensor, options: Options) -> Solved:
    """Quantize W [N, K] so that tr((W-Q) H (W-Q)^T) is small, for H [K, K] = 2/n X^T X of its inputs.

    Both on one device and in one floating-point type, float32 as a rule; neither is changed. Inputs that
    were never active (H_ii = 0) get weight 0. Damping grows tenfold, twice at the most, where H is not
    positive definite; then, or where H is not finite, or where the result is no better, the codes are
    those of round-to-nearest and `fell_back` says so. Raises QuantizationError for weights that are not
    finite or too large, UsageError for shapes or options that make no sense.
    """
    _check(W, H, options)
    if not bool(H.isfinite().all()):
        return _plain(round_to_nearest(W, options), math.nan, "the Hessian is not finite")
    dead = H.diagonal() == 0
    if bool(dead.all()):
        return _plain(round_to_nearest(W, options), 0.0, "no input of this linear was ever active")
    W = W.masked_fill(dead, 0)
    rounded = replace(round_to_nearest(W, options), dead=int(dead.sum()))
    error = (W - rounded.dequantized()).T
    order = _order(H.diagonal(), options)
    factor = _factor(H, dead, order.columns, options.damp)
    if factor is None:
        return _plain(rounded, _loss(error, H), "the Hessian is not positive definite at any damping")
    rtn_loss = _undamped(_damped_loss(error[order.columns], factor), error, factor)
    del error
    solved = replace(_walk(W, factor, order, options, rounded), rtn_loss=rtn_loss)
    if not solved.loss <= rtn_loss:
        return _plain(rounded, rtn_loss, f"its loss {solved.loss:.4g} is above round-to-nearest's")
    return solved


def round_to_nearest(W: torch.Tensor, options: Options) -> Solved:
    """Quantize W [N, K] without calibration: each weight to its nearest code, groups of original columns.

    The losses are NaN. Raises QuantizationError and UsageError as `solve` does.
    """
    import torch

    _check(W, None, options)
    scheme, (outputs, inputs) = options.scheme, W.shape
    scales, zeros = _static_grids(W, options)
    g_idx = torch.arange(inputs, device=W.device) // scheme.width(inputs)
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=W.device)
    for group in range(scales.shape[0]):
        part = slice(group * scheme.width(inputs), (group + 1) * scheme.width(inputs))
        codes[part] = to_codes(W[:, part].T, scales[group], zeros[group], scheme.maxq)
    return Solved(
        codes, scales.half(), zeros.byte(), g_idx.int(), math.nan, math.nan, damp=0.0, dead=0, fell_back=None
    )


def _check(W: torch.Tensor, H: torch.Tensor | None, options: Options) -> None:
    if W.ndim != 2 or not W.is_floating_point() or not W.numel():
        raise UsageError(f"a linear's weight is no {W.dtype} tensor of shape {list(W.shape)}")
    if H is not None and (H.shape != (W.shape[1],) * 2 or H.dtype != W.dtype or H.device != W.device):
        raise UsageError(
            f"a Hessian of shape {list(H.shape)}, {H.dtype}, {H.device} does not fit the weight",
            why=f"The weight has shape {list(W.shape)}, {W.dtype}, {W.device}",
        )
    if not 0 <= options.damp < math.inf:
        raise UsageError(f"a damping of {options.damp} makes no sense", hint="Give --damp 0.01 or the like")
    if not bool(W.isfinite().all()):
        raise QuantizationError(
            "has weights that are no finite numbers",
            hint="Fetch the checkpoint again; a training that diverged cannot be quantized",
        )


def _plain(rounded: Solved, loss: float, why: str) -> Solved:
    return replace(rounded, loss=loss, rtn_loss=loss, fell_back=why)


def _order(diagonal: torch.Tensor, options: Options) -> _Order:
    import torch

    inputs, device = diagonal.shape[0], diagonal.device
    width = options.scheme.width(inputs)
    natural = torch.arange(inputs, device=device)
    columns = diagonal.argsort(descending=True, stable=True) if options.act_order else natural
    runs = not options.act_order or options.desc_act  # groups are runs of steps, not only of columns
    group = ((natural if runs else columns) // width).tolist()
    found_before = not runs or width == inputs
    starts = {} if found_before else {i: min(i + width, inputs) for i in range(0, inputs, width)}
    return _Order(columns, group, starts)


def _static_grids(W: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of the runs of original columns: two tensors [G, N]."""
    import torch

    (outputs, inputs), width = W.shape, options.scheme.width(W.shape[1])
    full = inputs // width
    grouped = W[:, : full * width].reshape(outputs, full, width)
    scale, zero = find_grid(grouped, options.scheme, options.mse)
    if full * width < inputs:
        short = find_grid(W[:, None, full * width :], options.scheme, options.mse)
        scale, zero = torch.cat((scale, short[0]), 1), torch.cat((zero, short[1]), 1)
    return scale.T.contiguous(), zero.T.contiguous()


def _factor(H: torch.Tensor, dead: torch.Tensor, columns: torch.Tensor, damp: float) -> _Factor | None:
    """Factor the damped H in the walk's order, in float64; None when no rung of the ladder will do."""
    import torch

    mean = float(H.diagonal().double().sum()) / int((~dead).sum())
    flipped = columns.flip(0)
    for rung in range(TRIES):
        fraction = damp * 10**rung if damp else (0.0, 0.01, 0.1)[rung]
        # Cholesky of the matrix with rows and columns reversed is an upper factor of the matrix itself.
        A = H[flipped][:, flipped].double()
        A.diagonal().add_(dead[flipped].double()).add_(fraction * mean)
        L, info = torch.linalg.cholesky_ex(A)
        del A
        pivots = L.diagonal().clone()
        if int(info) == 0 and float(pivots.min()) > WEAKEST * float(pivots.max()):
            U = L.div_(pivots).flip(0, 1).to(H.dtype)
            return _Factor(U, pivots.flip(0).square().to(H.dtype), fraction * mean, fraction)
    return None


def _walk(W: torch.Tensor, factor: _Factor, order: _Order, options: Options, rounded: Solved) -> Solved:
    """The columns in order, in blocks: what came before a block reaches it by one matmul.

    Grids that are not found on the way are those of `rounded`, of which the result is a copy.
    """
    import torch

    (outputs, inputs), U = W.shape, factor.U
    scales, zeros = rounded.scales.to(W.dtype), rounded.zeros.to(W.dtype)
    Wt = W.T[order.columns].contiguous()
    Err = torch.empty_like(Wt)
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=W.device)
    total = 0.0
    for i1 in range(0, inputs, BLOCK):
        i2 = min(i1 + BLOCK, inputs)
        S = U[:i1, i1:i2].T @ Err[:i1]
        Ub = U[i1:i2, i1:i2].T.contiguous()
        miss = torch.empty_like(S)
        for i in range(i1, i2):
            b, g = i - i1, order.group[i]
            if i in order.starts:
                part = slice(b, order.starts[i] - i1)
                pending = S[part] + Ub[part, :b] @ Err[i1:i]
                current = Wt[i : order.starts[i]] + _settled(Ub[part, part], pending)
                scales[g], zeros[g] = find_grid(current.T, options.scheme, options.mse)
            w = torch.addmv(S[b], Err[i1:i].T, Ub[b, :b]).add_(Wt[i])
            q = to_codes(w, scales[g], zeros[g], options.scheme.maxq)
            codes[i] = q
            q.sub_(zeros[g]).mul_(scales[g])
            torch.sub(w, q, out=miss[b])
            torch.sub(Wt[i], q, out=Err[i])
        total += float((miss.square_().sum(1, dtype=torch.float64) * factor.D[i1:i2]).sum())
    inverse = order.columns.argsort()
    loss = _undamped(total, Err, factor)
    g_idx = torch.tensor(order.group, device=W.device)[inverse]
    return replace(
        rounded,
        codes=codes[inverse],
        scales=scales.half(),
        zeros=zeros.byte(),
        g_idx=g_idx.int(),
        loss=loss,
        damp=factor.damp,
    )


def _settled(Ug: torch.Tensor, pending: torch.Tensor) -> torch.Tensor:
    """What a whole group moves by when its columns, still free, make up for all errors before it."""
    import torch

    moved: torch.Tensor = torch.linalg.solve_triangular(Ug, pending, upper=False, unitriangular=True)
    return moved


def _damped_loss(error: torch.Tensor, factor: _Factor) -> float:
    """tr(E (H + shift) E^T) for errors [K, N] in the walk's order, as a sum of squares."""
    import torch

    total = 0.0
    for i1 in range(0, error.shape[0], BLOCK):
        i2 = min(i1 + BLOCK, error.shape[0])
        part = (factor.U[:i2, i1:i2].T @ error[:i2]).square_().sum(1, dtype=torch.float64)
        total += float((part * factor.D[i1:i2]).sum())
    return total


def _undamped(total: float, error: torch.Tensor, factor: _Factor) -> float:
    """The loss without damping, given the loss with it."""
    import torch

    return max(total - factor.shift * float(error.square().sum(dtype=torch.float64)), 0.0)


def _loss(error: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H E^T) in float64 for errors [K, N]."""
    e = error.double()
    return float((H.double() @ e).mul_(e).sum())
