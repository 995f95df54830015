"""GPTQ's groups made better after the walk: a group is a block with a scale and a zero point of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsconvert.quantization.error_feedback import Factor, both_losses
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.refinement import refine
from dsconvert.quantization.static_blocks import Blocks, BlockType

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Groups:
    """Weights of K inputs and N outputs in groups that are runs of inputs: scale * (code - zero).

    `codes` uint8 [K, N]; `scales`, values of float16, and `zeros` [G, N] in the weights' dtype; `losses`
    float64 [N] without the damping.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    losses: torch.Tensor


def refine_groups(
    Wt: torch.Tensor,
    H: torch.Tensor,
    factor: Factor,
    columns: torch.Tensor,
    start: Groups,
    scheme: Scheme,
    rounds: int,
) -> Groups:
    """Better groups of W^T [K, N], given H [K, K] and its factor in the order `columns`.

    An output whose loss does not fall, with the damping and without, stays as it was.
    """
    found, losses = refine_outputs(Wt, H, factor, columns, as_blocks(start, scheme), start.losses, rounds)
    return Groups(found.codes, found.d, found.n, losses)


def refine_outputs(
    Wt: torch.Tensor,
    H: torch.Tensor,
    factor: Factor,
    columns: torch.Tensor,
    before: Blocks,
    losses: torch.Tensor,
    rounds: int,
) -> tuple[Blocks, torch.Tensor]:
    """Better blocks and their losses [N], those of `before` being `losses`; as `refine_groups`."""
    after = refine(Wt, H, factor.shift, before, columns, rounds)
    dead = H.diagonal() == 0
    _, damped_before = both_losses(Wt - before.weights(), factor, columns, dead)
    found, damped = both_losses(Wt - after.weights(), factor, columns, dead)
    better = (found <= losses) & (damped < damped_before)
    kept = {
        name: getattr(after, name).where(better, getattr(before, name)) for name in ("codes", "d", "m", "n")
    }
    return replace(before, **kept), found.where(better, losses)


def as_blocks(groups: Groups, scheme: Scheme) -> Blocks:
    """Groups as blocks, of which a symmetric file's have their zero point in the middle for good."""
    width, middle = scheme.width(len(groups.codes)), (scheme.maxq + 1) // 2
    limits = (middle, middle) if scheme.sym else (1, scheme.maxq)
    kind = BlockType(width, width, scheme.maxq, offsets=limits, tied=True)
    ones = groups.scales.new_ones(groups.scales.shape)
    return Blocks(kind, groups.codes, groups.scales, groups.scales, ones, groups.zeros)
