"""Four-bit floats by error feedback: codes walked on the scales of each group, which are found beforehand.

The values of E2M1 times a scale are a grid that no walk moves, so the most active inputs may go first. A row
that is no better than rounded to nearest is that one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from converters.compressed import rounded
from converters.compressed.floats import E2M1, E4M3, Codes, Floats, to_e2m1, to_nibbles
from converters.compressed.rounded import GROUP, MX_GROUP
from dsconvert.quantization import error_feedback
from dsconvert.quantization.error_feedback import both_losses
from dsconvert.quantization.known_inputs import Inputs
from dsconvert.quantization.static_blocks import Blocks, BlockType, walk

if TYPE_CHECKING:
    import torch

ORDER = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], np.uint8)  # codes by rising values
LEVELS = tuple(E2M1[ORDER].tolist())
LARGEST_E4M3 = 0x7E
AT_ONCE = 1 << 20  # weights whose scales are searched together


@dataclass(frozen=True)
class FloatType:
    """A type of four-bit floats with a scale for each `width` inputs.

    `plain` gives the codes of the scales of rows by the type's own rule, `values` what codes stand for, and
    `near` those to try in their place, as steps of a code; all of them with the linear's global scale.
    """

    width: int
    plain: Callable[[Floats, np.float32], Codes]
    values: Callable[[Codes, np.float32], Floats]
    near: range
    largest: int

    @property
    def blocks(self) -> BlockType:
        """As blocks of columns with a table of values."""
        return BlockType(self.width, self.width, len(LEVELS) - 1, values=LEVELS)


FED = {
    "nvfp4a16": FloatType(
        GROUP, rounded.nv_scales, lambda codes, by: E4M3[codes] / by, range(-5, 3), LARGEST_E4M3
    ),
    "mxfp4a16": FloatType(
        MX_GROUP,
        lambda rows, by: rounded.mx_scales(rows),
        lambda codes, by: np.ldexp(np.float32(1), codes.astype(np.int32) - 127),
        range(-1, 2),
        254,
    ),
}


@dataclass(frozen=True, eq=False)
class Solved:
    """Codes of E2M1 uint8 [N, K] and of scales uint8 [N, K / width]; the rest as LinearSolved has it."""

    codes: Codes
    scales: Codes
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    fell_back: str | None

    def weights(self, kind: FloatType, by: np.float32) -> Floats:
        """What they stand for, [N, K]."""
        return E2M1[self.codes] * kind.values(self.scales, by).repeat(kind.width, 1)

    @property
    def nibbles(self) -> Codes:
        """The codes, two in a byte."""
        return to_nibbles(self.codes)


def solve(W: torch.Tensor, inputs: Inputs, kind: FloatType, by: np.float32, search: bool) -> Solved:
    """Codes and scales of W [N, K] for which tr((W-Q) H (W-Q)^T) is small.

    `by` is what nvfp4's scales are divided by. With `search` each scale is that near the rule's whose
    rounding costs least. Where feedback is impossible all is rounded to nearest, and `fell_back` says why.
    """
    rows: Floats = W.float().cpu().numpy()
    scales = kind.plain(rows, by)
    codes = to_e2m1(rows / kind.values(scales, by).repeat(kind.width, 1))
    dead, factor = int(inputs.dead.sum()), inputs.factor
    plain_error = W.T - _weights(codes, scales, kind, by, W)
    if factor is None:
        loss = error_feedback.loss(plain_error, inputs.H)
        return Solved(codes, scales, loss, loss, 0.0, dead, inputs.why)
    cost = np.empty(len(factor.D), np.float32)
    cost[inputs.columns.cpu().numpy()] = factor.D.cpu().numpy()
    found = searched(rows, scales, kind, by, cost) if search else scales
    walked = ORDER[_walked(W, inputs, kind, kind.values(found, by))]
    (losses, damped), (plain, plain_damped) = (
        both_losses(error, factor, inputs.columns, inputs.dead)
        for error in (W.T - _weights(walked, found, kind, by, W), plain_error)
    )
    better = (losses <= plain) & (damped < plain_damped)
    ours, loss = better.cpu().numpy()[:, None], float(losses.where(better, plain).sum())
    return Solved(
        np.where(ours, walked, codes), np.where(ours, found, scales), loss, float(plain.sum()), factor.damp,
        dead, None,
    )  # fmt: skip


def _walked(W: torch.Tensor, inputs: Inputs, kind: FloatType, steps: Floats) -> Codes:
    """The levels [N, K] of the walk on these scales [N, K / width]."""
    import torch

    assert inputs.factor is not None  # what has none is rounded to nearest
    d = torch.from_numpy(np.ascontiguousarray(steps.T)).to(W.device, W.dtype)
    Wt = W.T.contiguous()
    none = torch.zeros(Wt.shape, dtype=torch.uint8, device=W.device)
    start = Blocks(kind.blocks, none, d, d, torch.ones_like(d), d)
    levels: Codes = walk(Wt, inputs.factor, inputs.columns, start).T.cpu().numpy()
    return levels


def searched(rows: Floats, scales: Codes, kind: FloatType, by: np.float32, cost: Floats) -> Codes:
    """The codes of scales near the given ones whose rounding costs least, a squared error of an input `cost`.

    Of equal ones the nearest to the given.
    """
    found = np.empty_like(scales)
    for start in range(0, len(rows), step := max(1, AT_ONCE // rows.shape[1])):
        part = slice(start, start + step)
        found[part] = _searched(rows[part], scales[part], kind, by, cost)
    return found


def _searched(rows: Floats, scales: Codes, kind: FloatType, by: np.float32, cost: Floats) -> Codes:
    best, least = scales, np.full(scales.shape, np.inf, np.float32)
    grouped = rows.reshape(len(rows), -1, kind.width)
    weights = cost.reshape(1, -1, kind.width)
    for step in sorted(kind.near, key=abs):
        trial = np.clip(scales.astype(np.int32) + step, 1, kind.largest).astype(np.uint8)
        values = kind.values(trial, by)[..., None]
        miss = E2M1[to_e2m1(grouped / values)] * values - grouped
        costs = (miss * miss * weights).sum(2)
        best, least = np.where(costs < least, trial, best), np.minimum(costs, least)
    return best


def _weights(
    codes: Codes, scales: Codes, kind: FloatType, by: np.float32, like: torch.Tensor
) -> torch.Tensor:
    """What codes and scales stand for, [K, N] on the device and in the type of `like`."""
    import torch

    weights = E2M1[codes] * kind.values(scales, by).repeat(kind.width, 1)
    return torch.from_numpy(np.ascontiguousarray(weights.T)).to(like.device, like.dtype)
