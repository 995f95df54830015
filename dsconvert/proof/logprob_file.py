"""llama.cpp's file of base log-probabilities: written from the true reference, or read in its stead.

The format is that of `llama-perplexity --kl-divergence-base` (llama.cpp, tools/perplexity). After the bytes
"_logits_" come int32 length, vocab and n; then n * length int32 tokens; then, for each window, one row for
each prediction at length // 2 ... length - 2: float32 scale and least log-probability, then a uint16 per
token of the vocabulary, padded to an even number. log p = scale * u + least.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsconvert.checkpoints.output_files import part_files
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import CheckpointError, UsageError
from dsconvert.events import Event
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource
from dsconvert.proof.compare import Comparison
from dsconvert.proof.figures import IntArray, TokenFigures, joined, summary, token_figures
from dsconvert.proof.scores import hidden_states
from dsconvert.reading import open_regular
from dsconvert.texts.windows import Windows, consecutive

if TYPE_CHECKING:
    import torch

MAGIC = b"_logits_"
RANGE = 16.0  # what is this far below the largest logit, or further, is stored as 0
HEADER = struct.Struct("<8s3i")


@dataclass(frozen=True)
class KldBase:
    """An opened file; `windows` are scored on their second half, rows are read when asked for."""

    path: Path
    vocab: int
    windows: Windows

    def log_probs(self, window: int) -> npt.NDArray[np.float32]:
        """The base's log-probabilities [predictions, vocab] of one window, as the file holds them."""
        rows = _predictions(self.windows)
        start = HEADER.size + 4 * self.windows.tokens.size + window * rows * row_bytes(self.vocab)
        table = np.memmap(self.path, np.uint8, "r", start, (rows, row_bytes(self.vocab)))
        scale, least = table[:, :8].copy().view("<f4").T[:, :, None]
        return np.asarray(scale * table[:, 8:].view("<u2")[:, : self.vocab] + least, np.float32)


