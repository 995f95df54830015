"""How often `verify` finds one row that is 1.05 times too long, by the row's length and the output's type.

    python benchmarks/scaled_rows.py [--lengths 256,1024,4096] [--kinds gptq:2,gptq:3,exl2:3,q2_k]

A model of one random block whose `down_proj` has rows of the length is quantized with the built-in text. Its
256 rows are scaled one at a time, and each time the whole matrix is judged as `verify` judges it. Printed:
the share found, and the faults that the faithful matrix has (none, or the rule is wrong).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import tiny  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from converters.outputs import open_output  # noqa: E402
from dsconvert.checkpoints.checkpoint import open_checkpoint  # noqa: E402
from dsconvert.cli import cli  # noqa: E402
from dsconvert.proof.row_faults import faults  # noqa: E402
from dsconvert.proof.row_sums import Matrix  # noqa: E402

NAME = "model.layers.0.mlp.down_proj.weight"
TEXT = ("--calib", "builtin", "--calib-samples", "16", "--calib-len", "256")
Floats = npt.NDArray[np.float32]


def quantized(model: Path, kind: str, folder: Path) -> tuple[Floats, str]:
    """The matrix as an output of `kind` holds it, and the type's name there."""
    method, _, rate = kind.partition(":")
    out = folder / kind.replace(":", "-")
    words = {
        "gptq": ["gptq", model, "--bits", rate, *TEXT, "-o", out],
        "exl2": ["exl2", model, "--bpw", rate, *TEXT, "-o", out],
    }.get(method, ["gguf", model, "-q", kind, "--pure", "-o", out.with_suffix(".gguf")])
    made = CliRunner().invoke(cli, [*map(str, words), "--effort", "off", "--quiet"])
    if made.exit_code:
        sys.exit(made.output)
    opened = open_output(Path(str(words[words.index("-o") + 1])))
    return opened.source.float32(NAME), opened.source.dtype(NAME)


def found(base: Floats, candidate: Floats, kind: str) -> tuple[str, ...]:
    """Where the rules of `verify` see faults in a matrix."""
    matrix = Matrix().add(base, candidate)
    return tuple(fault.where for fault in faults(matrix, NAME, kind, 64, lambda i: (base[i], candidate[i])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="256,1024,4096")
    parser.add_argument("--kinds", default="gptq:2,gptq:3,gptq:4,exl2:2.6,exl2:3,q2_k")
    asked = parser.parse_args()
    for length in map(int, asked.lengths.split(",")):
        with tempfile.TemporaryDirectory() as work:
            model = tiny.tiny_checkpoint(Path(work) / "model", layers=1, d=256, ff=length, vocab=2048)
            base = open_checkpoint(model).float32(NAME)
            for kind in asked.kinds.split(","):
                candidate, name = quantized(model, kind, Path(work))
                seen = 0
                for row in range(len(base)):
                    harmed = candidate.copy()
                    harmed[row] *= np.float32(1.05)
                    seen += f"row {row}" in found(base, harmed, name)
                faithful = len(found(base, candidate, name))
                print(f"{length:>5}  {kind:<9} {seen / len(base):6.1%} found, {faithful} false", flush=True)


if __name__ == "__main__":
    main()
