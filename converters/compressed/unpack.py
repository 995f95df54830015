"""What the stored tensors of a compressed-tensors linear mean, by the format's description alone.

Integers: weight = scale * (code - zero point), and the zero point is 2^(bits - 1) where none is stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


def integers(
    codes: npt.NDArray[np.uint8], scales: Floats, zeros: Array | None, group: Array, bits: int
) -> Floats:
    """The weights of some outputs: float32 [n, K].

    `codes` [n, K], `scales` float32 [n, G], `zeros` [n, G] or None, `group` [K] the group of each input.
    """
    if zeros is None:
        weights = codes.astype(np.float32) - np.float32(1 << (bits - 1))
    else:
        weights = codes.astype(np.float32) - zeros.astype(np.float32)[:, group]
    weights *= scales[:, group]
    return weights
