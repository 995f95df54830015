"""llama.cpp as a judge: token ids and logits of a GGUF file from the runtime that people run it with.

The library is the one inside the `xllamacpp` wheel, called through its C interface. Everything runs on the
CPU with float32 attention and key/value cache, so that what differs from a float32 evaluation is the file's
doing, or the runtime's own arithmetic: bf16 and quantized types round the activations as well.

llama.cpp aborts the whole process on some malformed files and on unbroken runs of about 26,000
characters; a caller with input it does not trust runs the engine in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import ConversionError, UsageError
from dsconvert.runtimes.llama_h import (
    ERROR,
    WARN,
    open_library,
    read_string,
    set_cpu,
    set_float32_attention,
    set_vocab_only,
)

CHUNK = 512  # tokens per decode: bounds the runtime's copy of the logits


class Engine:
    """One GGUF file loaded in llama.cpp; a context manager.

    `vocab_only` loads no weights and gives no logits. `n_ctx` is the longest sequence in tokens. `exact` asks
    for float32 attention and cache, else they are the library's defaults; so is the device, unless `cpu`.
    Raises ConversionError with llama.cpp's own reason when the file does not load.
    Source: llama.h of llama.cpp.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_only: bool = False,
        n_ctx: int = 2048,
        threads: int = 2,
        exact: bool = True,
        cpu: bool = False,
    ) -> None:
        self.path = Path(path)
        self._model: int | None = None
        self._context: int | None = None
        self._lib, self._log = open_library()
        if not self.path.is_file():
            raise ConversionError("is not a file", where=self.path, hint="Give the path of a GGUF file")
        self._log.lines.clear()
        params = self._lib.llama_model_default_params()
        if vocab_only:
            set_vocab_only(params)
        if cpu:
            set_cpu(params)
        self._model = self._lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise self._failed("does not load in llama.cpp")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.n_embd: int = self._lib.llama_model_n_embd(self._model)
        if not vocab_only:
            self._open_context(n_ctx, threads, exact)
        self.warnings: tuple[str, ...] = self._log.at(WARN)

    def _open_context(self, n_ctx: int, threads: int, exact: bool) -> None:
        params = self._lib.llama_context_default_params()
        struct.pack_into("<III", params.raw, 0, n_ctx, CHUNK, CHUNK)  # n_ctx, n_batch, n_ubatch
        if exact:
            set_float32_attention(params)
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            error = self._failed("gives no context in llama.cpp")
            self.close()
            raise error
        self._lib.llama_set_n_threads(self._context, threads, threads)
        self.n_ctx: int = self._lib.llama_n_ctx(self._context)
        self.arithmetic: dict[str, str] = self._arithmetic()

    def _arithmetic(self) -> dict[str, str]:
        """What the runtime says it really uses: the types of the cache, and flash attention or not."""
        said = "\n".join(line for _, line in self._log.lines)
        patterns = {"keys": r"\bK \((\w+)\)", "values": r"\bV \((\w+)\)", "flash": r"flash_attn\s*=\s*(\w+)"}
        found = {name: re.search(pattern, said) for name, pattern in patterns.items()}
        return {name: match.group(1) if match else "unknown" for name, match in found.items()}

    def _failed(self, what: str) -> ConversionError:
        reasons = self._log.at(ERROR) or ("llama.cpp gave no reason",)
        return ConversionError(
            what,
            where=self.path,
            why="; ".join(reasons)[:600],
            hint="dsconvert inspect shows what the file holds",
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    @cached_property
    def meta(self) -> dict[str, str]:
        """The scalar and short metadata values of the file, as llama.cpp prints them."""
        lib, model = self._lib, self._model
        return {
            read_string(lib.llama_model_meta_key_by_index, model, i): read_string(
                lib.llama_model_meta_val_str_by_index, model, i
            )
            for i in range(lib.llama_model_meta_count(model))
        }

    def chat_template(self) -> str | None:
        """The default chat template, or None."""
        template = self._lib.llama_model_chat_template(self._model, None)
        return None if template is None else template.decode("utf-8", "replace")

    @property
    def special(self) -> dict[str, int | bool]:
        """Ids of BOS and EOS (-1: none), and whether BOS is put before a text."""
        lib, vocab = self._lib, self._vocab
        return {
            "bos": lib.llama_vocab_bos(vocab),
            "eos": lib.llama_vocab_eos(vocab),
            "add_bos": lib.llama_vocab_get_add_bos(vocab),
        }

    def ends(self) -> list[int]:
        """The ids at which a generation ends, ascending."""
        return [i for i in range(self.n_vocab) if self._lib.llama_vocab_is_eog(self._vocab, i)]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, which need not be whole characters; a control token's only as `special`."""
        room = 64
        while True:
            text = ctypes.create_string_buffer(room)
            n = self._lib.llama_token_to_piece(self._vocab, token, text, room, 0, special)
            if n >= 0:
                return text.raw[:n]
            room = -n

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; `add_special`: with BOS if the file asks; `parse_special`: control tokens."""
        data = text.encode("utf-8")
        room = len(data) + 8  # a byte-level token is one byte at least
        ids = (ctypes.c_int32 * room)()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
        if n < 0:
            raise ConversionError("llama.cpp cannot tokenize a text", where=self.path, why=f"it returned {n}")
        return list(ids[:n])

    def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """The text of token ids; `special` also writes control tokens."""
        ids = (ctypes.c_int32 * len(tokens))(*self._checked(tokens).tolist())
        room = 64
        while True:
            text = ctypes.create_string_buffer(room)
            n = self._lib.llama_detokenize(self._vocab, ids, len(tokens), text, room, False, special)
            if n >= 0:
                return text.raw[:n].decode("utf-8", "replace")
            room = -n

    def logits(self, *parts: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The next-token logits after every position of one fresh sequence.

        Each part is token ids, or embeddings (float32 [n, n_embd]) that stand in for tokens; the parts
        follow one another. Returns float32 [total n, n_vocab]. Raises UsageError when the sequence is
        empty, longer than `n_ctx`, or holds an id outside the vocabulary.
        """
        if self._context is None:
            raise UsageError("no logits from a file loaded with vocab_only", where=self.path)
        arrays = [self._checked(part) for part in parts]
        total = sum(map(len, arrays))
        if not 0 < total <= self.n_ctx:
            raise UsageError(
                f"a sequence of {total} tokens does not fit", where=self.path, why=f"n_ctx is {self.n_ctx}"
            )
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        out = np.empty((total, self.n_vocab), np.float32)
        start = 0
        for array in arrays:
            for at in range(0, len(array), CHUNK):
                piece = array[at : at + CHUNK]
                self._decode(piece, start, out[start : start + len(piece)])
                start += len(piece)
        return out

    def _checked(self, part: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Token ids as int32 [n], or embeddings as float32 [n, n_embd]."""
        array = np.asarray(part)
        if array.ndim == 2 and array.shape[1] == self.n_embd and array.dtype.kind == "f":
            return np.ascontiguousarray(array, np.float32)
        whole = array.ndim == 1 and (array.dtype.kind in "iu" or array.size == 0)
        if not whole or (array.size and not 0 <= array.min() <= array.max() < self.n_vocab):
            raise UsageError(
                f"neither token ids below {self.n_vocab} nor embeddings [n, {self.n_embd}]", where=self.path
            )
        return np.ascontiguousarray(array, np.int32)

    def _decode(self, piece: npt.NDArray[Any], start: int, out: npt.NDArray[np.float32]) -> None:
        """Run `piece` at positions `start`... and write its logits to `out`."""
        code = self._run(piece, start, 0)
        if code:
            raise self._failed(f"cannot be run by llama.cpp (llama_decode returned {code})")
        out[:] = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape=out.shape)

    def _run(self, piece: npt.NDArray[Any], start: int, first: int) -> int:
        """llama_decode of `piece` at positions `start`..., with logits from its row `first` on; its code."""
        n = len(piece)
        batch = self._lib.llama_batch_init(n, 0 if piece.ndim == 1 else self.n_embd, 1)
        try:
            batch.n_tokens = n
            ctypes.memmove(batch.token if piece.ndim == 1 else batch.embd, piece.ctypes.data, piece.nbytes)
            for i in range(n):
                batch.pos[i], batch.n_seq_id[i], batch.logits[i] = start + i, 1, i >= first
                batch.seq_id[i][0] = 0
            code: int = self._lib.llama_decode(self._context, batch)
            return code
        finally:
            self._lib.llama_batch_free(batch)
