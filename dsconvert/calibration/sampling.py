"""Windows of tokens from a text, by a seed: the same windows on every platform and Python version.

`documents` and `stream` take the random numbers that the GPTQ reference (IST-DASLab/gptq, datautils.py)
takes for c4 and wikitext2, so that the same tokenizer and seed give the reference's windows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsconvert.errors import UsageError
from dsconvert.texts.encode_long import Encode, IntArray, encode_long
from dsconvert.texts.sets import TextSet

PAGE = 1 << 14  # characters; a longer document is packed in pages, so that all of it can be met
BATCH = 32  # documents that are encoded at once


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: `samples` windows of `length` tokens by `seed`; `bos` begins each document if given."""

    samples: int = 128
    length: int = 2048
    seed: int = 0
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise UsageError(f"{self.samples} windows of {self.length} tokens make no sense")


@dataclass(frozen=True)
class Drawn:
    """Windows int64 [samples, length], and what they were cut from.

    `documents` are the indices of those used, each once; `cut` counts those of which a part is in no
    window, and `left_out` the tokens that were encoded for them in vain.
    """

    windows: IntArray
    documents: tuple[int, ...]
    cut: int
    left_out: int


def draw(text: TextSet, encode: Encode, ask: SampleRequest) -> Drawn:
    """Draw windows as the text's method says; `encode` returns ids without special tokens.

    Raises UsageError where the text is too short.
    """
    methods = {"documents": _documents, "stream": _stream, "packed": _packed}
    return methods[text.method](text, encode, ask)


def _documents(text: TextSet, encode: Encode, ask: SampleRequest) -> Drawn:
    """One random window from each of `samples` random documents that are longer than `length` tokens.

    A document of exactly `length` tokens, at which the reference stops with an exception, is passed over.
    """
    rng = random.Random(ask.seed)
    long = _LongDocuments(text, encode, ask)
    windows, spans = [], dict[int, list[int]]()
    for _ in range(ask.samples):
        index, ids = long.next(rng)
        start = rng.randint(0, len(ids) - ask.length - 1)
        windows.append(ids[start : start + ask.length])
        spans.setdefault(index, []).append(start)
    left = [len(long.ids[index]) - _covered(starts, ask.length) for index, starts in spans.items()]
    return Drawn(np.stack(windows), tuple(spans), len(left), sum(left))


class _LongDocuments:
    """Random documents longer than `length`; knows when there can be none, so that it always ends."""

    def __init__(self, text: TextSet, encode: Encode, ask: SampleRequest) -> None:
        self.text, self.encode, self.ask = text, encode, ask
        self.ids: dict[int, IntArray] = {}
        self.short: set[int] = set()
        self.longest = 0
        sizes = np.diff(np.frombuffer(text.documents.ends, np.int64), prepend=0)
        self.candidates = int(np.count_nonzero(sizes >= self.bytes_needed))

    @property
    def bytes_needed(self) -> int:
        """A token stands for one byte at least, so that most short documents need no encoding."""
        return self.ask.length + 1 - (self.ask.bos is not None)

    def next(self, rng: random.Random) -> tuple[int, IntArray]:
        while len(self.short) < self.candidates:
            index = rng.randint(0, len(self.text.documents) - 1)
            if index in self.ids:
                return index, self.ids[index]
            if index in self.short or self.text.documents.nbytes(index) < self.bytes_needed:
                continue
            ids = _ids(self.encode, self.text.documents[index], self.ask.bos)
            self.longest = max(self.longest, len(ids))
            if len(ids) > self.ask.length:
                self.ids[index] = ids
                return index, ids
            self.short.add(index)
        longest = f"The longest of {len(self.text.documents)} has fewer than {self.bytes_needed} bytes"
        if self.candidates:
            longest = f"Those of {self.bytes_needed} bytes and more have {self.longest} tokens at the most"
        option = " with --calib-len" if self.text.split == "calibration" else ""
        raise UsageError(
            f"no document of {self.text.name} is longer than {self.ask.length} tokens",
            why=longest,
            hint=f"Ask for shorter windows{option}, or take another text",
        )


