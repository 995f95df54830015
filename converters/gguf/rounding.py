"""What a tensor type makes of values: the numbers of stored blocks, and plain rounding to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf import kernels
from converters.gguf.qtypes import NEEDED, QTYPES, QType

Floats = npt.NDArray[np.float32]
# Numbers that are stored as they are: type -> NumPy's.
PLAIN = {"f32": "<f4", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}


def dequantize(blocks: npt.NDArray[Any], qtype: QType) -> Floats:
    """The values that stored rows uint8 [rows, bytes per row] stand for: float32 [rows, columns].

    By the gguf library's dequantizers; raises NotImplementedError or ValueError for a type that it has not.
    """
    import gguf

    if qtype.name in PLAIN:
        return np.array(blocks).view(PLAIN[qtype.name]).astype(np.float32, copy=False)
    kind = gguf.GGMLQuantizationType(qtype.ggml)
    with np.errstate(all="ignore"):  # a stranger's scales may be infinite: the proof says so
        return np.asarray(gguf.dequantize(np.ascontiguousarray(blocks), kind), dtype=np.float32)


def nearest(rows: Floats, qtype: QType) -> Floats | None:
    """What quantizing rows [n, columns] to a type without an importance matrix makes of them.

    Types that need a matrix get one of ones. None for a type that is not written here, or whose blocks the
    rows do not fill.
    """
    rows = np.require(rows, np.float32, ("C", "A"))
    if qtype.name not in QTYPES or rows.shape[-1] % qtype.block:
        return None
    blocks = np.empty((len(rows), qtype.nbytes(rows.shape[-1])), np.uint8)
    flat = np.ones(rows.shape[-1], np.float32) if qtype.importance == NEEDED else None
    kernels.quantize(qtype, rows, blocks, flat)
    return dequantize(blocks, qtype)
