"""Python's garbage collector, out of the way while millions of objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