def row_bytes(vocab: int) -> int:
    """Bytes of one prediction's row."""
    return 8 + 4 * ((vocab + 1) // 2)


def encode(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Logits [tokens, vocab] to the file's rows, uint8 [tokens, row_bytes]; float32 as llama.cpp has it."""
    count, vocab = logits.shape
    largest = logits.max(1, keepdims=True)
    least = np.maximum(logits.min(1, keepdims=True), largest - np.float32(RANGE))
    total = np.exp(logits - largest).sum(1, dtype=np.float64, keepdims=True)
    scale = (largest - least) / np.float32(65535)
    rows = np.zeros((count, row_bytes(vocab)), np.uint8)
    head = np.concatenate([scale, least - largest - np.log(total).astype(np.float32)], 1)
    rows[:, :8] = head.astype("<f4").view(np.uint8)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    values = np.rint(inverse * np.maximum(logits - least, 0))
    rows[:, 8 : 8 + 2 * vocab] = values.astype("<u2").view(np.uint8)
    return rows


def open_base(path: Path) -> KldBase:
    """Open and check a file; raises CheckpointError when it is missing, truncated or of another kind."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEADER.size)
            magic, length, vocab, count = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0, 0)
            if magic != MAGIC or length < 3 or vocab < 1 or count < 1:
                raise CheckpointError(
                    "is not a file of base log-probabilities",
                    where=path,
                    hint="Make one with --kld-base, or with llama-perplexity --kl-divergence-base",
                )
            rows = count * (length - 1 - length // 2)
            expected = HEADER.size + 4 * count * length + rows * row_bytes(vocab)
            if size != expected:
                raise CheckpointError(
                    f"has {size} bytes, its header asks for {expected}", where=path, hint="Make it again"
                )
            ids = np.frombuffer(file.read(4 * count * length), "<i4").astype(np.int64)
    except OSError as error:
        raise CheckpointError("cannot be read", where=path, why=error.strerror or str(error)) from None
    return KldBase(path, vocab, consecutive(ids, length))


def write_base(
    path: Path,
    reference: WeightSource,
    config: ModelConfig,
    windows: Windows,
    *,
    device: str = "auto",
    dtype: str | None = None,
) -> Generator[Event, None, None]:
    """Run the reference over the windows and write its log-probabilities; complete or not there at all.

    The windows must be those of `windows.consecutive`, which is what llama.cpp scores. Raises UsageError
    for others, OutputError when the file cannot be written, CheckpointError for non-finite values.
    """
    if not np.all(windows.first == windows.length // 2):
        raise UsageError("a file of base log-probabilities needs consecutive windows", hint="Give no stride")
    size = HEADER.size + 4 * windows.tokens.size
    size += len(windows.tokens) * _predictions(windows) * row_bytes(config.vocab_size)
    with part_files([path], [size], force=False) as (part,):  # it may have come since `path` was looked for
        decoder, hidden = yield from _hidden_states(reference, config, windows, device, dtype)
        offset = 0
        for data in _parts(decoder, windows, hidden):
            part.write(data, offset)
            offset += len(data)


def compare_base(
    base: KldBase,
    candidate: WeightSource,
    config: ModelConfig,
    *,
    device: str = "auto",
    dtype: str | None = None,
    token_bytes: IntArray | None = None,
) -> Generator[Event, None, Comparison]:
    """Run a candidate over the file's tokens and compare it with the file's log-probabilities.

    KL leaves out what is below exp(-16), which the file cannot hold, exactly as llama.cpp does. Tensors and
    blocks are not compared. Raises CheckpointError when the vocabulary is another.
    """
    if base.vocab != config.vocab_size:
        raise CheckpointError(
            f"is of a model with {base.vocab} tokens, this one has {config.vocab_size}", where=base.path
        )
    decoder, hidden = yield from _hidden_states(candidate, config, base.windows, device, dtype)
    tokens, broken = _score(base, decoder, hidden)
    figures = None if tokens is None else summary(tokens, token_bytes)
    return Comparison(figures, tokens, (), (), (), broken)


def _score(base: KldBase, decoder: st.Decoder, hidden: torch.Tensor) -> tuple[TokenFigures | None, str]:
    import torch

    norm, head = st.head_weights(decoder)
    windows, parts = base.windows, []
    first = windows.length // 2
    for window in range(len(windows.tokens)):
        stored = torch.from_numpy(base.log_probs(window)).to(decoder.device)
        for rows in st.chunks(first, windows.length - 1, base.vocab):
            values = st.logits(decoder, norm, head, hidden[window, rows])
            if not st.finite(values):
                return None, f"the candidate gives non-finite values as logits in window {window}"
            targets = torch.as_tensor(windows.targets(window, rows)).to(decoder.device)
            own = stored[rows.start - first : rows.stop - first]
            part = token_figures(own, values, targets, floor=-RANGE)
            parts.append(part | windows.places(window, rows))
    return joined(parts), ""


def _hidden_states(
    source: WeightSource, config: ModelConfig, windows: Windows, device: str, dtype: str | None
) -> Generator[Event, None, tuple[st.Decoder, torch.Tensor]]:
    """One model's decoder and its states after the last block."""
    place = st.pick_device(device)
    decoder = st.open_decoder(source, config, place, st.pick_dtype(dtype, place))
    return decoder, (yield from hidden_states(decoder, windows))


def _predictions(windows: Windows) -> int:
    """How many predictions of a window have a row."""
    return windows.length - 1 - windows.length // 2


def _parts(decoder: st.Decoder, windows: Windows, hidden: torch.Tensor) -> Iterator[bytes]:
    """The file's bytes, in order."""
    vocab = decoder.config.vocab_size
    yield HEADER.pack(MAGIC, windows.length, vocab, len(windows.tokens))
    yield windows.tokens.astype("<i4").tobytes()
    norm, head = st.head_weights(decoder)
    for window in range(len(windows.tokens)):
        for rows in st.chunks(windows.length // 2, windows.length - 1, vocab):
            values = st.logits(decoder, norm, head, hidden[window, rows])
            if not st.finite(values):
                raise CheckpointError(f"the reference gives non-finite logits in window {window}")
            yield encode(values.cpu().numpy()).tobytes()
