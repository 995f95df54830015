"""Usable cores and free memory; gives memory and mapped pages back; pauses the garbage collector."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def usable_cores() -> int:
    """How many cores this process may use, one at the least; all of them where the system keeps no such list.

    Linux counts what `taskset` and a container's cpuset leave; macOS has no `os.sched_getaffinity`.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> float:
    """Bytes that can be taken without swapping; half of all memory where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def give_back() -> None:
    """Return what is free to the system; a C library other than glibc keeps it, or not, as it likes.

    glibc keeps freed pieces of up to 32 MB for the next ones: after the activations of a few windows some
    hundred MB, just when a solver needs its largest matrices.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def let_go(mapped: mmap.mmap, start: int, count: int) -> None:
    """Let the pages of a mapped file go that hold `count` bytes from `start` on, once they were used.

    They count as this process's memory as long as nothing else wants it; the file stays mapped, and a page
    that is used again comes back. Systems without madvise keep them.
    """
    if hasattr(mapped, "madvise") and count > 0:
        first = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, start + count - first)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Leave garbage alone for a while: a vocabulary is a million objects, none of them garbage, and the
    collector would go through them again and again, for a quarter of the time that a start takes."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
