"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round a linear's weights to a grid with error feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dsconvert.errors import QuantizationError, UsageError
from dsconvert.quantization import error_feedback
from dsconvert.quantization.gptq_grid import Scheme, find_grid, to_codes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SolverOptions:
    """How to solve. `damp` is a fraction of the mean of H's diagonal, added to it.

    With `act_order` the columns of largest diagonal go first; groups stay runs of original columns with
    scales found beforehand, unless `dynamic_groups` makes them of columns as they are walked (then the
    file needs desc_act). Without `act_order` a group's scales are found when the walk reaches it. With `mse`
    each range is that whose rounding costs least; without it, that from the least to the greatest weight.
    """

    scheme: Scheme = field(default_factory=Scheme)
    act_order: bool = False
    dynamic_groups: bool = False
    damp: float = 0.05
    mse: bool = True

    @property
    def desc_act(self) -> bool:
        """Whether groups are no runs of original columns, which the file must say."""
        return self.act_order and self.dynamic_groups and self.scheme.group_size != -1

    @property
    def static_groups(self) -> bool:
        """Whether columns are walked out of their groups' order, on grids found beforehand."""
        return self.act_order and not self.dynamic_groups and self.scheme.group_size != -1


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
class _Order:
    """The walk: original column of each step, its group, and the steps where a grid is found (to where)."""

    columns: torch.Tensor
    group: list[int]
    starts: dict[int, int]


def solve(W: torch.Tensor, H: torch.Tensor, options: SolverOptions) -> Solved:
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
    W = W.masked_fill(dead, 0) if bool(dead.any()) else W
    order = _order(H.diagonal(), options)
    factor = error_feedback.factorize(H, dead, order.columns, options.damp)
    if factor is None:
        rounded = replace(round_to_nearest(W, options), dead=int(dead.sum()))
        loss = error_feedback.loss((W - rounded.dequantized()).T, H)
        return _plain(rounded, loss, "the Hessian is not positive definite at any damping")
    rounded = replace(round_to_nearest(W, options, H.diagonal()), dead=int(dead.sum()))
    rtn_loss = error_feedback.rounding_loss((W - rounded.dequantized()).T[order.columns], factor)
    solved = _walk(W, factor, order, options, rounded)
    if not solved.loss <= rtn_loss:
        return _plain(rounded, rtn_loss, f"its loss {solved.loss:.4g} is above round-to-nearest's")
    return replace(solved, rtn_loss=rtn_loss)


def round_to_nearest(W: torch.Tensor, options: SolverOptions, cost: torch.Tensor | None = None) -> Solved:
    """Quantize W [N, K] without feedback: each weight to its nearest code, groups of original columns.

    `cost` [K] is what a squared error of each input costs; without it, one is as bad as another. The losses
    are NaN. Raises QuantizationError and UsageError as `solve` does.
    """
    import torch

    _check(W, None, options)
    scheme, inputs = options.scheme, W.shape[1]
    scales, zeros = _static_grids(W, options, cost)
    g_idx = torch.arange(inputs, device=W.device) // scheme.width(inputs)
    codes = torch.empty(W.T.shape, dtype=torch.uint8, device=W.device)
    for group, part in enumerate(_runs(inputs, scheme)):
        codes[part] = to_codes(W[:, part].T, scales[group], zeros[group], scheme.maxq)
    return Solved(
        codes, scales.half(), zeros.byte(), g_idx.int(), math.nan, math.nan, damp=0.0, dead=0, fell_back=None
    )


def _check(W: torch.Tensor, H: torch.Tensor | None, options: SolverOptions) -> None:
    if W.ndim != 2 or not W.is_floating_point() or not W.numel():
        raise UsageError(f"a linear's weight is no {W.dtype} tensor of shape {list(W.shape)}")
    if H is not None and (H.shape != (W.shape[1],) * 2 or H.dtype != W.dtype or H.device != W.device):
        raise UsageError(
            f"a Hessian of shape {list(H.shape)}, {H.dtype}, {H.device} does not fit the weight",
            why=f"The weight has shape {list(W.shape)}, {W.dtype}, {W.device}",
        )
    if not 0 <= options.damp < math.inf:
        raise UsageError(f"a damping of {options.damp} makes no sense", hint="Give --damp 0.05 or the like")
    if not bool(W.isfinite().all()):
        raise QuantizationError(
            "has weights that are no finite numbers",
            hint="Fetch the checkpoint again; a training that diverged cannot be quantized",
        )


def _plain(rounded: Solved, loss: float, why: str) -> Solved:
    return replace(rounded, loss=loss, rtn_loss=loss, fell_back=why)


def _order(diagonal: torch.Tensor, options: SolverOptions) -> _Order:
    import torch

    inputs, device = diagonal.shape[0], diagonal.device
    width = options.scheme.width(inputs)
    natural = torch.arange(inputs, device=device)
    columns = diagonal.argsort(descending=True, stable=True) if options.act_order else natural
    group = ((columns if options.static_groups else natural) // width).tolist()
    found_before = options.static_groups or width == inputs
    starts = {} if found_before else {run.start: run.stop for run in _runs(inputs, options.scheme)}
    return _Order(columns, group, starts)


def _runs(inputs: int, scheme: Scheme) -> list[slice]:
    """The groups of original columns; the last one may be short."""
    width = scheme.width(inputs)
    return [slice(start, min(start + width, inputs)) for start in range(0, inputs, width)]


def _static_grids(
    W: torch.Tensor, options: SolverOptions, cost: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of the runs of original columns: two tensors [G, N]."""
    import torch

    if cost is None:
        cost = W.new_ones(W.shape[1])
    found = [
        find_grid(W[:, part], options.scheme, cost[part] if options.mse else None)
        for part in _runs(W.shape[1], options.scheme)
    ]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero for _, zero in found])


def _walk(
    W: torch.Tensor, factor: error_feedback.Factor, order: _Order, options: SolverOptions, rounded: Solved
) -> Solved:
    """The columns in order, on grids by what the walk's roundings cost: each D times its square."""
    import torch

    scheme, inverse = options.scheme, order.columns.argsort()
    if order.starts:  # each is found before it is used
        scales, zeros = W.new_empty((2, *rounded.scales.shape))
    else:
        scales, zeros = _static_grids(W, options, factor.D[inverse])
    Wt = W.T[order.columns].contiguous()
    codes = torch.empty(Wt.shape, dtype=torch.uint8, device=W.device)

    def find(i: int, current: torch.Tensor) -> None:
        g, cost = order.group[i], factor.D[i : i + len(current)]
        scales[g], zeros[g] = find_grid(current.T, scheme, cost if options.mse else None)

    def to_grid(i: int, w: torch.Tensor) -> torch.Tensor:
        g = order.group[i]
        q = to_codes(w, scales[g], zeros[g], scheme.maxq)
        codes[i] = q
        return q.sub_(zeros[g]).mul_(scales[g])

    Err, losses = error_feedback.walk(Wt, factor, order.starts, find, to_grid)
    return replace(
        rounded,
        codes=codes[inverse],
        scales=scales.half(),
        zeros=zeros.byte(),
        g_idx=torch.tensor(order.group, device=W.device)[inverse].int(),
        loss=error_feedback.undamped(losses, Err, factor),
        damp=factor.damp,
    )
