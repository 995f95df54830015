"""What tests share with test_kernels."""

from __future__ import annotations

import ggml_oracle
import numpy as np
import numpy.typing as npt

from converters.gguf import kernels
from converters.gguf.qtypes import NEEDED, QTYPES

Rows = npt.NDArray[np.float32]


def as_float32(rows: npt.NDArray[np.generic]) -> Rows:
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def even_importance(name: str, columns: int) -> Rows | None:
    """None, or the matrix that weighs all columns the same for a type that needs one."""
    return np.ones(columns, np.float32) if QTYPES[name].importance == NEEDED else None


def ours(name: str, rows: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.uint8], int]:
    kind = QTYPES[name]
    out = np.full((rows.shape[0], kind.nbytes(rows.shape[1])), 0xA5, dtype=np.uint8)
    return out, kernels.quantize(kind, rows, out, even_importance(name, rows.shape[1]))


def assert_same_bytes(name: str, rows: npt.NDArray[np.generic]) -> None:
    kind = QTYPES[name]
    got, _ = ours(name, rows)
    want = ggml_oracle.quantize(name, as_float32(rows), even_importance(name, rows.shape[1]))
    wrong = np.flatnonzero((got.reshape(-1, kind.size) != want.reshape(-1, kind.size)).any(axis=1))
    if wrong.size:
        block = as_float32(rows).reshape(-1, kind.block)[wrong[0]]
        first = f"{got.reshape(-1, kind.size)[wrong[0]]} {want.reshape(-1, kind.size)[wrong[0]]}"
        raise AssertionError(f"{wrong.size} blocks differ; block {wrong[0]} {block}: {first}")
