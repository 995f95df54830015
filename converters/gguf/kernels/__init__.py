"""Quantization kernels: rows of bf16, f16 or f32 to ggml blocks, byte for byte as ggml's reference does.

Contract of the package (`quantize` is the only name that other packages use):

    quantize(qtype, rows, out) -> flags

- `rows`: 2-D, C-contiguous [n_rows, n_cols]; uint16 (the bits of bf16), float16 or float32; n_cols is a
  multiple of `qtype.block`.
- `out`: uint8, C-contiguous [n_rows, n_cols // block * size].
- flags: NONFINITE when an input is NaN or infinite, OVERFLOW when a finite input became infinite in a
  float16 of the output; 0 otherwise.
- Pure: no state, no allocation beyond a small scratch, GIL released, callable from many threads at once.
"""

from __future__ import annotations

NONFINITE = 1
OVERFLOW = 2
