"""What llama.cpp takes to hold a file and run some sequences of it, as it says itself, on the CPU."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

from dsconvert.errors import ConversionError
from dsconvert.runtimes.llama_h import ERROR, open_library, set_cache_type

CHUNK = 512  # tokens that run at once, llama.cpp's own default
MIB = 1 << 20
SAID = re.compile(r"(\w+)\s+(model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB")


def run(path: Path, batch: int, length: int, cache: int, threads: int = 2) -> dict[str, int]:
    """Fill `batch` sequences of `length` tokens each; bytes of the buffers that llama.cpp made, by kind.

    `cache` is ggml's number of the cache's type. "mapped" is the part of the model that stays in the file's
    own pages. Raises ConversionError with llama.cpp's reason when it cannot.
    """
    lib, log = open_library()
    log.lines.clear()
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    if not model:
        raise _failed(path, "does not load in llama.cpp", log.at(ERROR))
    params = lib.llama_context_default_params()
    struct.pack_into("<IIII", params.raw, 0, batch * length, CHUNK, CHUNK, batch)
    set_cache_type(params, cache)
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise _failed(path, "gives no context in llama.cpp", log.at(ERROR))
    lib.llama_set_n_threads(context, threads, threads)
    for sequence in range(batch):
        for start in range(0, length, CHUNK):
            if code := _decode(lib, context, sequence, start, min(start + CHUNK, length)):
                raise _failed(path, f"cannot be run by llama.cpp (llama_decode returned {code})", ())
    sums: dict[str, int] = {}
    for place, kind, size in SAID.findall("\n".join(line for _, line in log.lines)):
        name = "mapped" if place.endswith("_Mapped") else kind
        sums[name] = sums.get(name, 0) + int(float(size) * MIB)
    return sums


def _decode(lib: object, context: object, sequence: int, start: int, stop: int) -> int:
    """Run token 1 at the positions `start` to `stop` - 1 of a sequence."""
    batch = lib.llama_batch_init(stop - start, 0, 1)  # type: ignore[attr-defined]
    try:
        batch.n_tokens = stop - start
        for i in range(stop - start):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = 1, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, int(i == stop - start - 1)
        code: int = lib.llama_decode(context, batch)  # type: ignore[attr-defined]
        return code
    finally:
        lib.llama_batch_free(batch)  # type: ignore[attr-defined]


def _failed(path: Path, what: str, reasons: tuple[str, ...]) -> ConversionError:
    why = "; ".join(reasons)[:400] or "llama.cpp gave no reason"
    return ConversionError(what, where=path, why=why, hint="Ask for a smaller --batch or --seq")
