"""llama.cpp's multimodal library as a judge: image embeddings and prompts with pictures from a projector.

The library is the one inside the `xllamacpp` wheel, called through mtmd.h. It computes on the CPU; its GELU
is a table of the tanh form and its patch convolution rounds to float16, whatever the file holds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import ConversionError, UsageError
from dsconvert.runtimes.llama_h import ERROR, MINUS_ONE, WARN, Params, open_library
from dsconvert.runtimes.llamacpp import Engine

Floats = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]
Known = dict[tuple[bytes, int], Floats]  # embeddings by the pixels' digest and the number of the cut-out
FLASH_AT = 24  # in mtmd_context_params: after two flags, the threads and two pointers
TEXT, IMAGE = 0, 1  # mtmd_input_chunk_type


_FLAGS = (("add_special", ctypes.c_bool), ("parse_special", ctypes.c_bool))


class InputText(ctypes.Structure):
    """mtmd_input_text, as it is since the library takes prompts in parts."""

    _fields_ = (("text", ctypes.c_char_p), ("text_len", ctypes.c_size_t), *_FLAGS)


class OldInputText(ctypes.Structure):
    """mtmd_input_text before that."""

    _fields_ = (("text", ctypes.c_char_p), *_FLAGS)


_PTR, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mtmd_log_set": (None, (_PTR, _PTR)),
    "mtmd_default_marker": (ctypes.c_char_p, ()),
    "mtmd_context_params_default": (Params, ()),
    "mtmd_init_from_file": (_PTR, (ctypes.c_char_p, _PTR, Params)),
    "mtmd_free": (None, (_PTR,)),
    "mtmd_support_vision": (ctypes.c_bool, (_PTR,)),
    "mtmd_bitmap_init": (_PTR, (ctypes.c_uint32, ctypes.c_uint32, _PTR)),
    "mtmd_bitmap_set_id": (None, (_PTR, ctypes.c_char_p)),
    "mtmd_bitmap_free": (None, (_PTR,)),
    "mtmd_input_chunks_init": (_PTR, ()),
    "mtmd_input_chunks_size": (_SIZE, (_PTR,)),
    "mtmd_input_chunks_get": (_PTR, (_PTR, _SIZE)),
    "mtmd_input_chunks_free": (None, (_PTR,)),
    "mtmd_input_chunk_get_type": (_INT, (_PTR,)),
    "mtmd_input_chunk_get_id": (ctypes.c_char_p, (_PTR,)),
    "mtmd_input_chunk_get_n_tokens": (_SIZE, (_PTR,)),
    "mtmd_input_chunk_get_tokens_text": (ctypes.POINTER(ctypes.c_int32), (_PTR, ctypes.POINTER(_SIZE))),
    "mtmd_tokenize": (_INT, (_PTR, _PTR, _PTR, ctypes.POINTER(_PTR), _SIZE)),
    "mtmd_encode_chunk": (_INT, (_PTR, _PTR)),
    "mtmd_get_output_embd": (ctypes.POINTER(ctypes.c_float), (_PTR,)),
}


class Projector:
    """A projector file loaded in llama.cpp beside its language model; a context manager.

    Raises ConversionError with llama.cpp's own reason when the file does not load. Source: mtmd.h.
    """

    def __init__(self, path: str | Path, engine: Engine, *, threads: int = 2) -> None:
        self.path = Path(path)
        self._engine = engine
        self._context: int | None = None
        self._lib, self._log = open_library()
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, list(arguments)
        self._lib.mtmd_log_set(ctypes.cast(self._log.callback, _PTR), None)
        if not self.path.is_file():
            raise ConversionError("is not a file", where=self.path, hint="Give the path of a projector file")
        self._log.lines.clear()
        params = _params(self._lib.mtmd_context_params_default(), threads)
        self._context = self._lib.mtmd_init_from_file(os.fsencode(self.path), engine._model, params)
        if not self._context:
            raise self._failed("does not load in llama.cpp's multimodal library")
        self.marker: str = self._lib.mtmd_default_marker().decode()
        self.warnings: tuple[str, ...] = self._log.at(WARN)
        self._check_layout()

    def _check_layout(self) -> None:
        """The prompt's struct has changed once already: see that the library reads ours as we wrote it."""
        probe = "a b\n" * 65
        expected = self._engine.tokenize(probe, add_special=True, parse_special=True)
        if self.parts(probe, []) != [expected]:
            self.close()
            raise ConversionError(
                "this version of llama.cpp's multimodal library is not known here",
                why="it reads another prompt than it is given",
                hint="pip install --upgrade dsconvert, or an older xllamacpp",
            )

    def __enter__(self) -> Projector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the projector; calling it again does nothing."""
        if self._context:
            self._lib.mtmd_free(self._context)
        self._context = None

    def _failed(self, what: str) -> ConversionError:
        reasons = self._log.at(ERROR) or ("llama.cpp gave no reason",)
        return ConversionError(
            what,
            where=self.path,
            why="; ".join(reasons)[:600],
            hint="dsconvert inspect shows what the file holds and what it lacks",
        )

    def embed(self, picture: Picture) -> Floats:
        """The embeddings [tokens, n_embd] of one picture [height, width, 3] (RGB)."""
        (found,) = (part for part in self.parts(self.marker, [picture]) if isinstance(part, np.ndarray))
        return found

    def parts(
        self, prompt: str, pictures: Sequence[Picture], known: Known | None = None
    ) -> list[list[int] | Floats]:
        """A prompt as the model takes it: token ids, and embeddings where `marker` stands for a picture.

        The runtime adds BOS as the language model's file says, and tokenizes special tokens. The embeddings
        that are `known` are not computed again; new ones are added. Raises UsageError when markers and
        pictures do not match.
        """
        if prompt.count(self.marker) != len(pictures):
            raise UsageError(
                f"{len(pictures)} pictures for {prompt.count(self.marker)} markers", where=self.path
            )
        with self._chunks(prompt, pictures) as chunks:
            lib = self._lib
            found = [lib.mtmd_input_chunks_get(chunks, i) for i in range(lib.mtmd_input_chunks_size(chunks))]
            known = {} if known is None else known
            cut = Counter[bytes]()
            return [self._part(chunk, known, cut) for chunk in found]

    @contextmanager
    def _chunks(self, prompt: str, pictures: Sequence[Picture]) -> Iterator[int]:
        lib = self._lib
        with ExitStack() as stack:
            chunks = lib.mtmd_input_chunks_init()
            stack.callback(lib.mtmd_input_chunks_free, chunks)
            bitmaps = (_PTR * max(len(pictures), 1))()
            for i, picture in enumerate(pictures):
                data = np.ascontiguousarray(picture, np.uint8)
                height, width, _ = data.shape
                bitmaps[i] = lib.mtmd_bitmap_init(width, height, data.ctypes.data)
                stack.callback(lib.mtmd_bitmap_free, bitmaps[i])
                lib.mtmd_bitmap_set_id(bitmaps[i], hashlib.sha256(data.tobytes()).hexdigest().encode())
            text = _text(prompt.encode(), hasattr(lib, "mtmd_tokenize_from_parts"))
            code = lib.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, len(pictures))
            if code:
                raise self._failed(f"cannot place the pictures (mtmd_tokenize returned {code})")
            yield chunks

    def _part(self, chunk: int, known: Known, cut: Counter[bytes]) -> list[int] | Floats:
        """A chunk's ids or embeddings; `cut` counts the chunks of each picture, which may have several."""
        lib = self._lib
        if lib.mtmd_input_chunk_get_type(chunk) == TEXT:
            return self._tokens(chunk)
        own: bytes = lib.mtmd_input_chunk_get_id(chunk)
        key = own, cut[own]
        cut[own] += 1
        if key not in known:
            known[key] = self._embedded(chunk)
        return known[key]

    def _tokens(self, chunk: int) -> list[int]:
        count = _SIZE()
        tokens = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return list(tokens[: count.value])

    def _embedded(self, chunk: int) -> Floats:
        lib = self._lib
        code = lib.mtmd_encode_chunk(self._context, chunk)
        if code:
            raise self._failed(f"cannot encode the picture (mtmd_encode_chunk returned {code})")
        shape = (lib.mtmd_input_chunk_get_n_tokens(chunk), self._engine.n_embd)
        return np.ctypeslib.as_array(lib.mtmd_get_output_embd(self._context), shape=shape).copy()


def _text(prompt: bytes, in_parts: bool) -> ctypes.Structure:
    """A prompt with BOS as the file asks and special tokens parsed."""
    return InputText(prompt, len(prompt), True, True) if in_parts else OldInputText(prompt, True, True)


def _params(params: Params, threads: int) -> Params:
    """On the CPU, without timings; without flash attention and warm-up where those fields are found."""
    raw = bytes(params.raw)
    params.raw[0:2] = [0, 0]  # use_gpu, print_timings
    params.raw[4:8] = list(struct.pack("<i", threads))
    if raw[FLASH_AT : FLASH_AT + 4] == MINUS_ONE and raw[FLASH_AT + 4] <= 1:
        params.raw[FLASH_AT : FLASH_AT + 5] = list(bytes(5))
    return params
