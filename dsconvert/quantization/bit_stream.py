"""Values of a few bits in rows of little-endian words, as readers take them: by the description alone.

A row's values lie one behind the other, without a gap, from the lowest bit of its first byte on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def fields(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` values of each row of 32-bit words [R, W]: uint8 [R, count]."""
    data = np.ascontiguousarray(words, words.dtype.newbyteorder("<")).view(np.uint8)
    first = np.arange(count) * bits
    byte, shift = first // 8, (first % 8).astype(np.uint16)
    both = data[:, byte].astype(np.uint16)
    both |= data[:, np.minimum(byte + 1, data.shape[1] - 1)].astype(np.uint16) << np.uint16(8)
    both >>= shift
    both &= np.uint16((1 << bits) - 1)
    return both.astype(np.uint8)
