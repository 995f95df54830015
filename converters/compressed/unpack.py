"""What the stored tensors of a compressed-tensors linear mean, by the format's description alone.

Integers: a row's values lie one behind the other, without a gap, in the bytes of its little-endian words,
from the lowest bit on; weight = scale * (code - zero point), and the zero point is 2^(bits - 1) where none is
stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


def fields(words: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` values of each row of int32 words [R, W]: uint8 [R, count]."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    first = np.arange(count) * bits
    byte, shift = first // 8, (first % 8).astype(np.uint16)
    both = data[:, byte].astype(np.uint16)
    both |= data[:, np.minimum(byte + 1, data.shape[1] - 1)].astype(np.uint16) << np.uint16(8)
    both >>= shift
    both &= np.uint16((1 << bits) - 1)
    return both.astype(np.uint8)


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
