"""The grid that weights are rounded to: a scale and a zero point per group of inputs and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsconvert.errors import QuantizationError

if TYPE_CHECKING:
    import torch

HALF_TINY = 2.0**-24  # the smallest positive float16
# Ranges that the scale search tries after the plain one, as fractions of it. At 2 bits the best one lies near
# one half.
FRACTIONS = tuple(1 - step / 20 for step in range(1, 15))


@dataclass(frozen=True)
class Scheme:
    """What a file's integers mean: `bits` per weight, inputs per group (-1: all in one), sign symmetry."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True

    @property
    def maxq(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def width(self, inputs: int) -> int:
        """How many inputs share a scale, of `inputs` in all."""
        return inputs if self.group_size == -1 else self.group_size

    def groups(self, inputs: int) -> int:
        """How many groups `inputs` make; the last one may be short."""
        return -(-inputs // self.width(inputs))


def find_grid(
    w: torch.Tensor, scheme: Scheme, cost: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of each output of a group: for `w` [group, N], two tensors [N] of its dtype.

    Min-max, or with `cost` [group], what a squared error of each input costs, the range that costs least.
    Scales are float16 values already, so that codes are chosen for the scale that the file holds. Asymmetric
    zero points are at least 1: in the v1 format a zero of 0 has no safe encoding. Raises QuantizationError
    for weights that float16 scales cannot reach.
    """
    scale, zero = (_by_kernel if w.device.type == "cpu" else find_by_torch)(w, scheme, cost)
    if not bool(scale.isfinite().all()):
        raise QuantizationError(
            "has weights too large for a float16 scale",
            why=f"The largest magnitude is {float(w.abs().max()):.3g}",
            hint="Look for a damaged tensor in the checkpoint, or leave this linear in 16 bits",
        )
    return scale, zero


def _by_kernel(
    w: torch.Tensor, scheme: Scheme, cost: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from dsconvert.quantization.kernels import by_outputs
    from dsconvert.quantization.kernels.ranges import find_ranges

    scale, zero = w.new_empty((2, w.shape[1]))
    fractions = w.new_tensor((1.0, *_fractions(scheme)) if cost is not None else (1.0,))
    cost = w.new_ones(len(w)) if cost is None else cost
    given = (w.contiguous(), cost, fractions, scheme.maxq, scheme.sym, HALF_TINY, scale, zero)
    by_outputs(find_ranges, w.shape[1], *given)
    return scale, zero


def find_by_torch(
    w: torch.Tensor, scheme: Scheme, cost: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.ranges.find_ranges`, on any device."""
    low, high = _extremes(w, scheme)
    scale, zero = _grid(low, high, scheme)
    if cost is None:
        return scale, zero
    best = _cost(w, scale, zero, scheme, cost)
    for p in _fractions(scheme):
        trial, origin = _grid(low * p, high * p, scheme)
        total = _cost(w, trial, origin, scheme, cost)
        better = total < best
        best, scale, zero = (
            total.where(better, best),
            trial.where(better, scale),
            origin.where(better, zero),
        )
    return scale, zero


def to_codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, maxq: int) -> torch.Tensor:
    """The nearest codes 0 ... `maxq` of `w`, in its dtype; ties go to the even multiple of the scale."""
    return (w / scale).round_().add_(zero).clamp_(0, maxq)


def _extremes(w: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The range to cover; it always holds 0, and is [-1, 1] where all weights are 0."""
    low, high = w.amin(0).clamp_(max=0), w.amax(0).clamp_(min=0)
    if scheme.sym:
        high = high.maximum(-low)
        low = -high
    empty = low == high
    return low.masked_fill(empty, -1), high.masked_fill(empty, 1)


def _grid(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    maxq = scheme.maxq
    if scheme.sym:
        scale = _half((high - low) / maxq)
        return scale, scale.new_full(scale.shape, (maxq + 1) // 2)
    scale = (high - low) / maxq
    # A zero point below 1 is raised to 1, which costs the upper end one step: spread it over fewer steps.
    scale = _half(scale.where((-low / scale).round() >= 1, high / (maxq - 1)))
    return scale, (-low / scale).round_().clamp_(1, maxq)


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().to(scale.dtype).clamp_(min=HALF_TINY)


def _fractions(scheme: Scheme) -> tuple[float, ...]:
    """The ranges that are tried after the plain one, which stays where none is better.

    The symmetric grid has no code for its upper end: with a range one step wider the largest weight has one,
    which is worth all others' precision where its input is enormous.
    """
    wider = (scheme.maxq / (scheme.maxq - 1),) if scheme.sym else ()
    return *wider, *FRACTIONS


def _cost(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme, cost: torch.Tensor
) -> torch.Tensor:
    """What rounding each group to its grid costs: the sum over inputs of cost times squared error."""
    x = w / scale
    miss = x.round().clamp_(-zero, scheme.maxq - zero).sub_(x)
    return (cost @ miss.square_()).mul_(scale.square())
