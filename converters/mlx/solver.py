"""GPTQ's error feedback on MLX's grid: a scale and a bias for each group of inputs, both as they are stored.

A bias is a zero point that is no whole number; where a folder's type rounds it, codes are chosen for what is
stored. Each group's range is that whose rounding costs least (dsconvert/quantization/error_feedback.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.mlx.affine import Affine, Floats, grids, stored
from dsconvert.decoder.torch_decoder import finite
from dsconvert.errors import QuantizationError
from dsconvert.quantization import error_feedback
from dsconvert.quantization.error_feedback import BLOCK, Grid
from dsconvert.quantization.gptq_grid import FRACTIONS
from dsconvert.quantization.group_refinement import refine_outputs
from dsconvert.quantization.static_blocks import Blocks, BlockType, as_stored

if TYPE_CHECKING:
    import torch

    Ranges = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SolverOptions:
    """How to solve: for `settings`, with scales and biases stored as `dtype`; `damp` as GPTQ's.

    With `act_order` the columns of largest diagonal go first, on grids found beforehand; else a group's is
    found when the walk reaches it. Without `mse` a range goes from least to greatest weight. After the
    walk scales, biases and codes are refined in turn, `rounds` times at the most.
    """

    settings: Affine
    dtype: str
    act_order: bool = True
    damp: float = 0.05
    mse: bool = True
    rounds: int = 0


@dataclass(frozen=True, eq=False)
class Solved:
    """A quantized linear of K inputs, N outputs and G groups, columns in the file's order.

    `codes` uint8 [K, N], `scales` and `biases` float32 [G, N], of the folder's type. `loss` is
    tr((W-Q) H (W-Q)^T) with the undamped H, `rtn_loss` that of `mx.quantize`. `damp` is the fraction that was
    used, `dead` the number of inputs that were never active. `fell_back` says why the codes are those of
    rounding to nearest; None when they are not.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor
    loss: float = math.nan
    rtn_loss: float = math.nan
    damp: float = 0.0
    dead: int = 0
    fell_back: str | None = None

    def dequantized(self) -> torch.Tensor:
        """The weights that the file stands for: float32 [N, K]."""
        width = len(self.codes) // len(self.scales)
        weights = self.codes.float().mul_(self.scales.repeat_interleave(width, 0))
        return weights.add_(self.biases.repeat_interleave(width, 0)).T.contiguous()


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
    options: SolverOptions,
    factorize: error_feedback.Factorize = error_feedback.factorize,
    few: str | None = None,
) -> Solved:
    """Quantize W [N, K] so that tr((W-Q) H (W-Q)^T) is small, for H [K, K] = 2/n X^T X of its inputs.

    Both float32 on one device; neither is changed. Inputs that were never active get weight 0, or the nearest
    to it. Where H cannot be factored, where `few` says why it is worth little, or where rounding to nearest
    does better, the codes are those of `mx.quantize`, and `fell_back` says so. `factorize` may be
    `error_feedback.shared_factors()`. Raises QuantizationError for weights that are not finite or too
    large for a scale of the folder's type.
    """
    if not finite(W):
        raise QuantizationError(
            "has weights that are not finite numbers",
            hint="Fetch the checkpoint again; a training that diverged cannot be quantized",
        )
    if not finite(H):
        return replace(nearest(W.T.contiguous(), options), fell_back="the Hessian is not finite")
    if few:
        plain = nearest(W.T.contiguous(), options)
        loss = error_feedback.loss(W.T - plain.dequantized().T, H)
        return replace(plain, loss=loss, rtn_loss=loss, fell_back=few)
    dead = H.diagonal() == 0
    if bool(dead.all()):
        plain = nearest(W.T.contiguous(), options)
        return replace(plain, loss=0.0, rtn_loss=0.0, fell_back="no input of this linear was ever active")
    Wt, count = W.masked_fill(dead, 0).T.contiguous(), int(dead.sum())
    columns, group, ends = _order(H.diagonal(), options)
    factor = factorize(H, dead, columns, options.damp)
    plain = replace(nearest(Wt, options), dead=count)
    error = Wt - plain.dequantized().T
    if factor is None:
        loss = error_feedback.loss(error, H)
        why = "the Hessian is not positive definite at any damping"
        return replace(plain, loss=loss, rtn_loss=loss, fell_back=why)
    rtn_loss = error_feedback.rounding_loss(error[columns], factor)
    del error
    solved = _walk(Wt, H, factor, columns, group, ends, options)
    if not solved.loss <= rtn_loss:
        why = f"its loss {solved.loss:.4g} is above round-to-nearest's"
        return replace(plain, loss=rtn_loss, rtn_loss=rtn_loss, fell_back=why)
    return replace(solved, rtn_loss=rtn_loss, damp=factor.damp, dead=count)


def nearest(Wt: torch.Tensor, options: SolverOptions) -> Solved:
    """What `mx.quantize` makes of W^T [K, N]; the losses are NaN."""
    import torch

    from converters.mlx.affine import codes_of

    rows = Wt.T.contiguous().cpu().numpy()
    scales, biases = grids(rows, options.settings)
    codes = codes_of(rows, scales, biases, options.settings)
    scale, bias = (torch.from_numpy(stored(p, options.dtype)).T.to(Wt.device) for p in (scales, biases))
    return Solved(torch.from_numpy(codes).T.contiguous().to(Wt.device), scale, bias)


