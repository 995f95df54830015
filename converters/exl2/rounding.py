"""Plain rounding to nearest in an EXL2 file's own settings: what error feedback is to be better than."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.exl2.grid import MULTIPLIERS, find_grid, from_codes, to_codes
from converters.exl2.pack import Packed, stored_groups

Floats = npt.NDArray[np.float32]
TRIED = MULTIPLIERS[::4]  # of the largest scale; the best of them is within .1 dB of the best of all


def nearest(rows: Floats, packed: Packed) -> Floats:
    """Some outputs of a linear, float32 [n, K], rounded as the tensor `packed` holds it: float32 [n, K].

    The order of the inputs and the rows and bits of each group are the tensor's, the scales those that cost
    the unmoved weights least, one squared error being as bad as another.
    """
    import torch

    order = torch.from_numpy(np.argsort(packed.q_invperm))
    Wt = torch.from_numpy(np.array(rows, np.float32)).T[order].contiguous()
    found, start = torch.empty_like(Wt), 0
    for bits, count in stored_groups(packed):
        part = Wt[start : start + count]
        scale = find_grid(part, bits, part.new_ones(count), TRIED).scale
        found[order[start : start + count]] = from_codes(to_codes(part, scale, bits), scale, bits)
        start += count
    return np.ascontiguousarray(found.T.numpy())
