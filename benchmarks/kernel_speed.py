"""Times each quantization kernel beside ggml's own, on one core, in one process.

    python benchmarks/kernel_speed.py [--types q4_0,q4_k] [--values 1048576] [--rounds 9] [--weighted]

Speeds are GB of bf16 input for each second of processor time. Ours reads bf16; ggml's reference, from
the PyPI package libggml-python, reads float32 that was widened before. Runs alternate, so that both meet
the same machine; a row gives the medians and the median of the ratios of neighbouring runs. The bytes are
compared as well. With --weighted, and for types that need one always, both get an importance matrix.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [
    str(ROOT),
    str(ROOT / "tests" / "support"),
]  # not this folder, whose gguf.py hides the library

import ggml_oracle  # noqa: E402

from converters.gguf.kernels import quantize, warm  # noqa: E402
from converters.gguf.qtypes import IGNORED, NEEDED, QTYPES  # noqa: E402

COLUMNS = 2048


def seconds(function: Callable[[], object]) -> float:
    """Processor time of one call in this thread."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def compare(name: str, values: int, rounds: int, weighted: bool) -> str:
    """One row of the table: our speed, ggml's, the ratio, the first call's seconds, whether bytes agree."""
    kind = QTYPES[name]
    weights = np.random.default_rng(1).standard_normal((values // COLUMNS, COLUMNS), dtype=np.float32)
    bf16 = ((weights * np.float32(0.02)).view(np.uint32) >> 16).astype(np.uint16)
    f32 = (bf16.astype(np.uint32) << 16).view(np.float32)
    out = np.empty((len(bf16), kind.nbytes(COLUMNS)), dtype=np.uint8)
    matrix = None
    if kind.importance == NEEDED or (weighted and kind.importance != IGNORED):
        matrix = np.random.default_rng(2).lognormal(size=COLUMNS).astype(np.float32)
    first = seconds(lambda: warm([kind], "bf16", matrix is not None))
    same = quantize(kind, bf16, out, matrix) == 0
    same &= bool((out == ggml_oracle.quantize(name, f32, matrix)).all())
    pairs = [
        (
            seconds(lambda: quantize(kind, bf16, out, matrix)),
            seconds(lambda: ggml_oracle.quantize(name, f32, matrix)),
        )
        for _ in range(rounds)
    ]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    speed = values * 2e-9
    return (
        f"{name:7} {speed / ours:8.3f} {speed / theirs:8.3f} {ratio:7.1f}   {first:6.2f}   "
        f"{'same' if same else 'DIFFERENT'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    blocks = [row.name for row in QTYPES.values() if row.block > 1]
    parser.add_argument("--types", default=",".join(blocks))
    parser.add_argument("--values", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--weighted", action="store_true", help="with an importance matrix")
    options = parser.parse_args()
    if not ggml_oracle.available():
        sys.exit(ggml_oracle.MISSING)
    print("type        ours     ggml   ratio   first s  bytes      (GB/s of bf16, one core)")
    for name in options.types.split(","):
        print(
            compare(name, options.values // COLUMNS * COLUMNS, options.rounds, options.weighted), flush=True
        )


if __name__ == "__main__":
    main()
