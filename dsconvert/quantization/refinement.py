"""Blocks made better after the walk: scales and codes in turn, each to where the loss is least.

The loss of a row is E H E^T, E = W - Q, H with the damping of the factor. Each step is exact for its own
unknowns while all others stay and is taken only where the loss falls, so it never rises. G = H E is made anew
for a run of columns by one matmul, and kept current inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsconvert.quantization.error_feedback import BLOCK
from dsconvert.quantization.static_blocks import Blocks, BlockType, as_stored

if TYPE_CHECKING:
    import torch

RUN = 256  # columns whose scales are refined between two matmuls, or one block if it is wider


def refine(
    Wt: torch.Tensor, H: torch.Tensor, shift: float, blocks: Blocks, columns: torch.Tensor, rounds: int
) -> Blocks:
    """Better blocks of W^T [K, N] after so many rounds of scales and codes; fewer where no code moves."""
    for _ in range(rounds):
        blocks = refine_scales(Wt, H, shift, blocks)
        blocks, moves = descend(Wt, H, shift, blocks, columns)
        if not moves:
            break
    return blocks


def refine_scales(Wt: torch.Tensor, H: torch.Tensor, shift: float, blocks: Blocks) -> Blocks:
    """The blocks with better integers and steps for the same codes; W^T [K, N], H [K, K].

    Sub-block by sub-block, then the steps of the run's blocks.
    """
    kind = blocks.kind
    found = replace(blocks, d=blocks.d.clone(), m=blocks.m.clone(), s=blocks.s.clone(), n=blocks.n.clone())
    E = Wt - found.weights()
    width = max(RUN, kind.block)
    for run, own in _gradients(E, H, shift, range(0, len(Wt), width), width):
        part = _part(found, run)
        levels = kind.levels(part.codes, E.dtype)
        before = part.weights()
        _refine_integers(own, part, levels)
        _refine_steps(own, part, levels)
        E[run] += before - part.weights()
    return found


def descend(
    Wt: torch.Tensor, H: torch.Tensor, shift: float, blocks: Blocks, columns: torch.Tensor
) -> tuple[Blocks, int]:
    """The blocks with better codes for the same scales, and how many moves that took.

    One pass over the inputs in the order `columns`, in runs of which each goes on until no code moves.
    """
    import torch

    kind, steps, codes = blocks.kind, blocks.steps, blocks.codes[columns]
    values = kind.levels(torch.arange(kind.top + 1, device=Wt.device), Wt.dtype)
    E = (Wt - blocks.weights())[columns]
    moves = torch.zeros(Wt.shape[1], dtype=torch.int64, device=Wt.device)
    for i in range(0, len(Wt), BLOCK):
        own = columns[i : i + BLOCK]
        rows = H[own][:, columns]
        G = (rows @ E).add_(E[i : i + BLOCK], alpha=shift)
        square = rows[:, i : i + BLOCK].contiguous()
        square.diagonal().add_(shift)
        run, group = codes[i : i + BLOCK], own // kind.sub
        before = kind.levels(run, Wt.dtype)
        _descend_run(G, square, steps, values, group, run, moves)
        E[i : i + BLOCK] -= (kind.levels(run, Wt.dtype) - before) * steps[group]
    return replace(blocks, codes=codes[columns.argsort()]), int(moves.sum())


def _descend_run(
    G: torch.Tensor,
    H: torch.Tensor,
    steps: torch.Tensor,
    values: torch.Tensor,
    group: torch.Tensor,
    codes: torch.Tensor,
    moves: torch.Tensor,
) -> None:
    if G.device.type == "cpu":
        from dsconvert.quantization.kernels import by_outputs
        from dsconvert.quantization.kernels.descent import descend as kernel

        by_outputs(kernel, G.shape[1], G, H, steps, values, group, codes, moves)
    else:
        descend_by_torch(G, H, steps, values, group, codes, moves)


def descend_by_torch(
    G: torch.Tensor,
    H: torch.Tensor,
    steps: torch.Tensor,
    values: torch.Tensor,
    group: torch.Tensor,
    codes: torch.Tensor,
    moves: torch.Tensor,
) -> None:
    """As `kernels.descent.descend`, on any device."""
    import torch

    from dsconvert.quantization.kernels.descent import MARGIN, PASSES

    edges = (values[1:] + values[:-1]) * 0.5
    for _ in range(PASSES):
        moved = False
        for i, r in enumerate(group.tolist()):
            code, step, h = codes[i].long(), steps[r], H[i, i]
            wanted = (values[code] + G[i] / (h * step)).nan_to_num()
            to = torch.searchsorted(edges, wanted)
            change = (values[to] - values[code]) * step
            better = change * (change * h * (1 + MARGIN) - 2 * G[i]) < 0
            if bool(better.any()):
                codes[i] = to.where(better, code).to(codes.dtype)
                moves += better
                G -= H[:, i, None] * change.where(better, change.new_zeros(()))
                moved = True
        if not moved:
            return


@dataclass(frozen=True, eq=False)
class _Own:
    """A run's part of H and of G = H E [width, N], which is kept current."""

    H: torch.Tensor
    G: torch.Tensor

    def take(self, at: slice, change: torch.Tensor) -> None:
        """Let the weights of some columns grow by `change`."""
        self.G.sub_(self.H[:, at] @ change)


