"""ggml's own quantizers through ctypes: the byte oracle of the kernel tests and benchmarks.

The library comes from the PyPI package libggml-python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.gguf.qtypes import QTYPES

MISSING = "needs ggml's libraries: pip install libggml-python"


def available() -> bool:
    """Whether ggml's libraries are installed."""
    return importlib.util.find_spec("libggml") is not None


@functools.cache
def library() -> ctypes.CDLL:
    """ggml's base library; raises FileNotFoundError saying what to install."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(MISSING)
    found = sorted(Path(spec.origin).parent.glob("lib*/*ggml-base*"))
    if not found:
        raise FileNotFoundError(MISSING)
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return ggml


def quantize(
    qtype: str, rows: npt.NDArray[np.float32], imatrix: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """The bytes that ggml_quantize_chunk makes of `rows`.

    `rows` is float32 [n_rows, n_cols], `imatrix` float32 [n_cols]; gives uint8 [n_rows, row bytes].
    """
    kind = QTYPES[qtype]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    n_rows, n_cols = rows.shape
    out = np.zeros((n_rows, kind.nbytes(n_cols)), dtype=np.uint8)
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
    written = library().ggml_quantize_chunk(
        kind.ggml,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        n_cols,
        None if weights is None else weights.ctypes.data,
    )
    if written != out.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes for {qtype}, expected {out.nbytes}")
    return out


def bearable(qtype: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`rows` with 1 where ggml would end the process: on the grids of iq2 and iq3 an error that overflows.

    Such values are far beyond what the float16 scales of these types hold, so that a conversion refuses them.
    """
    return np.where(np.abs(rows) < 1e9, rows, np.float32(1)) if qtype[:3] in ("iq2", "iq3") else rows
