"""Compares whole files with llama.cpp's: every tensor's type and bytes, for every mixture.

    python benchmarks/same_files.py MODEL_PATH... [--quants q4_0,q4_k_m] [--imatrix FILE | --calib TEXT]
    python benchmarks/same_files.py MODEL_PATH... --converter PATH/convert_hf_to_gguf.py

For each model (a checkpoint folder, `sample:`, or tiny:NAME, a random one of tests/support/tiny_experts.py)
our f32 GGUF goes through llama_model_quantize, and the checkpoint through ours, both with the importance
matrix if there is one: a file that is given, or with --calib the one that `dsconvert imatrix` makes of the
text (builtin, c4, a file). ggml's own reader reads the matrix for llama_model_quantize. With --converter our
f32 and bf16 files are held against those of llama.cpp's converter instead. Exit code 1 when any tensor
differs. llama_quantize.py and llama_convert.py say what they need.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import llama_convert
import llama_quantize
import numpy as np

from converters.gguf import importance_file
from converters.gguf.convert import convert
from converters.gguf.file_types import MIXTURES
from converters.gguf.mixtures import needs_importance
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.outputs import open_reference
from dsconvert.calibration.request import CalibrationRequest

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
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
    """Every quantization that llama-quantize makes too: it has no file type for nvfp4."""
    made = (name for name in MIXTURES if name not in ("f32", "nvfp4"))
    return [name for name in made if with_imatrix or not needs_importance(name)]


def checkpoint(model: str, folder: Path) -> str:
    """The model as a path; of tiny:NAME a random one made in the folder."""
    kind, _, name = model.partition(":")
    if kind != "tiny":
        return model
    sys.path.append(str(SUPPORT))
    import tiny_experts

    return str(tiny_experts.checkpoint(folder / f"tiny-{name}", name))


def told(model: str, quant: str, first: Path, second: Path) -> int:
    """Print how two files compare; how many tensors differ."""
    count, different = compare(first, second)
    print(f"{model:<40} {quant:<8} {count:4d} tensors, {len(different)} differ", *different[:3], flush=True)
    return len(different)


def against_converter(model: str, path: str, script: Path, folder: Path) -> int:
    """Hold our files of 32 and 16 bits against those of llama.cpp's converter; how many tensors differ."""
    failed = 0
    for quant in ("f32", "bf16"):
        mine, theirs = (folder / f"{name}.gguf" for name in ("ours", "theirs"))
        ours(path, quant, mine)
        apart(llama_convert.run, script, path, theirs, quant)
        failed += told(model, quant, mine, theirs)
    return failed


def against_quantizer(model: str, path: str, given: argparse.Namespace, folder: Path) -> int:
    """Hold our files of every quantization against llama_model_quantize's; how many tensors differ."""
    source, mine, theirs = (folder / f"{name}.gguf" for name in ("f32", "ours", "theirs"))
    imatrix = given.imatrix
    if given.calib is not None:
        imatrix = measured(path, given.calib, folder / "imatrix.gguf")
    quants = given.quants.split(",") if given.quants else defaults(imatrix is not None)
    failed = 0
    ours(path, "f32", source)
    for quant in quants:
        ours(path, quant, mine, imatrix)
        apart(llama_quantize.quantize, source, theirs, quant, package=given.package, imatrix=imatrix)
        failed += told(model, quant, mine, theirs)
    return failed


def apart(work: Callable[..., None], *arguments: Any, **named: Any) -> None:
    """Do the work in a process of its own, without its log; raises RuntimeError when it fails."""
    child = get_context("fork").Process(target=quietly, args=(work, *arguments), kwargs=named)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{work.__module__} ended with exit code {child.exitcode}")


def quietly(work: Callable[..., None], *arguments: Any, **named: Any) -> None:
    """Do the work with nothing on the standard streams."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    work(*arguments, **named)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--quants", help="default: all that there are")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix that fits every model given")
    parser.add_argument("--calib", metavar="TEXT", help="make each model's matrix of this text")
    parser.add_argument("--package", type=Path, help="folder of the unpacked npm package")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for model in given.models:
            folder = Path(name)
            path = checkpoint(model, folder)
            if given.converter is not None:
                failed += against_converter(model, path, given.converter, folder)
            else:
                failed += against_quantizer(model, path, given, folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
