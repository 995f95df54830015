"""Memory that has been freed and is still held."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return what is free to the system; a C library other than glibc keeps it, or not, as it likes.

    glibc keeps freed pieces of up to 32 MB for the next ones: after the activations of a few windows some
    hundred MB, just when a solver needs its largest matrices.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
