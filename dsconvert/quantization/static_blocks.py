"""Blocks of fixed columns whose scales are found beforehand, and error feedback on them.

A block of a row has a float16 step d and, of some types, a second one m; its sub-blocks have an integer
scale s and an integer n. A weight is d s level - m n, where level is code - zero, or a value from a table.
Where a block has a zero point of its own, n is that and m is d.
The grid of every column is known before the walk, so the walk may go in any order: most active inputs first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsconvert.quantization import error_feedback
from dsconvert.quantization.error_feedback import BLOCK, Factor, Grid

if TYPE_CHECKING:
    import torch


def as_stored(numbers: torch.Tensor, kind: str) -> torch.Tensor:
    """Numbers as "f16", "bf16" or "f32" holds them, a fresh tensor of their own type."""
    import torch

    held = {"f16": torch.half, "bf16": torch.bfloat16, "f32": torch.float32}[kind]
    return numbers.to(held).to(numbers.dtype, copy=True)


@dataclass(frozen=True)
class BlockType:
    """What the numbers of a block may be; `block` and `sub` are columns.

    Codes go from 0 to `top`; integer scales s between the two `scales`, integers n between the two `offsets`.
    Where these two are equal nothing is stored. A table of `values` stands in for code - `zero`. With `tied`
    m is d, which stays above 0, and n the zero point of a block without sub-blocks. d and m are `stored` as
    "f16", "bf16" or "f32".
    """

    block: int
    sub: int
    top: int
    zero: int = 0
    scales: tuple[int, int] = (1, 1)
    offsets: tuple[int, int] = (0, 0)
    values: tuple[float, ...] = ()
    tied: bool = False
    stored: str = "f16"

    @property
    def affine(self) -> bool:
        """Whether blocks have an m."""
        return self.offsets != (0, 0)

    def levels(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What codes stand for before the scale."""
        import torch

        if self.values:
            return torch.tensor(self.values, dtype=dtype, device=codes.device)[codes.long()]
        return codes.to(dtype).sub_(self.zero)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Weights of K inputs and N outputs as blocks hold them; the last block may be short.

    `codes` uint8 [K, N]; `d` and `m` [K / block, N], numbers of that type; `s` and `n` [K / sub, N], whole
    numbers; all four in the weights' dtype.
    """

    kind: BlockType
    codes: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor
    s: torch.Tensor
    n: torch.Tensor

    @property
    def steps(self) -> torch.Tensor:
        """The step between levels of each sub-block: [K / sub, N]."""
        return self._spread(self.d) * self.s

    @property
    def lows(self) -> torch.Tensor | None:
        """What is added in each sub-block: [K / sub, N], None where nothing ever is."""
        return -(self._spread(self.m) * self.n) if self.kind.affine else None

    def _spread(self, of_blocks: torch.Tensor) -> torch.Tensor:
        return of_blocks.repeat_interleave(self.kind.block // self.kind.sub, 0)

    def weights(self) -> torch.Tensor:
        """The weights that the blocks stand for, [K, N], as a reader computes them."""
        sub, steps, lows = self.kind.sub, self.steps, self.lows
        found = self.kind.levels(self.codes, self.d.dtype)
        whole = len(found) // sub
        for part, own in ((found[: whole * sub], slice(whole)), (found[whole * sub :], slice(whole, None))):
            if not len(part):
                continue
            by_sub = part.view(len(steps[own]), -1, found.shape[1])
            by_sub.mul_(steps[own, None])
            if lows is not None:
                by_sub.add_(lows[own, None])
        return found


def walk(Wt: torch.Tensor, factor: Factor, columns: torch.Tensor, start: Blocks) -> torch.Tensor:
    """The codes [K, N] of W^T [K, N] by error feedback on the grid of `start`.

    `factor` is that of H in the order `columns`. A code whose step is 0 stays as it is.
    """
    kind, steps = start.kind, start.steps
    zero, lows = steps.new_full(steps.shape, float(kind.zero)), start.lows
    sub_blocks = (columns // kind.sub).tolist()

    def grid_of(run: slice, moved: object) -> Grid:
        return Grid(steps, zero, sub_blocks[run], kind.top, low=lows, values=kind.values)

    ends = [*range(BLOCK, len(Wt), BLOCK), len(Wt)]
    walked, _ = error_feedback.walk(Wt[columns], factor, ends, grid_of)
    codes = walked[columns.argsort()]
    fixed = (steps == 0).repeat_interleave(kind.sub, 0)
    return codes.where(~fixed, start.codes)
