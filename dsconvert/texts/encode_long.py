"""Token ids of a long text, in bounded memory and the same as of the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Encode = Callable[[Sequence[str]], list[list[int]]]
PIECE = 1 << 16  # characters; the tokenizers library needs about 200 bytes for each while it encodes
BATCH = 16  # pieces that are encoded at once
CONTEXT = 200  # characters on each side of a cut on which it is tried
CUTS = 8  # places that are tried before the piece grows
# Before a lone white space, or after the end of a Chinese sentence: places where most tokenizers split.
PLACE = re.compile(r"(?<=\S)(?=\s\S)|(?<=[。！？])(?=\S)")


def encode_long(encode: Encode, text: str) -> IntArray:
    """The ids of `text`, encoded in pieces; int64 [tokens].

    A text is cut only where, with some characters around, its two sides give the same ids together and
    apart, be it without the space between them. Where no such place is found it stays in one piece.
    """
    runs: list[IntArray] = []
    batch: list[str] = []
    for piece in _pieces(encode, text):
        batch.append(piece)
        if len(batch) == BATCH:
            runs += [np.asarray(ids, np.int64) for ids in encode(batch)]
            batch = []
    runs += [np.asarray(ids, np.int64) for ids in encode(batch)] if batch else []
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def _pieces(encode: Encode, text: str) -> Iterator[str]:
    start, search = 0, PIECE
    while search < len(text):
        cut = _cut(encode, text, search)
        search += PIECE
        if cut is not None:
            yield text[start : cut.start]
            start, search = cut.stop, cut.stop + PIECE
    if start < len(text):
        yield text[start:]


def _cut(encode: Encode, text: str, start: int) -> slice | None:
    """Where the text can be cut at or after `start`: what is between the two sides, or None.

    Nothing is, or a space that the tokenizer puts before every text anyway, as SentencePiece does.
    """
    for tries, found in enumerate(PLACE.finditer(text, start, start + PIECE)):
        if tries == CUTS:
            break
        at = found.start()
        left, right = text[max(at - CONTEXT, 0) : at], text[at : at + CONTEXT]
        whole, first, second, later = encode([left + right, left, right, right.removeprefix(" ")])
        for size, rest in ((0, second), (len(right) - len(right.removeprefix(" ")), later)):
            if whole == first + rest:
                return slice(at, at + size)
    return None
