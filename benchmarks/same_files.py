"""Compares whole files with llama-quantize's: every tensor's type and bytes, for every mixture.

    python benchmarks/same_files.py MODEL_PATH... [--quants q4_0,q4_k_m] [--imatrix FILE | --calib TEXT]

For each model (a checkpoint folder, `sample:`) our bf16 GGUF goes through llama_model_quantize, and the
checkpoint through ours, both with the importance matrix if there is one: a file that is given, or with
--calib the one that `dsconvert imatrix` makes of the text (builtin, c4, a file). ggml's own reader reads the
matrix for llama_model_quantize. Exit code 1 when any tensor differs. See llama_quantize.py for the libraries.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.pop(0)  # this folder, whose gguf.py hides the library

from converters.gguf import importance_file
from converters.gguf.convert import convert
from converters.gguf.file_types import MIXTURES
from converters.gguf.mixtures import needs_importance
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.outputs import open_reference
from dsconvert.calibration.request import CalibrationRequest

QUANTIZE = Path(__file__).with_name("llama_quantize.py")
SAMPLES, LENGTH = 16, 256  # windows of the calibration text, and their tokens


def ours(model: str, quant: str, out: Path, imatrix: Path | None = None) -> None:
    for _ in convert(Options(model, (quant,), out, effort="off", force=True, imatrix=imatrix)):
        pass


def compare(first: Path, second: Path) -> tuple[int, list[str]]:
    """How many tensors were compared, and the names of those whose type or bytes differ."""
    a, b = open_gguf(first).tensors, open_gguf(second).tensors
    different = sorted(set(a) ^ set(b))
    for name in set(a) & set(b):
        same = a[name].qtype == b[name].qtype and np.array_equal(a[name].blocks(), b[name].blocks())
        if not same:
            different.append(f"{name} ({a[name].qtype.name}, {b[name].qtype.name})")
    return len(set(a) | set(b)), different


def measured(model: str, text: str, out: Path) -> Path:
    """The importance matrix of a model on a calibration text."""
    options = importance_file.Options(out, CalibrationRequest(text, SAMPLES, LENGTH), force=True)
    for _ in importance_file.make(options, lambda: open_reference(model)):
        pass
    return out


def defaults(with_imatrix: bool) -> list[str]:
    """Every quantization that can be made."""
    return [name for name in MIXTURES if name != "f32" and (with_imatrix or not needs_importance(name))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--quants", help="default: all that there are")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix that fits every model given")
    parser.add_argument("--calib", metavar="TEXT", help="make each model's matrix of this text")
    parser.add_argument("--package", help="folder of the unpacked npm package")
    given = parser.parse_args()
    weighted = given.imatrix is not None or given.calib is not None
    quants = (given.quants or ",".join(defaults(weighted))).split(",")
    package = ["--package", given.package] if given.package else []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        source, mine, theirs = (Path(folder) / f"{name}.gguf" for name in ("bf16", "ours", "theirs"))
        for model in given.models:
            ours(model, "bf16", source)
            imatrix = given.imatrix
            if given.calib is not None:
                imatrix = measured(model, given.calib, Path(folder) / "imatrix.gguf")
            extra = [*package, *(["--imatrix", str(imatrix)] if imatrix is not None else [])]
            for quant in quants:
                ours(model, quant, mine, imatrix)
                command = [sys.executable, str(QUANTIZE), str(source), str(theirs), quant, *extra]
                subprocess.run(command, check=True, capture_output=True)
                count, different = compare(mine, theirs)
                failed += len(different)
                print(
                    f"{model:<40} {quant:<8} {count:4d} tensors, {len(different)} differ",
                    *different[:3],
                    flush=True,
                )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
