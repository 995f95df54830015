"""Quantization kernels: rows of bf16 or f32 to ggml blocks, byte for byte as ggml's reference does.

Contract of the package (`quantize` is the only name that other packages need; `warm` and `compiled` let
them say when the first run compiles, for a `source_of` rows):

    quantize(qtype, rows, out, importance=None) -> flags

- `rows`: 2-D, C-contiguous [n_rows, n_cols]; uint16 (the bits of bf16) or float32; n_cols is a multiple of
  `qtype.block`.
- `out`: uint8, C-contiguous [n_rows, n_cols // block * size].
- `importance`: float32 [n_cols], finite and not negative, or None: how much each column counts in the search
  for scales, as llama.cpp's importance matrices say. Types ignore it or need it, see qtypes.
- flags: NONFINITE when an input is NaN or infinite, OVERFLOW when a finite input became infinite in a
  float16 of the output; 0 otherwise.
- Pure: no state, no allocation beyond a small scratch, GIL released, callable from many threads at once.

numba is imported by the first call, not with this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.qtypes import IGNORED, NEEDED, QType

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Importance = npt.NDArray[np.float32]
Kernel = Callable[[Array, Array], int]
RowKernel = Callable[[Array, Array, Array], None]

FOLDER = Path(__file__).parent

NONFINITE = 1
OVERFLOW = 2

SOURCES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
}
# Values that are widened at a time where a kernel takes float32 only: 512 KiB, which stays in a core's cache.
SLAB = 1 << 17
SUPER = 256  # values in a block of the k-quants
# Where the float16 scales lie in the blocks whose kernels do not look for infinite ones (ggml-common.h).
SCALES: dict[str, tuple[int, ...]] = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "iq3_s": (0,),
    "iq3_xxs": (0,),
    "iq2_s": (0,),
    "iq2_xs": (0,),
    "iq2_xxs": (0,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
NO_IMPORTANCE = np.empty(0, dtype=np.float32)
BEYOND = 1e9  # no value of a type with one float16 scale to a block
# Bits of a source by their width, and the unit of `out` where it is not bytes.
_UNSIGNED = {2: np.uint16, 4: np.uint32}
_UNITS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.float32}


def quantize(qtype: QType, rows: Array, out: Bytes, importance: Importance | None = None) -> int:
    """Quantize `rows` into `out` and give flags; see the contract above.

    Raises ValueError when the arrays break the contract.
    """
    _check(qtype, rows, out)
    rows = rows if rows.flags.aligned else rows.copy()
    if not rows.size:
        return 0
    if (importance is not None and takes_importance(qtype)) or _by_rows_only(qtype):
        return _by_rows(qtype, rows, out, importance)
    flat, target = rows.reshape(-1), out.reshape(-1)
    flags = _direct(qtype.name, rows.dtype)(_bits(flat, qtype), _units(target, qtype))
    # The other types report an overflow themselves.
    return flags or (_overflow(qtype, target) if qtype.block == SUPER else 0)


def takes_importance(qtype: QType) -> bool:
    """Whether an importance matrix changes the bytes of a type."""
    return qtype.importance != IGNORED


def _by_rows_only(qtype: QType) -> bool:
    """Whether one kernel quantizes with and without an importance matrix."""
    return qtype.name.startswith("iq")


def source_of(rows: Array) -> str:
    """What `warm` and `compiled` call rows of this type: "bf16" or "f32"."""
    return next(name for name, dtype in SOURCES.items() if dtype == rows.dtype)


def warm(qtypes: Iterable[QType], source: str, weighted: bool = False) -> None:
    """Load or compile the kernels from `source` ("bf16" or "f32") to each of `qtypes`.

    `weighted` means those for an importance matrix. Call it once before threads start; `compiled` says
    whether it will take seconds.
    """
    from dsconvert import compile

    for qtype in qtypes:
        rows = np.zeros((1, max(qtype.block, SUPER)), dtype=SOURCES[source])
        out = np.zeros((1, qtype.nbytes(rows.size)), dtype=np.uint8)
        needed = weighted or qtype.importance == NEEDED
        importance = np.ones(rows.size, dtype=np.float32) if needed else None
        try:
            quantize(qtype, rows, out, importance)
        except Exception:  # a damaged cache file fails in as many ways as pickle has
            compile.discard(FOLDER)
            quantize(qtype, rows, out, importance)
        compile.mark(FOLDER, _mark(qtype, source, weighted))


def compiled(qtypes: Iterable[QType], source: str, weighted: bool = False) -> bool:
    """Whether the kernels from `source` to each of `qtypes` are in the user's cache already."""
    from dsconvert.compile import marked

    return all(marked(FOLDER, _mark(qtype, source, weighted)) for qtype in qtypes)


