"""One sequence in llama.cpp that goes on: read piece by piece, cut back, stopped half way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import UsageError
from dsconvert.runtimes.llamacpp import Engine

ABORTED = 2  # what llama_decode returns when the callback said so
_ABORT = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class Continued:
    """The sequence of an engine, which keeps what it has read. Source: llama.h."""

    def __init__(self, engine: Engine) -> None:
        if engine._context is None:
            raise UsageError("nothing is read by a file loaded with vocab_only", where=engine.path)
        self.engine = engine
        self._memory: int = engine._lib.llama_get_memory(engine._context)
        self.forget(0)

    def forget(self, length: int) -> int:
        """Keep the first `length` positions; how many are kept: none by models whose memory cannot be cut."""
        lib = self.engine._lib
        if length and lib.llama_memory_seq_rm(self._memory, 0, length, -1):
            return length
        lib.llama_memory_clear(self._memory, True)
        return 0

    def read(
        self, part: Sequence[int] | npt.NDArray[Any], at: int, stopped: Callable[[], bool]
    ) -> npt.NDArray[np.float32] | None:
        """Read token ids, or embeddings [n, n_embd], at positions `at`...; the logits [vocab] after the last.

        `stopped` is asked while a longer piece is read: None where it said so, and the piece is forgotten.
        Raises UsageError for ids outside the vocabulary, ConversionError where llama.cpp cannot run it.
        """
        engine, piece = self.engine, self.engine._checked(part)
        code = engine._run(piece, at, 0) if len(piece) == 1 else self._watched(piece, at, stopped)
        if code == ABORTED:
            self.forget(at)
            return None
        if code:
            raise engine._failed(f"cannot be run by llama.cpp (llama_decode returned {code})")
        logits = engine._lib.llama_get_logits_ith(engine._context, -1)
        return np.ctypeslib.as_array(logits, shape=(engine.n_vocab,)).copy()

    def _watched(self, piece: npt.NDArray[Any], at: int, stopped: Callable[[], bool]) -> int:
        """`Engine._run`, stopped by the callback that llama.cpp asks between two steps of its graph.

        Python runs the handlers of signals in it, which may raise: what they raise comes afterwards.
        """
        raised: list[BaseException] = []

        def asked(_user: object) -> bool:
            try:
                return bool(raised) or stopped()
            except BaseException as error:
                raised.append(error)
                return True

        engine = self.engine
        callback = _ABORT(asked)
        engine._lib.llama_set_abort_callback(engine._context, ctypes.cast(callback, ctypes.c_void_p), None)
        try:
            code = engine._run(piece, at, len(piece) - 1)
        finally:
            engine._lib.llama_set_abort_callback(engine._context, None, None)
        if raised:
            self.forget(at)
            raise raised[0]
        return code
