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

import numpy as np
import numpy.typing as npt

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose gguf.py hides the library

from converters.gguf.file_types import FILE_TYPES

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
OPAQUE = 512  # more than llama_model_quantize_params has ever had


class Entry(ctypes.Structure):
    """llama_model_imatrix_data; a list of them ends with one without a name."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class Params(ctypes.Structure):
    """llama_model_quantize_params: the head that has been stable, then whatever else."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("types", ctypes.c_int32 * 2),
        ("switches", ctypes.c_bool * 8),
        ("imatrix", ctypes.POINTER(Entry)),
        ("rest", ctypes.c_char * (OPAQUE - 32)),
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


class ReadParams(ctypes.Structure):
    """gguf_init_params: whether to leave the data unread, and where the tensors go."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


def importance(path: Path, package: Path | None = None) -> dict[str, npt.NDArray[np.float32]]:
    """The importance of each entry of a GGUF matrix as ggml's own reader gives it: sums / count.

    Raises RuntimeError when ggml does not read the file.
    """
    ggml = _reader(package)
    context = ctypes.c_void_p()
    file = ggml.gguf_init_from_file(str(path).encode(), ReadParams(False, ctypes.pointer(context)))
    if not file:
        raise RuntimeError(f"ggml does not read {path}")
    tensors = {}
    for index in range(ggml.gguf_get_n_tensors(file)):
        name = ggml.gguf_get_tensor_name(file, index)
        tensor = ggml.ggml_get_tensor(context, name)
        data = ctypes.cast(ggml.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
        tensors[name.decode()] = np.ctypeslib.as_array(data, (ggml.ggml_nelements(tensor),)).copy()
    ggml.gguf_free(file)
    ggml.ggml_free(context)
    names = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
    seen = [name for name in names if tensors[name + ".counts"].max() > 0]
    return {name: quotient(tensors[name + ".in_sum2"], tensors[name + ".counts"]) for name in seen}


def quotient(sums: npt.NDArray[np.float32], counts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """An entry's sums by its counts, of which a stack of experts has one each; 1 for those without tokens.

    As llama-quantize reads it (tools/quantize, load_imatrix).
    """
    rows = sums.reshape(len(counts), -1)
    with np.errstate(all="ignore"):
        found = np.where(counts[:, None] > 0, rows / counts[:, None], np.float32(1))
    return found.astype(np.float32).ravel()


def _reader(package: Path | None) -> ctypes.CDLL:
    """ggml's functions on GGUF files."""
    ggml = ctypes.CDLL(str(next(iter(sorted(libraries(package).glob("libggml-base*.so"))))))
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("gguf_init_from_file", pointer, [ctypes.c_char_p, ReadParams]),
        ("gguf_get_n_tensors", ctypes.c_int64, [pointer]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [pointer, ctypes.c_int64]),
        ("gguf_free", None, [pointer]),
        ("ggml_get_tensor", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nelements", ctypes.c_int64, [pointer]),
        ("ggml_free", None, [pointer]),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    return ggml


def entries(values: dict[str, npt.NDArray[np.float32]]) -> ctypes.Array[Entry]:
    """The list that llama_model_quantize takes; valid as long as `values` is."""
    pointer = ctypes.POINTER(ctypes.c_float)
    filled = [Entry(name.encode(), data.ctypes.data_as(pointer), data.size) for name, data in values.items()]
    return (Entry * (len(filled) + 1))(*filled)


def quantize(
    source: Path,
    out: Path,
    quant: str,
    threads: int = 2,
    package: Path | None = None,
    imatrix: Path | None = None,
) -> None:
    """Write `out` as llama-quantize would; raises RuntimeError when it fails."""
    llama = load(package)
    params = llama.llama_model_quantize_default_params()
    params.threads, params.ftype = threads, FILE_TYPES[quant]
    values = importance(imatrix, package) if imatrix is not None else {}
    listed = entries(values)
    if values:
        params.imatrix = ctypes.cast(listed, ctypes.POINTER(Entry))
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
    parser.add_argument("--imatrix", type=Path)
    given = parser.parse_args()
    quantize(given.source, given.out, given.quant, given.threads, given.package, given.imatrix)


if __name__ == "__main__":
    sys.exit(main())