def _mark(qtype: QType, source: str, weighted: bool) -> str:
    apart = weighted and takes_importance(qtype) and not _by_rows_only(qtype)
    return f"{source}-{qtype.name}" + ("-weighted" if apart else "")


def _check(qtype: QType, rows: Array, out: Bytes) -> None:
    if rows.dtype not in SOURCES.values() or rows.ndim != 2 or not rows.flags.c_contiguous:
        raise ValueError(f"rows must be C-contiguous uint16 or float32, is {rows.dtype} {rows.shape}")
    if rows.shape[1] % qtype.block:
        raise ValueError(f"{qtype.name} needs rows of a multiple of {qtype.block}, not {rows.shape[1]}")
    expected = (rows.shape[0], qtype.nbytes(rows.shape[1]))
    if out.dtype != np.uint8 or out.shape != expected or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous uint8 {expected}, is {out.dtype} {out.shape}")


def _direct(name: str, source: np.dtype[Any]) -> Kernel:
    """The kernel that takes the source's own bits."""
    from converters.gguf.kernels import blocks, widen

    kernels: dict[str, Kernel] = {
        "f32": widen.widen,
        "f16": widen.narrow_f16,
        "bf16": widen.copy_bf16 if source == np.uint16 else widen.narrow_bf16,
        "q8_0": blocks.q8_0,
        "q4_0": blocks.q4_0,
        "q4_1": blocks.q4_1,
        "q5_0": blocks.q5_0,
        "q5_1": blocks.q5_1,
    }
    if name not in kernels:
        from converters.gguf.kernels import kquants, plain_scales

        return (kquants.KERNELS | plain_scales.KERNELS)[name]
    return kernels[name]


def _by_rows(qtype: QType, rows: Array, out: Bytes, importance: Importance | None) -> int:
    """Quantize with an importance matrix: by way of float32 too, in slabs of whole rows."""
    from converters.gguf.kernels import widen

    columns = rows.shape[1]
    if importance is None:
        if qtype.importance == NEEDED:
            raise ValueError(f"{qtype.name} needs importance")
        importance = NO_IMPORTANCE
    elif importance.dtype != np.float32 or importance.shape != (columns,):
        raise ValueError(f"importance must be float32 [{columns}], is {importance.dtype} {importance.shape}")
    kernel = _row_kernel(qtype.name)
    weights = _read_only(np.require(importance, requirements=["C", "A"]))
    step = max(1, SLAB // columns)
    scratch = np.empty((min(step, len(rows)), columns), dtype=np.float32)
    flags = 0
    for start in range(0, len(rows), step):
        source = rows[start : start + step].reshape(-1)
        slab, part = scratch[: source.size // columns], out[start : start + step]
        flags |= widen.widen(_read_only(source.view(_UNSIGNED[source.itemsize])), slab.reshape(-1))
        kernel(slab, weights, part)
        flags |= _overflow(qtype, part.reshape(-1)) | (OVERFLOW if _beyond(qtype, slab) else 0)
    return flags


def _beyond(qtype: QType, values: Array) -> bool:
    """Whether a search may have lost a sub-block whose squares overflow: no scale in float16 reaches it."""
    return _by_rows_only(qtype) and bool(np.isfinite(values).all() and abs(values).max() >= BEYOND)


def _row_kernel(name: str) -> RowKernel:
    """The kernel of float32 rows and an importance matrix."""
    if name.startswith("iq"):
        from converters.gguf.kernels import grid_quants, nonlinear

        return (nonlinear.KERNELS | grid_quants.KERNELS)[name]
    from converters.gguf.kernels import weighted_blocks, weighted_kquants

    return (weighted_blocks.KERNELS | weighted_kquants.KERNELS)[name]


def _overflow(qtype: QType, out: Bytes) -> int:
    exponents = [out.reshape(-1, qtype.size)[:, at + 1] & 0x7C for at in SCALES[qtype.name]]
    return OVERFLOW if any(bool((exponent == 0x7C).any()) for exponent in exponents) else 0


def _bits(flat: Array, qtype: QType) -> Array:
    """Values as bits, [n] or [n_blocks, block], in the one array type that kernels are compiled for."""
    bits = flat.view(_UNSIGNED[flat.itemsize])
    return _read_only(bits if qtype.block == 1 else bits.reshape(-1, qtype.block))


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _units(out: Bytes, qtype: QType) -> Array:
    """The output in its kernel's units: [n] values or [n_blocks, size] bytes."""
    return out.view(_UNITS[qtype.name]) if qtype.block == 1 else out.reshape(-1, qtype.size)
