"""Plain rounding to nearest on the grid of a file's own scales: what error feedback is to be better than."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsconvert.quantization.gptq_grid import Scheme, find_grid, to_codes

if TYPE_CHECKING:
    import torch

    Grid = tuple[torch.Tensor, torch.Tensor]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64] | npt.NDArray[np.int32]


def nearest_on_grid(rows: Floats, stored: Floats, group: Indices, scheme: Scheme) -> Floats:
    """Some outputs of a linear, float32 [n, K], rounded to nearest with one grid for each group of inputs.

    `group` [K] is the group of each input, `scheme` the bits and the symmetry; its group size is not read.
    The range of each group is found from the weights as they are: whole, or searched for the least error,
    whichever `stored`, the scales float32 [G, n] of a file, lie nearer to. float32 [n, K].
    """
    import torch

    scales, W = torch.from_numpy(np.array(stored, np.float32)), torch.from_numpy(np.array(rows, np.float32))
    inputs = {g: torch.from_numpy(np.flatnonzero(group == g)) for g in range(len(scales))}
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
