"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round a linear's weights to a grid with error feedback."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dsconvert.decoder.torch_decoder import finite
from dsconvert.errors import QuantizationError, UsageError
from dsconvert.quantization import error_feedback
from dsconvert.quantization.error_feedback import BLOCK, Grid
from dsconvert.quantization.gptq_grid import Scheme, find_grid, to_codes
from dsconvert.quantization.group_refinement import Groups, refine_groups

if TYPE_CHECKING:
    import torch


ROUNDS = {2: 1, 3: 1}  # of refinement by bits, where none are asked for; at more bits they gain less


def rounds_for(asked: int | None, bits: int) -> int:
    """How many rounds of refinement codes of so many bits get."""
    return ROUNDS.get(bits, 0) if asked is None else asked


@dataclass(frozen=True)
class SolverOptions:
    """How to solve. `damp` is a fraction of the mean of H's diagonal, added to it.

    With `act_order` the columns of largest diagonal go first; groups stay runs of original columns with
    scales found beforehand, unless `dynamic_groups` makes them of columns as they are walked (then the
    file needs desc_act). Without `act_order` a group's scales are found when the walk reaches it. With `mse`
    each range is that whose rounding costs least; without it, that from the least to the greatest weight.
    After the walk scales, zero points and codes are refined in turn, `rounds` times at the most.
    """

    scheme: Scheme = field(default_factory=Scheme)
    act_order: bool = False
    dynamic_groups: bool = False
    damp: float = 0.05
    mse: bool = True
    rounds: int = 0

    @property
    def desc_act(self) -> bool:
        """Whether groups are not runs of original columns, which the file must say."""
        return self.act_order and self.dynamic_groups and self.scheme.group_size != -1

    @property
    def passes(self) -> float:
        """How much work a solve is: the walk, the loss of plain rounding, rounds of scales and codes."""
        return 2.0 + 5.0 * self.rounds

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
        import torch

        scales, zeros = self.scales.float(), self.zeros.float()
        weights = torch.empty(self.codes.shape[::-1], device=self.codes.device)
        for i in range(0, len(self.codes), BLOCK):  # a few rows at a time, which caches hold
            part = slice(i, i + BLOCK)
            g = self.g_idx[part]
            weights[:, part] = self.codes[part].float().sub_(zeros[g]).mul_(scales[g]).T
        return weights


@dataclass(frozen=True, eq=False)
class _Order:
    """The walk: original column of each step, its group, where runs of steps end, whether grids are known."""

    columns: torch.Tensor
    group: list[int]
    ends: list[int]
    found_before: bool


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
    options: SolverOptions,
    factorize: error_feedback.Factorize = error_feedback.factorize,
    few: str | None = None,
) -> Solved:
    """Quantize W [N, K] so that tr((W-Q) H (W-Q)^T) is small, for H [K, K] = 2/n X^T X of its inputs.

    Both on one device and in one floating-point type, float32 as a rule; neither is changed. Inputs that
    were never active (H_ii = 0) get weight 0. Damping grows tenfold, twice at the most, where H is not
    positive definite; then, or where H is not finite, or where the result is no better, the codes are
    those of round-to-nearest and `fell_back` says so; they are, too, where `few` says why H is worth little.
    `factorize` may be `error_feedback.shared_factors()`. Raises QuantizationError for weights that are not
    finite or too large, UsageError for shapes or options that make no sense.
    """
    _check(W, H, options)
    if not finite(H):
        return _plain(round_to_nearest(W, options), math.nan, "the Hessian is not finite")
    if few:
        rounded, error = _nearest(W.T.contiguous(), options, None)
        return _plain(rounded, error_feedback.loss(error, H), few)
    dead = H.diagonal() == 0
    if bool(dead.all()):
        return _plain(round_to_nearest(W, options), 0.0, "no input of this linear was ever active")
    Wt = W.masked_fill(dead, 0).T.contiguous()
    order = _order(H.diagonal(), options)
    factor = factorize(H, dead, order.columns, options.damp)
    rounded, error = _nearest(Wt, options, None if factor is None else H.diagonal())
    rounded = replace(rounded, dead=int(dead.sum()))
    if factor is None:
        why = "the Hessian is not positive definite at any damping"
        return _plain(rounded, error_feedback.loss(error, H), why)
    rtn_loss = error_feedback.rounding_loss(error[order.columns], factor)
    del error
    solved = _walk(Wt, H, factor, order, options, rounded)
    if not solved.loss <= rtn_loss:
        return _plain(rounded, rtn_loss, f"its loss {solved.loss:.4g} is above round-to-nearest's")
    return replace(solved, rtn_loss=rtn_loss)


