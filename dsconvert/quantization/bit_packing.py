"""Small integers as the 32-bit words of GPTQ and EXL2 files.

Down a column, values of 1 to 8 bits are one continuous stream from the lowest bit of the first word on; 32
of them fill a whole number of words at every width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FIELDS = 32  # values that fill a whole number of words at every width


def pack_rows(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int32]:
    """Pack values [R, C] below 2^bits along the rows: int32 [R*bits/32, C]; R is a multiple of 32."""
    rows, columns = values.shape
    fields = values.reshape(rows // FIELDS, FIELDS, columns)
    words = np.zeros((rows // FIELDS, bits, columns), np.uint32)
    for j in range(FIELDS):
        word, shift = divmod(j * bits, 32)
        field = fields[:, j].astype(np.uint32)
        words[:, word] |= field << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= field >> np.uint32(32 - shift)
    return words.reshape(-1, columns).view(np.int32)


def unpack_rows(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack_rows`: int32 [R*bits/32, C] to uint8 [R, C]."""
    rows, columns = words.shape
    units = np.ascontiguousarray(words).view(np.uint32).reshape(rows // bits, bits, columns)
    values = np.empty((rows // bits, FIELDS, columns), np.uint8)
    for j in range(FIELDS):
        word, shift = divmod(j * bits, 32)
        field = units[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            field |= units[:, word + 1] << np.uint32(32 - shift)
        values[:, j] = field & np.uint32((1 << bits) - 1)
    return values.reshape(-1, columns)