def find_ranges(w: torch.Tensor, options: SolverOptions, cost: torch.Tensor | None) -> Ranges:
    """Scale and bias of each output of a group w [group, N], as they are stored: two tensors [N].

    Those of `mx.quantize`, or with `cost` [group], what a squared error of each input costs, of its range and
    of narrower ones about the same middle the one that costs least. Raises QuantizationError for weights
    that they cannot reach.
    """
    import torch

    settings = options.settings
    rows = w.T.contiguous().cpu().numpy()
    scale, bias = (
        torch.from_numpy(stored(part, options.dtype)).to(w.device)[:, 0] for part in grids(rows, settings)
    )
    if cost is not None:
        low, high = w.amin(0), w.amax(0)
        middle, half = (low + high) / 2, (high - low) / 2
        best = _cost(w, scale, bias, settings.maxq, cost)
        for fraction in FRACTIONS:
            step = as_stored(half * (2 * fraction / settings.maxq), options.dtype)
            start = as_stored(middle - half * fraction, options.dtype)
            total = _cost(w, step, start, settings.maxq, cost)
            better = (total < best) & (step > 0)
            best, scale, bias = (
                total.where(better, best),
                step.where(better, scale),
                start.where(better, bias),
            )
    if not bool((scale.isfinite() & bias.isfinite()).all()):
        raise QuantizationError(
            f"has weights too large for a scale in {options.dtype}",
            why=f"The largest magnitude is {float(w.abs().max()):.3g}",
            hint="Look for a damaged tensor in the checkpoint",
        )
    return scale, bias


def searched_ranges(rows: Floats, options: SolverOptions) -> tuple[Floats, Floats]:
    """Scale and bias of each group of some rows [n, K], as they are stored, all inputs being alike: [n, G].

    For what has no inputs that could be measured.
    """
    import torch

    w = torch.tensor(rows).reshape(-1, options.settings.group_size).T.contiguous()
    scale, bias = find_ranges(w, options, w.new_ones(len(w)))
    return scale.numpy().reshape(len(rows), -1), bias.numpy().reshape(len(rows), -1)


def _cost(
    w: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, maxq: int, cost: torch.Tensor
) -> torch.Tensor:
    """What rounding a group to each output's grid costs: the sum of cost times squared error."""
    x = (w - bias) / scale
    miss = x.round().clamp_(0, maxq).sub_(x)
    return (cost @ miss.square_()).mul_(scale.square()).nan_to_num_(math.inf)


def _order(diagonal: torch.Tensor, options: SolverOptions) -> tuple[torch.Tensor, list[int], list[int]]:
    """The walk: original column of each step, its group, where runs of steps end."""
    import torch

    inputs, width = len(diagonal), options.settings.group_size
    columns = torch.arange(inputs, device=diagonal.device)
    if options.act_order:
        columns = diagonal.argsort(descending=True, stable=True)
    run = BLOCK if options.act_order else width
    return columns, (columns // width).tolist(), [*range(run, inputs, run), inputs]


def _walk(
    Wt: torch.Tensor,
    H: torch.Tensor,
    factor: error_feedback.Factor,
    columns: torch.Tensor,
    group: list[int],
    ends: list[int],
    options: SolverOptions,
) -> Solved:
    """The columns in order, on grids by what the walk's roundings cost: each D times its square."""
    settings, inverse = options.settings, columns.argsort()
    D, width = factor.D, options.settings.group_size
    scales, biases = Wt.new_empty((2, len(Wt) // width, Wt.shape[1]))
    if options.act_order:
        cost = D[inverse].contiguous()
        for g in range(len(scales)):
            part = slice(g * width, (g + 1) * width)
            scales[g], biases[g] = find_ranges(Wt[part], options, cost[part] if options.mse else None)

    def grid_of(run: slice, moved: Callable[[], torch.Tensor]) -> Grid:
        if not options.act_order:
            g = group[run.start]
            scales[g], biases[g] = find_ranges(moved(), options, D[run] if options.mse else None)
        zero = scales.new_zeros(scales.shape)
        return Grid(scales, zero, group[run], settings.maxq, low=biases)

    codes, _, losses = error_feedback.walk_rows(Wt[columns], factor, ends, grid_of)
    found = as_blocks(codes[inverse], scales, biases, options)
    if options.rounds:
        found, losses = refine_outputs(Wt, H, factor, columns, found, losses, options.rounds)
    return Solved(found.codes, found.d, found.m, float(losses.sum()))


def as_blocks(
    codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, options: SolverOptions
) -> Blocks:
    """Groups as blocks with a step d and an m of their own, of which one is added: n is -1."""
    width = options.settings.group_size
    kind = BlockType(width, width, options.settings.maxq, offsets=(-1, -1), stored=options.dtype)
    ones = scales.new_ones(scales.shape)
    return Blocks(kind, codes, scales, biases, ones, -ones)