def round_to_nearest(W: torch.Tensor, options: SolverOptions, cost: torch.Tensor | None = None) -> Solved:
    """Quantize W [N, K] without feedback: each weight to its nearest code, groups of original columns.

    `cost` [K] is what a squared error of each input costs; without it, one is as bad as another. The losses
    are NaN. Raises QuantizationError and UsageError as `solve` does.
    """
    _check(W, None, options)
    return _nearest(W.T.contiguous(), options, cost)[0]


def _nearest(
    Wt: torch.Tensor, options: SolverOptions, cost: torch.Tensor | None
) -> tuple[Solved, torch.Tensor]:
    """Round-to-nearest of W^T [K, N], and what it leaves of it."""
    import torch

    scheme, inputs = options.scheme, len(Wt)
    scales, zeros = _static_grids(Wt, options, cost)
    codes, error = torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device), torch.empty_like(Wt)
    for scale, zero, part in zip(scales, zeros, _runs(inputs, scheme), strict=True):
        q = to_codes(Wt[part], scale, zero, scheme.maxq)
        codes[part] = q
        torch.sub(Wt[part], q.sub_(zero).mul_(scale), out=error[part])
    g_idx = torch.arange(inputs, device=Wt.device, dtype=torch.int32) // scheme.width(inputs)
    found = (codes, scales.half(), zeros.byte(), g_idx)
    return Solved(*found, loss=math.nan, rtn_loss=math.nan, damp=0.0, dead=0, fell_back=None), error


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
    if not finite(W):
        raise QuantizationError(
            "has weights that are not finite numbers",
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
    runs = [*range(BLOCK, inputs, BLOCK), inputs] if found_before else []
    return _Order(columns, group, runs or [run.stop for run in _runs(inputs, options.scheme)], found_before)


def _runs(inputs: int, scheme: Scheme) -> list[slice]:
    """The groups of original columns; the last one may be short."""
    width = scheme.width(inputs)
    return [slice(start, min(start + width, inputs)) for start in range(0, inputs, width)]


def _static_grids(
    Wt: torch.Tensor, options: SolverOptions, cost: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of the runs of original columns: two tensors [G, N]."""
    import torch

    if cost is None:
        cost = Wt.new_ones(len(Wt))
    found = [
        find_grid(Wt[part], options.scheme, cost[part].contiguous() if options.mse else None)
        for part in _runs(len(Wt), options.scheme)
    ]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero for _, zero in found])


def _walk(
    Wt: torch.Tensor,
    H: torch.Tensor,
    factor: error_feedback.Factor,
    order: _Order,
    options: SolverOptions,
    rounded: Solved,
) -> Solved:
    """The columns in order, on grids by what the walk's roundings cost: each D times its square."""
    import torch

    scheme, inverse, D = options.scheme, order.columns.argsort(), factor.D
    if order.found_before:
        scales, zeros = _static_grids(Wt, options, D[inverse])
    else:
        scales, zeros = Wt.new_empty((2, *rounded.scales.shape))

    def grid_of(run: slice, moved: Callable[[], torch.Tensor]) -> Grid:
        if not order.found_before:
            g = order.group[run.start]
            scales[g], zeros[g] = find_grid(moved(), scheme, D[run] if options.mse else None)
        return Grid(scales, zeros, order.group[run], scheme.maxq)

    codes, _, losses = error_feedback.walk_rows(Wt[order.columns], factor, order.ends, grid_of)
    found = _refined(Wt, H, factor, order, options, Groups(codes, scales, zeros, losses))
    return replace(
        rounded,
        codes=found.codes,
        scales=found.scales.half(),
        zeros=found.zeros.byte(),
        g_idx=torch.tensor(order.group, device=Wt.device)[inverse].int(),
        loss=float(found.losses.sum()),
        damp=factor.damp,
    )


def _refined(
    Wt: torch.Tensor,
    H: torch.Tensor,
    factor: error_feedback.Factor,
    order: _Order,
    options: SolverOptions,
    walked: Groups,
) -> Groups:
    """The groups after refinement; codes are given in the walk's order, and returned in the file's."""
    import torch

    columns, rest = order.columns, (options.scheme, options.rounds)
    if options.rounds and options.desc_act:  # groups are runs of the walk
        steps = torch.arange(len(Wt), device=Wt.device)
        walked = refine_groups(Wt[columns], H[columns][:, columns], factor, steps, walked, *rest)
    found = replace(walked, codes=walked.codes[columns.argsort()])
    if options.rounds and not options.desc_act:
        found = refine_groups(Wt, H, factor, columns, found, *rest)
    return found
