"""A model on disk, whatever its format: rows of any tensor by its Hugging Face name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class WeightSource(Protocol):
    """A model on disk: kernels, proofs and solvers read it so, and never see how a weight is stored."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name, without reading weights."""
        ...

    def dtype(self, name: str) -> str:
        """The name of the stored type, for tables and messages: "bf16", "q4_0", "gptq4"."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1 along the first axis: bf16 as its bits, uint16, or float32.

        C-contiguous and aligned; without a copy, and then read-only, where the format stores them so. It
        costs what the rows cost, save where a format can read whole tensors only.
        """
        ...

    def float32(self, name: str) -> Floats:
        """The whole tensor in float32, in the Hugging Face layout."""
        ...

    def nearest(self, name: str, start: int, rows: Floats) -> Floats | None:
        """What plain rounding to nearest in this tensor's own type and settings makes of another's rows.

        `rows` float32 [n, columns] stand for rows `start` and following; they are not changed. Same shape,
        float32; None where nothing here rounds to the type. It is what a faithful tensor is held against.
        """
        ...


def widened(rows: Array) -> Floats:
    """What `rows` returns, in float32: bf16 bits widened, a fresh array; float32 as it is.

    >>> widened(np.array([0x3F80, 0xC000], np.uint16)).tolist()
    [1.0, -2.0]
    """
    if rows.dtype != np.uint16:
        return rows
    bits = np.array(rows, np.uint32, order="C")
    bits <<= 16
    return bits.view(np.float32)
