"""llama.cpp's C interface (llama.h) through ctypes: the library of the `xllamacpp` wheel, typed and silent.

Parameter structs change between versions and are passed by value, so they are opaque here: taken from the
library's own defaults, changed only where a field's place is stable or can be told by its default.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import re
import struct
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from dsconvert.errors import ConversionError
from dsconvert.libraries import missing

ERROR, WARN, CONT = 4, 3, 5  # ggml_log_level
F16_PAIR = struct.pack("<ii", 1, 1)  # ggml_type of keys and values
# A model needs four null pointers before its flags, a context two before and after its cache types.
FLAGS_AFTER = bytes(32)
CACHE_AROUND = bytes(16)
# Four choices left to the library (RoPE scaling, pooling, attention, flash attention), then two zero floats.
MINUS_ONE = struct.pack("<i", -1)
FLASH_LAST = MINUS_ONE * 4 + bytes(8)
GPU_LAYERS_AT = 16  # in llama_model_params: after two pointers; all layers by default, as -1 or a number

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Params(ctypes.Structure):
    """Any parameter struct: bigger than all of them, so that it travels in memory as they do.

    Their fields change between versions; what is not at the stable head is found by its default value.
    """

    _fields_ = (("raw", ctypes.c_ubyte * 1024),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_PTR, _INT, _STR, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_bool
_INTS = ctypes.POINTER(ctypes.c_int32)
# The functions of llama.h that are used: result, arguments.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_PTR, _PTR)),
    "llama_model_default_params": (Params, ()),
    "llama_context_default_params": (Params, ()),
    "llama_model_load_from_file": (_PTR, (_STR, Params)),
    "llama_model_free": (None, (_PTR,)),
    "llama_init_from_model": (_PTR, (_PTR, Params)),
    "llama_free": (None, (_PTR,)),
    "llama_set_n_threads": (None, (_PTR, _INT, _INT)),
    "llama_n_ctx": (ctypes.c_uint32, (_PTR,)),
    "llama_model_get_vocab": (_PTR, (_PTR,)),
    "llama_model_n_embd": (_INT, (_PTR,)),
    "llama_model_meta_count": (_INT, (_PTR,)),
    "llama_model_meta_key_by_index": (_INT, (_PTR, _INT, _STR, ctypes.c_size_t)),
    "llama_model_meta_val_str_by_index": (_INT, (_PTR, _INT, _STR, ctypes.c_size_t)),
    "llama_model_chat_template": (_STR, (_PTR, _STR)),
    "llama_vocab_n_tokens": (_INT, (_PTR,)),
    "llama_vocab_bos": (_INT, (_PTR,)),
    "llama_vocab_eos": (_INT, (_PTR,)),
    "llama_vocab_is_eog": (_BOOL, (_PTR, _INT)),
    "llama_vocab_get_add_bos": (_BOOL, (_PTR,)),
    "llama_tokenize": (_INT, (_PTR, _STR, _INT, _INTS, _INT, _BOOL, _BOOL)),
    "llama_detokenize": (_INT, (_PTR, _INTS, _INT, _STR, _INT, _BOOL, _BOOL)),
    "llama_token_to_piece": (_INT, (_PTR, _INT, _STR, _INT, _INT, _BOOL)),
    "llama_supports_gpu_offload": (_BOOL, ()),
    "llama_set_abort_callback": (None, (_PTR, _PTR, _PTR)),
    "llama_get_memory": (_PTR, (_PTR,)),
    "llama_memory_clear": (None, (_PTR, _BOOL)),
    "llama_memory_seq_rm": (_BOOL, (_PTR, _INT, _INT, _INT)),
    "llama_batch_init": (Batch, (_INT, _INT, _INT)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (_INT, (_PTR, Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_PTR,)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_PTR, _INT)),
}


class Log:
    """What llama.cpp said last, by level; one per process, since its log callback is."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=4000)
        self.callback = _LOG_CALLBACK(self.add)

    def add(self, level: int, text: bytes, _user: object) -> None:
        line = text.decode("utf-8", "replace")
        if level == CONT and self.lines:
            level, start = self.lines.pop()
            line = start + line
        self.lines.append((level, line))

    def at(self, level: int) -> tuple[str, ...]:
        """The lines of one level, without the name of the function that wrote them."""
        found = (re.sub(r"^\w+: ", "", line).strip() for at, line in self.lines if at == level)
        return tuple(dict.fromkeys(line for line in found if line))


@cache
def open_library() -> tuple[ctypes.CDLL, Log]:
    """The C library with typed functions, initialised and silent; raises ConversionError."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not found:
        raise missing("xllamacpp", "running llama.cpp itself")
    try:
        library = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as error:
        raise ConversionError(
            "llama.cpp's library cannot be used",
            where=found[0],
            why=str(error)[:200],
            hint="pip install --upgrade xllamacpp",
        ) from None
    log = Log()
    library.llama_log_set(ctypes.cast(log.callback, ctypes.c_void_p), None)
    atexit.register(library.llama_log_set, None, None)  # no call into an interpreter that is gone
    library.llama_backend_init()
    return library, log


def set_vocab_only(params: Params) -> None:
    """Set the first flag of llama_model_params: it follows four pointers that are null by default."""
    raw = bytes(params.raw)
    for at in range(64, 128, 8):
        flags = raw[at : at + 5]
        if raw[at - 32 : at] == FLAGS_AFTER and any(flags) and flags[0] == 0 and max(flags) == 1:
            params.raw[at] = 1
            return
    raise ConversionError(
        "this version of llama.cpp cannot be asked for a vocabulary alone",
        why="its model parameters are laid out in a way that is not known here",
        hint="Load a file with weights, or pip install --upgrade dsconvert",
    )


def knows_gpu() -> bool:
    """Whether the library is built for a GPU and finds one; raises what `open_library` raises."""
    return bool(open_library()[0].llama_supports_gpu_offload())


def set_cpu(params: Params) -> None:
    """Ask for all layers on the CPU, whatever devices the library knows."""
    struct.pack_into("<i", params.raw, GPU_LAYERS_AT, 0)


def set_float32_attention(params: Params) -> None:
    """Ask for attention in float32: no flash attention, whose CPU code rounds keys and values to float16
    whatever the cache holds, and a float32 cache. A field that cannot be found keeps its default.
    """
    raw = bytes(params.raw)
    for at in range(16, 64, 4):
        if raw[at : at + 24] == FLASH_LAST and raw[at - 4 : at] != MINUS_ONE:
            params.raw[at + 12 : at + 16] = list(bytes(4))
    set_cache_type(params, 0)


def set_cache_type(params: Params, kind: int) -> None:
    """Set the type of cached keys and values, ggml's number; a field that is not found keeps its default."""
    raw = bytes(params.raw)
    for at in range(64, 144, 8):
        around = raw[at - 16 : at] + raw[at + 8 : at + 24]
        if raw[at : at + 8] == F16_PAIR and around == CACHE_AROUND * 2:
            params.raw[at : at + 8] = list(struct.pack("<ii", kind, kind))
            return


def read_string(function: Callable[..., int], *where: object) -> str:
    """The string that an llama.h getter writes: asked for its length first."""
    size = function(*where, None, 0) + 1
    buffer = ctypes.create_string_buffer(max(size, 1))
    function(*where, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")