def _ids(encode: Encode, document: str, bos: int | None) -> IntArray:
    ids = encode_long(encode, document)
    return ids if bos is None or ids[:1] == bos else np.concatenate([[bos], ids])


def _covered(starts: Sequence[int], length: int) -> int:
    """How many tokens of a document its windows hold, each counted once."""
    end = covered = 0
    for start in sorted(starts):
        covered += start + length - max(start, end)
        end = start + length
    return covered


def _stream(text: TextSet, encode: Encode, ask: SampleRequest) -> Drawn:
    """Random windows of the whole text, joined; they may overlap."""
    ids = _ids(encode, joined(text), ask.bos)
    if len(ids) < ask.samples * ask.length:
        raise _too_short(text, len(ids), ask)
    rng = random.Random(ask.seed)
    room = len(ids) - ask.length
    starts = [rng.randint(0, room - 1) if room else 0 for _ in range(ask.samples)]
    windows = np.stack([ids[start : start + ask.length] for start in starts])
    return Drawn(windows, tuple(range(len(text.documents))), 1, len(ids) - _covered(starts, ask.length))


def joined(text: TextSet) -> str:
    """All documents with the text's separator between them."""
    return text.separator.join(text.documents[i] for i in range(len(text.documents)))


def _packed(text: TextSet, encode: Encode, ask: SampleRequest) -> Drawn:
    """Documents in random order, end to end, cut into windows without overlap; kinds take equal shares."""
    need, total = ask.samples * ask.length, 0
    runs: list[IntArray] = []
    used: list[int] = []
    for batch in _batches(_order(text, random.Random(ask.seed))):
        pages = [page + (text.separator if ask.bos is None else "") for _, page in batch]
        for (index, _), ids in zip(batch, encode(pages), strict=True):
            first = [] if ask.bos is None or ids[:1] == [ask.bos] else [ask.bos]
            runs.append(np.asarray([*first, *ids], np.int64))
            used.append(index)
            total += len(runs[-1])
            if total >= need:
                windows = np.concatenate(runs)[:need].reshape(ask.samples, ask.length)
                whole = Counter(used[:-1] if total > need else used)
                cut = sum(whole[i] < len(list(_pages(text, i))) for i in set(used))
                return Drawn(windows, tuple(dict.fromkeys(used)), cut, total - need)
    raise _too_short(text, total, ask)


def _too_short(text: TextSet, tokens: int, ask: SampleRequest) -> UsageError:
    need, fit = ask.samples * ask.length, tokens // ask.length
    less = f"--calib-samples {fit}" if fit else f"--calib-samples 1 --calib-len {tokens}"
    return UsageError(
        f"{text.name} has {tokens} token{'s' * (tokens != 1)}, "
        f"{ask.samples} windows of {ask.length} need {need}",
        hint=f"Give more text, or ask for less: {less}" if tokens > 1 else "Give more text",
    )


def _order(text: TextSet, rng: random.Random) -> Iterator[tuple[int, str]]:
    """Document indices and pages in random order; the kind that has had the fewest characters comes next."""
    queues: dict[str, list[tuple[int, int, int]]] = {}
    for index in range(len(text.documents)):
        kind = text.kinds[index] if text.kinds else ""
        queues.setdefault(kind, []).extend((index, *span) for span in _pages(text, index))
    for queue in queues.values():
        rng.shuffle(queue)
    given = dict.fromkeys(queues, 0)
    while given:
        kind = min(given, key=lambda name: given[name])
        if not queues[kind]:
            del given[kind]
            continue
        index, start, end = queues[kind].pop()
        given[kind] += end - start
        yield index, text.documents[index][start:end]


def _pages(text: TextSet, index: int) -> Iterator[tuple[int, int]]:
    """Where a document's pages begin and end, at line ends; a conversation and a short document is one."""
    document = text.documents[index]
    if not text.separator or len(document) <= PAGE:
        if document.strip():
            yield 0, len(document)
        return
    start = 0
    while start < len(document):
        end = start + PAGE
        end = len(document) if end >= len(document) else document.rfind("\n", start, end) + 1 or end
        if document[start:end].strip():
            yield start, end
        start = end


def _batches(items: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
