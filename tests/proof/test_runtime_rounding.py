"""Rounding of activations against the conversions that llama.cpp's own library makes."""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.gguf.qtypes import FOREIGN, QTYPES

torch = pytest.importorskip("torch")
from dsconvert.proof.runtime_rounding import ROUNDINGS  # noqa: E402
from dsconvert.runtimes.llama_h import open_library  # noqa: E402

IDS = {kind.name: kind.ggml for kind in (*QTYPES.values(), *FOREIGN)}
FROM_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
# What ggml rounds activations to: its id, and how a row of blocks is read back.
BLOCKS: dict[int, npt.DTypeLike] = {
    8: [("d", "<f2"), ("q", "i1", 32)],  # q8_0
    9: [("d", "<f2"), ("s", "<f2"), ("q", "i1", 32)],  # q8_1
    15: [("d", "<f4"), ("q", "i1", 256), ("sums", "<i2", 16)],  # q8_k
}


class Traits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    found, _ = open_library()
    found.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    found.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
    found.ggml_cpu_init()
    return found


def rounded_by_ggml(library: ctypes.CDLL, name: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """What llama.cpp multiplies weights of this type with, given float32 rows."""
    kind = library.ggml_get_type_traits_cpu(IDS[name]).contents.vec_dot_type
    if kind == QTYPES["f32"].ggml:
        return rows
    out = np.zeros(rows.nbytes, np.uint8)
    FROM_FLOAT(library.ggml_get_type_traits_cpu(kind).contents.from_float)(
        rows.ctypes.data, out.ctypes.data, rows.size
    )
    if kind == QTYPES["f16"].ggml:
        return out[: 2 * rows.size].view(np.float16).astype(np.float32).reshape(rows.shape)
    if kind == QTYPES["bf16"].ggml:
        bits = out[: 2 * rows.size].view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(rows.shape)
    dtype = np.dtype(BLOCKS[kind])
    count = rows.size // dtype["q"].shape[0]
    blocks = out[: count * dtype.itemsize].view(dtype)
    return (blocks["d"].astype(np.float32)[:, None] * blocks["q"]).reshape(rows.shape)


def test_every_type_that_is_read_has_its_rounding() -> None:
    read = {kind.name for kind in FOREIGN if kind.name in ("iq1_s", "iq1_m", "nvfp4", "q1_0")}
    assert ROUNDINGS.keys() == QTYPES.keys() | read


@pytest.mark.parametrize("name", ROUNDINGS)
def test_values_are_those_of_the_runtime(name: str, library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((64, 1024), np.float32) * 10 ** rng.uniform(-4, 3, (64, 1)).astype(np.float32)
    rows[0] = 0
    rows[1, :512] = 0
    rows[2] = np.abs(rows[2])
    rows[3, ::7] *= 300  # the few large channels of a real model
    expected = rounded_by_ggml(library, name, rows)
    found = ROUNDINGS[name](torch.from_numpy(rows)).numpy()
    if name != "f32":
        assert not np.array_equal(found, rows)
    np.testing.assert_array_equal(found, expected)
