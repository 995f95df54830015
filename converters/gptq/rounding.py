"""Plain rounding to nearest in a GPTQ file's own settings: what error feedback is to be better than."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.gptq.pack import Packed, zero_points
from dsconvert.quantization.gptq_grid import Scheme, find_grid, to_codes

if TYPE_CHECKING:
    import torch

    Grid = tuple[torch.Tensor, torch.Tensor]

Floats = npt.NDArray[np.float32]


def nearest(rows: Floats, packed: Packed, bits: int, checkpoint_format: str, start: int = 0) -> Floats:
    """Outputs `start` and following of a linear, float32 [n, K], rounded as the tensor `packed` holds it.

    Its bits, its groups of inputs, whether it is symmetric (all zero points in the middle) and whether its
    ranges were searched for the least error are read from the tensor; the range of each group is found from
    the weights as they are. float32 [n, K].
    """
    import torch

    zeros = zero_points(packed, bits, checkpoint_format)
    scheme = Scheme(bits, -1, bool((zeros == 1 << (bits - 1)).all()))
    scales = torch.from_numpy(packed.scales[:, start : start + len(rows)].astype(np.float32))
    W = torch.from_numpy(np.array(rows, np.float32))
    inputs = {g: torch.from_numpy(np.flatnonzero(packed.g_idx == g)) for g in range(len(scales))}
    inputs = {g: some for g, some in inputs.items() if len(some)}
    plain = {g: find_grid(W[:, some].T, scheme) for g, some in inputs.items()}
    searched = {g: find_grid(W[:, some].T, scheme, W.new_ones(len(some))) for g, some in inputs.items()}
    chosen = searched if _searched(scales, plain, searched) else plain
    found = torch.empty_like(W)
    for g, some in inputs.items():
        scale, zero = (part[:, None] for part in chosen[g])
        found[:, some] = to_codes(W[:, some], scale, zero, scheme.maxq).sub_(zero).mul_(scale)
    return found.numpy()


def _searched(stored: torch.Tensor, plain: Mapping[int, Grid], searched: Mapping[int, Grid]) -> bool:
    """Whether stored scales [G, n] lie nearer to those of searched ranges than to those of whole ones.

    The group with the smallest scales for its weights shows it: where it is walked first its weights had
    not moved yet, and those that move grow.
    """

    def median(g: int, scale: torch.Tensor) -> float:
        return float((scale / plain[g][0]).log().median())

    least = min(plain, key=lambda g: median(g, stored[g]))
    off, away = median(least, stored[least]), median(least, searched[least][0])
    return abs(off - away) < abs(off)
