"""The grid that weights are rounded to: per group of rows a largest scale, per column a 4-bit share of it.

A column's scale is the largest times ((code + 1) / 16)^2. Both are chosen for the least loss, a weighted sum
of squared rounding errors: an error in one row may cost a thousand times what it costs in another. All scales
here are what the runtime computes in float16, so that codes are chosen for the scale that the file means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsconvert.errors import QuantizationError

if TYPE_CHECKING:
    import torch

STEPS = 16  # scales of columns, as shares of the largest: (1/16)^2 ... (16/16)^2
MULTIPLIERS = tuple(0.60 + 0.05 * i for i in range(13))  # of the largest scale, tried in turn
# Codes tried about the one whose grid just holds a column: a clipped outlier is mostly the lesser loss, and
# the grid has no code for its positive end, so that a scale above that one may be the best, too.
SHIFTS = (-4, -3, -2, -1, 0, 1)
HALF_MAX = 65504.0
# Its 256th part is the least float16: with a largest scale below it all weights would be 0.
LEAST = 2.0**-24 * STEPS**2
CHUNK = 1 << 25  # weights tried at once on a device: what keeps it busy


@dataclass(frozen=True, eq=False)
class Grid:
    """A group's scales: stored as `codes` uint8 [N] and `largest` float16 [], meant by `scale` f32 [N]."""

    codes: torch.Tensor
    largest: torch.Tensor
    scale: torch.Tensor


def find_grid(
    w: torch.Tensor, bits: int, cost: torch.Tensor, multipliers: Sequence[float] = MULTIPLIERS
) -> Grid:
    """The scales of a group of rows `w` [rows, N], float32, a squared error in row i costing `cost`[i].

    Of the multipliers the best for the whole group, of the codes near its own the best for each column: the
    least sum of cost * (scale * code - w)^2, before the product's rounding to float16; the first of equals.
    Raises QuantizationError for weights that are not finite or that float16 cannot reach.
    """
    import torch

    zero = 1 << (bits - 1)
    base = w.abs().amax(0).add_(1e-12).div_((2 * zero - 1) / 2)
    smax = base.max().clamp(min=LEAST)
    tried = torch.tensor(multipliers, dtype=w.dtype, device=w.device)
    largest = (tried * smax).clamp_(min=LEAST).half()
    shifts = torch.tensor(SHIFTS, device=w.device)
    own = (base / largest.float()[:, None, None]).sqrt_().mul_(STEPS).round_()
    codes = (own + shifts[:, None]).clamp_(1, STEPS).sub_(1)  # [multipliers, shifts, N]
    scale = effective_scales(codes, largest[:, None, None])
    errors = _errors(w, scale.flatten(0, 1), cost, zero).view_as(scale)
    # the lowest code may be met by clamping only, but it must not be infinite
    errors.masked_fill_(scale * zero > HALF_MAX, float("inf"))
    nearest = errors.argmin(1, keepdim=True)
    sums = errors.gather(1, nearest).sum((1, 2))
    best = sums.argmin()
    if not bool(sums[best].isfinite()):
        raise QuantizationError(
            "has weights too large for a float16 scale, or none that are numbers",
            why=f"The largest magnitude is {float(w.abs().max()):.3g}",
            hint="Look for a damaged tensor in the checkpoint",
        )
    codes, scale = (x[best].gather(0, nearest[best])[0] for x in (codes, scale))
    return Grid(codes.byte(), largest[best], scale)


def effective_scales(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The runtime's float16 scales, as float32, of scale codes and largest scales of shapes that fit."""
    part = (largest.float() / STEPS**2).half().float()
    return (codes.float() + 1).square_().mul(part).half().float()  # exact, then rounded once


def to_codes(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes 0 ... 2^bits - 1 of `w`, in its dtype; ties go to the even multiple of the scale."""
    zero = 1 << (bits - 1)
    return (w / scale).round_().add_(zero).clamp_(0, 2 * zero - 1)


def from_codes(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """What the runtime makes of codes: float16 values, as float32."""
    return (codes.float() - (1 << (bits - 1))).mul_(scale).half().float()


def _errors(w: torch.Tensor, scale: torch.Tensor, cost: torch.Tensor, zero: int) -> torch.Tensor:
    """The error of each column with each of the scales [P, N], float64 [P, N]."""
    if w.device.type != "cpu":
        return errors_by_torch(w, scale, cost, zero)
    import torch

    from dsconvert.quantization.kernels import by_outputs
    from dsconvert.quantization.kernels.tries import errors

    total = torch.empty(scale.shape, dtype=torch.float64)
    by_outputs(errors, w.shape[1], w.contiguous(), scale, cost.contiguous(), zero, total)
    return total


def errors_by_torch(
    w: torch.Tensor, scale: torch.Tensor, cost: torch.Tensor, zero: int, chunk: int = CHUNK
) -> torch.Tensor:
    """As `kernels.tries.errors`, on any device, in pieces of `chunk` weights."""
    import torch

    (rows, columns), tries = w.shape, len(scale)
    room = max(chunk // rows, 1)
    width = min(columns, room)
    at_once = min(max(room // width, 1), tries)
    total, inverse = scale.new_empty(scale.shape), scale.reciprocal()
    buffers = scale.new_empty(2, at_once, rows, width)
    for n in range(0, columns, width):
        part = w[:, n : n + width]
        for p in range(0, tries, at_once):
            trial = inverse[p : p + at_once, None, n : n + width]
            x, miss = buffers[:, : trial.shape[0], :, : trial.shape[2]]
            torch.mul(part, trial, out=x)
            torch.round(x, out=miss).clamp_(-zero, zero - 1).sub_(x).square_()
            total[p : p + at_once, n : n + width] = cost @ miss
    return scale.double().square_().mul_(total)
