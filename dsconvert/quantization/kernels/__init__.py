"""The inner loops of block-wise formats on a CPU, compiled: importing a module of this package imports numba.

All take what has a column per output, [rows, N], C-contiguous, float32 or float64, and the outputs `start` to
`stop` - 1 that they are to do: outputs know nothing of each other, so `by_outputs` shares them among threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LANES = 64  # outputs that are done at once: a row of them fills a few registers, 128 rows a core's cache


def by_outputs(kernel: Callable[..., None], outputs: int, *given: Any) -> None:
    """Call `kernel` for all outputs, in as many threads as torch has; tensors are given as arrays."""
    import torch

    from dsconvert import compile

    arrays = [part.numpy() if isinstance(part, torch.Tensor) else part for part in given]
    try:
        kernel(*arrays, 0, 0)  # loaded, or compiled, before threads need it
    except Exception:  # a damaged cache file fails in as many ways as pickle has
        compile.discard(FOLDER)
        kernel(*arrays, 0, 0)
    share = max(1, -(-outputs // (LANES * torch.get_num_threads()))) * LANES
    starts = range(0, outputs, share)
    if len(starts) == 1:
        kernel(*arrays, 0, outputs)
        return
    with ThreadPoolExecutor(len(starts)) as pool:
        list(pool.map(lambda start: kernel(*arrays, start, min(start + share, outputs)), starts))
