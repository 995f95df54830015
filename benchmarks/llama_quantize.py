"""llama.cpp's own quantizer, driven through ctypes: the reference for whole files and for its time.

    python benchmarks/llama_quantize.py BF16.gguf OUT.gguf q4_k_m [--threads 2] [--imatrix FILE]

The libraries come from the npm package @node-llama-cpp/linux-x64 (fetched with `npm pack` into a cache
folder, or given with --package FOLDER).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from converters.gguf.recipe import FILE_TYPES

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
OPAQUE = 512  # more than llama_model_quantize_params has ever had


class Params(ctypes.Structure):
    """llama_model_quantize_params: the head that has been stable, then whatever else."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("rest", ctypes.c_char * (OPAQUE - 8)),
    )


def libraries(package: Path | None) -> Path:
    """The folder with libllama.so, fetched when it is not there yet."""
    folder = package or Path(tempfile.gettempdir()) / "dsconvert-node-llama-cpp"
    found = sorted(folder.rglob("libllama.v*.so")) + sorted(folder.rglob("libllama.so"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
        return libraries(folder)
    return found[0].parent


def load(package: Path | None) -> ctypes.CDLL:
    """libllama with its CPU backends loaded."""
    folder = libraries(package)
    for pattern in ("libggml-base*.so", "libggml.*so"):
        for path in sorted(folder.glob(pattern)):
            ggml = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama = ctypes.CDLL(str(next(iter(sorted(folder.glob("libllama.*so"))))))
    llama.llama_model_quantize_default_params.restype = Params
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)]
    llama.llama_model_quantize.restype = ctypes.c_uint32
    return llama


def quantize(source: Path, out: Path, quant: str, threads: int = 2, package: Path | None = None) -> None:
    """Write `out` as llama-quantize would; raises RuntimeError when it fails."""
    llama = load(package)
    params = llama.llama_model_quantize_default_params()
    params.threads, params.ftype = threads, FILE_TYPES[quant]
    code = llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama_model_quantize gave {code} for {source}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("quant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--package", type=Path)
    given = parser.parse_args()
    quantize(given.source, given.out, given.quant, given.threads, given.package)


if __name__ == "__main__":
    sys.exit(main())