def _gradients(
    E: torch.Tensor, H: torch.Tensor, shift: float, starts: range, width: int
) -> Iterator[tuple[slice, _Own]]:
    for i in starts:
        run = slice(i, min(i + width, len(H)))
        square = H[run, run].clone()
        square.diagonal().add_(shift)
        yield run, _Own(square, (H[run] @ E).add_(E[run], alpha=shift))


def _part(blocks: Blocks, run: slice) -> Blocks:
    """The blocks of a run of columns, as views."""
    kind = blocks.kind
    own = slice(run.start // kind.block, -(-run.stop // kind.block))
    sub = slice(run.start // kind.sub, -(-run.stop // kind.sub))
    return Blocks(kind, blocks.codes[run], blocks.d[own], blocks.m[own], blocks.s[sub], blocks.n[sub])


def _refine_integers(own: _Own, part: Blocks, levels: torch.Tensor) -> None:
    """Better s, or s and n, for each sub-block in turn; changes `part` and `own`."""
    kind = part.kind
    if kind.scales[0] == kind.scales[1]:
        return
    per = kind.block // kind.sub
    for b in range(len(part.s)):
        at = slice(b * kind.sub, (b + 1) * kind.sub)
        u, H, G = levels[at] * part.d[b // per], own.H[at, at], own.G[at]
        Hu = H @ u
        p, uu = (G * u).sum(0), (u * Hu).sum(0)
        if kind.affine:
            v = -part.m[b // per]
            r, uv, vv = G.sum(0) * v, Hu.sum(0) * v, H.sum() * v * v
            x, y = _best_pair(part.s[b], part.n[b], (p, r), (uu, uv, vv), kind)
        else:
            x, y = _nearest_step(part.s[b], p, uu, kind.scales), None
        part.s[b] += x
        change = u * x
        if y is not None:
            part.n[b] += y
            change += v * y
        own.take(at, change)


def _nearest_step(
    s: torch.Tensor, p: torch.Tensor, uu: torch.Tensor, limits: tuple[int, int]
) -> torch.Tensor:
    """The whole number x of least x^2 uu - 2 x p, s + x within the limits; 0 where that is not below 0."""
    x = (p / uu).nan_to_num_(0, 0, 0).round_()
    x = (s + x).clamp_(*limits) - s
    return x.masked_fill_(~(x * (x * uu - 2 * p) < 0), 0)


def _best_pair(
    s: torch.Tensor,
    n: torch.Tensor,
    linear: tuple[torch.Tensor, torch.Tensor],
    square: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kind: BlockType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole numbers (x, y) that s and n grow by: those of least change, (0, 0) where none is below 0.

    Tried are the s nearest to the real optimum and its neighbours, and the present one and its, each with
    the n that is best beside it.
    """
    import torch

    (p, r), (uu, uv, vv) = linear, square
    det = uu * vv - uv * uv
    optimum = ((p * vv - r * uv) / det).nan_to_num_(0, 0, 0).round_()
    best, x0, y0 = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for middle in (torch.zeros_like(p), optimum):
        for step in (0, -1, 1):
            x = (s + middle + step).clamp_(*kind.scales) - s
            y = ((r - x * uv) / vv).nan_to_num_(0, 0, 0).round_()
            y = (n + y).clamp_(*kind.offsets) - n
            change = x * (x * uu + 2 * y * uv - 2 * p) + y * (y * vv - 2 * r)
            better = change < best
            best, x0, y0 = change.where(better, best), x.where(better, x0), y.where(better, y0)
    return x0, y0


def _refine_steps(own: _Own, part: Blocks, levels: torch.Tensor) -> None:
    """Better d, or d and m, for each block in turn; changes `part` and `own`."""
    kind = part.kind
    per = kind.block // kind.sub
    for b in range(len(part.d)):
        at, sub = slice(b * kind.block, (b + 1) * kind.block), slice(b * per, (b + 1) * per)
        H, G = own.H[at, at], own.G[at]
        if kind.tied:
            own.take(at, _refine_zero(G, H, levels[at], part.d[b], part.m[b], part.n[b], kind))
            continue
        u = levels[at] * part.s[sub].repeat_interleave(kind.sub, 0)[: len(G)]
        Hu = H @ u
        p, uu = (G * u).sum(0), (u * Hu).sum(0)
        if not kind.affine:
            x = _stored_step(part.d[b], p / uu, p, uu, kind)
            part.d[b] += x
            own.take(at, u * x)
            continue
        v = -part.n[sub].repeat_interleave(kind.sub, 0)
        r, uv, vv = (G * v).sum(0), (Hu * v).sum(0), (v * (H @ v)).sum(0)
        x, y = _stored_pair(part.d[b], part.m[b], (p, r), (uu, uv, vv), kind)
        part.d[b] += x
        part.m[b] += y
        own.take(at, u * x + v * y)


def _refine_zero(
    G: torch.Tensor,
    H: torch.Tensor,
    levels: torch.Tensor,
    d: torch.Tensor,
    m: torch.Tensor,
    zero: torch.Tensor,
    kind: BlockType,
) -> torch.Tensor:
    """The zero point of a block, it or a neighbour, and the step beside it, of least loss; changes all three.

    Returns what the weights grow by: x (u - y) - d y, where d grows by x and the zero point by y.
    """
    import torch

    u = levels - zero
    Hu, Hv = H @ u, H.sum(1)
    p, r = (G * u).sum(0), G.sum(0)
    uu, uv, vv = (u * Hu).sum(0), Hv @ u, Hv.sum()
    best, x0, y0 = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for step in (0, -1, 1) if kind.offsets[0] < kind.offsets[1] else (0,):
        y = (zero + step).clamp_(*kind.offsets) - zero
        linear, across = p - y * r, uv - y * vv
        square = uu - y * (uv + across)
        x = _rounded(d, (linear + d * y * across) / square, kind)
        x = x.masked_fill_(d + x <= 0, 0)
        change = x * (x * square - 2 * (linear + d * y * across)) + d * y * (d * y * vv + 2 * r)
        better = change < best
        best, x0, y0 = change.where(better, best), x.where(better, x0), y.where(better, y0)
    change = (u - y0) * x0 - d * y0
    d += x0
    m.copy_(d)
    zero += y0
    return change


def _stored_step(
    d: torch.Tensor, x: torch.Tensor, p: torch.Tensor, uu: torch.Tensor, kind: BlockType
) -> torch.Tensor:
    """What takes d to the stored number nearest to d + x; 0 where x^2 uu - 2 x p is not below 0 then."""
    x = _rounded(d, x, kind)
    return x.masked_fill_(~(x * (x * uu - 2 * p) < 0), 0)


def _stored_pair(
    d: torch.Tensor,
    m: torch.Tensor,
    linear: tuple[torch.Tensor, torch.Tensor],
    square: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kind: BlockType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What d and m grow by: both at once, d to a stored number first and m beside it, then each by itself."""
    (p, r), (uu, uv, vv) = linear, square
    x = _rounded(d, (p * vv - r * uv) / (uu * vv - uv * uv), kind)
    y = _rounded(m, (r - x * uv) / vv, kind)
    worse = ~(x * (x * uu + 2 * y * uv - 2 * p) + y * (y * vv - 2 * r) < 0)
    x, y = x.masked_fill_(worse, 0), y.masked_fill_(worse, 0)
    left = p - x * uu - y * uv
    x = x + _stored_step(d + x, left / uu, left, uu, kind)
    left = r - x * uv - y * vv
    return x, y + _stored_step(m + y, left / vv, left, vv, kind)


def _rounded(d: torch.Tensor, x: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """What takes d to the stored number nearest to d + x; 0 where that is no finite number."""
    return as_stored(d + x, kind.stored).sub_(d).nan_to_num_(0, 0, 0)
