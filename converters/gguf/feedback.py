"""A linear's blocks by error feedback: same type, same bytes, less error of its outputs.

The grid is the one that ggml finds with an importance matrix, whose importance is the diagonal of H. The
codes are walked on it most active inputs first, then scales and codes may be refined in turn. A row that is
no better than the importance matrix's is that one's, so no row of a file is worse; so is one whose weights
are far worse, which only the inputs of this very text bear.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from converters.gguf import kernels
from converters.gguf.block_fields import FIELDS, Bytes, Floats, Unpacked, pack, unpack
from converters.gguf.qtypes import QType
from converters.gguf.rounding import dequantize
from dsconvert.quantization import error_feedback
from dsconvert.quantization.known_inputs import Inputs
from dsconvert.quantization.refinement import refine
from dsconvert.quantization.static_blocks import Blocks, walk

if TYPE_CHECKING:
    import torch

FAR = 8.0  # times an importance matrix's squared error of weights: 2 and 3 of 155,520 rows of SmolLM2-135M
SLAB = 1 << 26  # weights that are solved at once: 256 MB of float32, and three times that beside it


@dataclass(frozen=True, eq=False)
class Solved:
    """Rows of blocks, uint8 [N, bytes per row], in the order of W; the rest as LinearSolved has it.

    `rtn_loss` is the loss of the importance matrix's rows, `kept` how many rows are theirs; `flags` are the
    kernels', of which any but 0 tells that the rows are worth nothing.
    """

    rows: Bytes
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    fell_back: str | None
    kept: int = 0
    flags: int = 0


def solvable(qtype: QType) -> bool:
    """Whether a type's codes can be chosen by error feedback."""
    return qtype.name in FIELDS


def solve(W: torch.Tensor, inputs: Inputs, qtype: QType, rounds: int, importance: Floats | None) -> Solved:
    """Blocks of W [N, K] for which tr((W-Q) H (W-Q)^T) is small.

    `importance` is that of the file that it is held against, None for none; no row is worse than its. Where
    error feedback is impossible all rows are that file's, and `fell_back` says why.
    """
    dead, damp = int(inputs.dead.sum()), inputs.factor.damp if inputs.factor else 0.0
    parts: list[Bytes] = []
    loss, plain_loss, kept, flags = 0.0, 0.0, 0, 0
    for first in range(0, len(W), max(1, SLAB // W.shape[1])):
        part = W[first : first + max(1, SLAB // W.shape[1])]
        values = part.cpu().numpy()
        plain, told = weighted(values, qtype, importance)
        flags |= told
        if inputs.factor is None or not solvable(qtype):
            error = part.T - _tensor(dequantize(plain, qtype), part)
            parts.append(plain)
            plain_loss += error_feedback.loss(error, inputs.H)
            loss, kept = plain_loss, kept + len(plain)
            continue
        start = plain if importance is inputs.importance else weighted(values, qtype, inputs.importance)[0]
        blocks = refined(part.T.contiguous(), inputs, to_blocks(start, qtype, part), rounds)
        rows = from_blocks(blocks, qtype)
        better, losses, plain_losses = _compared(part.T, inputs, rows, plain, qtype)
        parts.append(np.where(better.cpu().numpy()[:, None], rows, plain))
        loss += float(losses.where(better, plain_losses).sum())
        plain_loss, kept = plain_loss + float(plain_losses.sum()), kept + int((~better).sum())
    return Solved(np.concatenate(parts), loss, plain_loss, damp, dead, inputs.why, kept, flags)


def refined(Wt: torch.Tensor, inputs: Inputs, start: Blocks, rounds: int) -> Blocks:
    """The blocks of W^T [K, N] by the walk on the grid of `start`, then so many rounds of refinement."""
    assert inputs.factor is not None  # what has none keeps its rows
    shift = inputs.factor.shift
    blocks = replace(start, codes=walk(Wt, inputs.factor, inputs.columns, start))
    return refine(Wt, inputs.H, shift, blocks, inputs.columns, rounds)


def weighted(W: Floats, qtype: QType, importance: Floats | None) -> tuple[Bytes, int]:
    """What an importance matrix, or None, makes of W [N, K]: uint8 [N, bytes per row]; the kernels' flags."""
    import torch

    out = np.empty((len(W), qtype.nbytes(W.shape[1])), np.uint8)
    step = -(-len(W) // torch.get_num_threads())

    def part(first: int) -> int:
        rows = slice(first, first + step)
        return kernels.quantize(qtype, np.ascontiguousarray(W[rows]), out[rows], importance)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        flags = pool.map(part, range(0, len(W), step))
        return out, reduce(or_, flags, 0)


def to_blocks(rows: Bytes, qtype: QType, like: torch.Tensor) -> Blocks:
    """Rows of blocks as numbers, on the device and in the dtype of `like`."""
    import torch

    found = unpack(rows, qtype)
    numbers = (_tensor(part, like) for part in (found.d, found.m, found.s, found.n))
    codes = torch.from_numpy(np.ascontiguousarray(found.codes.T)).to(like.device)
    return Blocks(FIELDS[qtype.name].kind, codes, *numbers)


def from_blocks(blocks: Blocks, qtype: QType) -> Bytes:
    """Rows of blocks, uint8 [N, bytes per row]."""
    codes, d, m, s, n = (
        np.ascontiguousarray(part.cpu().numpy().T)
        for part in (blocks.codes, blocks.d, blocks.m, blocks.s, blocks.n)
    )
    return pack(Unpacked(codes, d, m, s.astype(np.int16), n.astype(np.int16)), qtype)


def _tensor(rows: npt.NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """The transpose of an array, on the device and in the dtype of `like`."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(rows.T)).to(like.device, like.dtype)


def _compared(
    Wt: torch.Tensor, inputs: Inputs, rows: Bytes, plain: Bytes, qtype: QType
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rows are better than the `plain` ones, with the damping and without; losses [N] of both."""
    assert inputs.factor is not None
    noises, found = [], []
    for blocks in (rows, plain):
        error = Wt - _tensor(dequantize(blocks, qtype), Wt)
        noises.append(error.square().sum(0))
        found.append(error_feedback.both_losses(error, inputs.factor, inputs.columns, inputs.dead))
    (losses, damped), (plain_losses, plain_damped) = found
    near = noises[0] <= FAR * noises[1]
    return near & (losses <= plain_losses) & (damped < plain_damped), losses, plain_losses
