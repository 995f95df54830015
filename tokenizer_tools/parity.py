"""Compares two tokenizers on many texts and says of what kind the differences are."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from tokenizer_tools.library import ids
from tokenizer_tools.samples import PROBES, random_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoder = Callable[[Sequence[str]], Sequence[Sequence[int]]]

__all__ = [
    "PROBES",
    "Comparison",
    "Encoder",
    "classify",
    "compare_ids",
    "encoder",
    "one_by_one",
    "random_texts",
    "shrink",
]

# Ranges assigned by Unicode 16 (DerivedAge.txt), whole or nearly so.
UNICODE_16 = (
    (0x897, 0x897), (0x1B4E, 0x1B4F), (0x1B7F, 0x1B7F), (0x1C89, 0x1C8A), (0x2427, 0x2429),
    (0x31E4, 0x31E5), (0xA7CB, 0xA7CD), (0xA7DA, 0xA7DC), (0x105C0, 0x105F3), (0x10D40, 0x10D8F),
    (0x10EC2, 0x10EC4), (0x10EFC, 0x10EFC), (0x11380, 0x113E2), (0x116D0, 0x116E3),
    (0x11BC0, 0x11BF9), (0x11F5A, 0x11F5A), (0x13460, 0x143FA), (0x16100, 0x16139),
    (0x16D40, 0x16D79), (0x18CFF, 0x18CFF), (0x1CC00, 0x1CCF9), (0x1CD00, 0x1CEB3),
    (0x1E5D0, 0x1E5FF), (0x1F8B2, 0x1F8BB), (0x1F8C0, 0x1F8C1), (0x1FA89, 0x1FA89),
    (0x1FA8F, 0x1FA8F), (0x1FABE, 0x1FABE), (0x1FAC6, 0x1FAC6), (0x1FADC, 0x1FADC),
    (0x1FADF, 0x1FADF), (0x1FAE9, 0x1FAE9), (0x1FBCB, 0x1FBEF),
)  # fmt: skip
CJK_RANGES = ((0x2E80, 0x9FFF), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass(frozen=True)
class Comparison:
    """How many texts were compared, how many gave other ids, and in which classes with examples.

    `examples` are (class, smallest differing part, ids of the first, ids of the second), a few a class.
    """

    texts: int
    different: int
    classes: dict[str, int] = field(default_factory=dict)
    examples: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...] = ()


def encoder(tokenizer: Tokenizer) -> Encoder:
    """The batch encoder of a `tokenizers.Tokenizer`: nothing added, added tokens in a text recognised.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> encoder(data.tokenizer)(["a b"])
    [[64, 279]]
    """

    return partial(ids, tokenizer)


def one_by_one(encode: Callable[[str], Sequence[int]]) -> Encoder:
    """A batch encoder made of a function that takes one text."""
    return lambda texts: [encode(text) for text in texts]


def compare_ids(
    first: Encoder, second: Encoder, texts: Iterable[str], *, batch: int = 4096, examples: int = 3
) -> Comparison:
    """Both tokenizers over all texts; each difference is shrunk to its smallest part and classified.

    `examples` is how many different ones are kept of each class.

    >>> ones, lengths = (lambda texts: [[1] for _ in texts]), (lambda texts: [[len(t)] for t in texts])
    >>> found = compare_ids(ones, lengths, ["a", "12"])
    >>> found.different, found.classes
    (1, {'digits': 1})
    """
    total = 0
    classes: Counter[str] = Counter()
    kept: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []
    iterator = iter(texts)
    while chunk := list(islice(iterator, batch)):
        total += len(chunk)
        for text, a, b in zip(chunk, first(chunk), second(chunk), strict=True):
            if list(a) == list(b):
                continue
            small = shrink(text, lambda t: list(first([t])[0]) != list(second([t])[0]))
            kind = classify(small)
            classes[kind] += 1
            if all(small != other for _, other, _, _ in kept) and sum(k == kind for k, *_ in kept) < examples:
                kept.append((kind, small, tuple(first([small])[0]), tuple(second([small])[0])))
    return Comparison(total, sum(classes.values()), dict(classes.most_common()), tuple(kept))


def shrink(text: str, differs: Callable[[str], bool]) -> str:
    """A smallest part of `text` that still differs, found by leaving out ever shorter runs.

    >>> shrink("some text, 12", lambda text: "," in text)
    ','
    """
    size = max(len(text) // 2, 1)
    while size:
        start = 0
        while start < len(text):
            shorter = text[:start] + text[start + size :]
            if shorter and differs(shorter):
                text = shorter
            else:
                start += size
        size //= 2
    return text


def classify(text: str) -> str:
    """The kind of a smallest differing text: the first of KINDS that applies, or "other".

    >>> classify("12"), classify("\u3042")
    ('digits', 'CJK')
    """
    return next((kind for kind, applies in KINDS if applies(text)), "other")


def _has(text: str, *categories: str) -> bool:
    return any(unicodedata.category(char).startswith(categories) for char in text)


def _within(text: str, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(low <= ord(char) <= high for char in text for low, high in ranges)


KINDS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("surrogates", lambda t: _has(t, "Cs")),
    ("characters new in Unicode 16", lambda t: _within(t, UNICODE_16)),
    ("Unicode whitespace", lambda t: any(char.isspace() and char > "\x7f" for char in t)),
    ("characters that are not assigned, or newer than this Python", lambda t: _has(t, "Cn")),
    ("ASCII whitespace runs", lambda t: t.isspace() or re.search(r"\s\s", t) is not None),
    ("digits", lambda t: _has(t, "N")),
    ("CJK", lambda t: _within(t, CJK_RANGES)),
    ("combining marks", lambda t: _has(t, "M")),
    ("punctuation and symbols", lambda t: _has(t, "P", "S")),
)
