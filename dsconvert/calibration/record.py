"""Calibration tokens with a report on them, and the windows of an evaluation text."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dsconvert.calibration.sampling import Drawn, SampleRequest, draw, joined
from dsconvert.errors import UsageError
from dsconvert.events import Warn
from dsconvert.texts.encode_long import Encode, IntArray, encode_long
from dsconvert.texts.sets import Method, Split, TextSet
from dsconvert.texts.windows import Windows, strided, whole

SPAN = 50  # tokens: text that is repeated by chance is shorter
EVALUATION_WINDOWS = 256  # of c4, as the GPTQ reference takes them
FEW_TOKENS = 256  # distinct ones; fewer do not represent what a model meets
OVERLAP_WARNED = 0.01  # modules of the standard library share a function here and there: 0.2 %


@dataclass(frozen=True)
class Overlap:
    """How much of the calibration text the evaluation text holds too.

    A token is shared when it lies in a run of `span` tokens that both have; `share` is its part of all
    calibration tokens, `windows` counts the calibration windows with any.
    """

    text: str
    span: int
    tokens: int
    share: float
    windows: int


@dataclass(frozen=True)
class CalibrationReport:
    """What the calibration tokens are; `as_dict` is its JSON form.

    `documents` counts those of the set, `documents_used` those that windows were drawn from, of which
    `documents_cut` are only in part in a window, by `tokens_left_out` tokens; `duplicate_documents` and
    `duplicate_windows` repeat an earlier one exactly. `fingerprint` is the SHA-256 of the token ids.
    """

    text: str
    split: Split
    method: Method
    samples: int
    length: int
    seed: int
    tokens: int
    unique_tokens: int
    documents: int
    documents_used: int
    documents_cut: int
    tokens_left_out: int
    duplicate_documents: int
    duplicate_windows: int
    fingerprint: str
    overlap: Overlap | None
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """Token ids int64 [samples, length], and the report on them."""

    tokens: IntArray
    report: CalibrationReport


def sample(text: TextSet, encode: Encode, ask: SampleRequest | None = None) -> Calibration:
    """Draw calibration windows from `text`: 128 of 2048 tokens unless `ask` says otherwise.

    `encode` turns texts into ids without special tokens. The same text, tokenizer and `ask` give the same
    windows everywhere. Raises UsageError where the text is too short, or nearly one token only.
    """
    ask = ask or SampleRequest()
    drawn = draw(text, encode, ask)
    unique = np.unique(drawn.windows).size
    if unique < min(8, drawn.windows.size // 2):
        raise UsageError(
            f"{text.name} gives {drawn.windows.size} tokens of {unique} kinds: nothing can be learnt from it",
            hint="Give a text like those that the model is meant for",
        )
    return Calibration(drawn.windows, _report(text, ask, drawn, unique))


def _report(text: TextSet, ask: SampleRequest, drawn: Drawn, unique: int) -> CalibrationReport:
    used = {hashlib.sha256(text.documents[i].encode()).digest() for i in drawn.documents}
    distinct = {window.tobytes() for window in drawn.windows}
    return CalibrationReport(
        text=text.name,
        split=text.split,
        method=text.method,
        samples=ask.samples,
        length=ask.length,
        seed=ask.seed,
        tokens=drawn.windows.size,
        unique_tokens=unique,
        documents=len(text.documents),
        documents_used=len(drawn.documents),
        documents_cut=drawn.cut,
        tokens_left_out=drawn.left_out,
        duplicate_documents=len(drawn.documents) - len(used),
        duplicate_windows=len(drawn.windows) - len(distinct),
        fingerprint=fingerprint(drawn.windows),
        overlap=None,
        notes=text.notes,
        provenance=text.provenance,
    )


def fingerprint(tokens: IntArray) -> str:
    """SHA-256 of windows of ids: "n length" in decimal, a line end, the ids as little-endian int32."""
    digest = hashlib.sha256(f"{tokens.shape[0]} {tokens.shape[1]}\n".encode())
    digest.update(tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def held_against(calibration: Calibration, evaluation: IntArray, name: str, span: int = SPAN) -> Calibration:
    """The same calibration, its report completed by the overlap with an evaluation text's windows [m, k]."""
    return replace(
        calibration,
        report=replace(calibration.report, overlap=overlap(calibration.tokens, evaluation, name, span)),
    )


def overlap(calibration: IntArray, evaluation: IntArray, name: str, span: int = SPAN) -> Overlap:
    """What runs of `span` tokens the windows [n, length] and [m, k] have in common, by a 64-bit hash."""
    span = min(span, calibration.shape[1], evaluation.shape[1])
    found = np.isin(_hashes(calibration, span), _hashes(evaluation, span))
    covered = np.zeros(calibration.shape, np.int64)
    for k in range(span):
        covered[:, k : k + found.shape[1]] |= found
    shared = int(covered.sum())
    return Overlap(name, span, shared, shared / calibration.size, int(covered.any(axis=1).sum()))


def _hashes(tokens: IntArray, span: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A hash of each run of `span` tokens in each window: a polynomial over the mixed ids, modulo 2^64."""
    mixed = tokens.astype(np.uint64) + np.uint64(1)
    mixed = (mixed ^ (mixed << np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    runs = tokens.shape[1] - span + 1
    total = np.zeros((tokens.shape[0], runs), np.uint64)
    for k in range(span):
        total = total * np.uint64(0xBF58476D1CE4E5B9) + mixed[:, k : k + runs]
    return total


def warnings(report: CalibrationReport) -> list[Warn]:
    """What the report holds that a user should know before work begins; its notes have been said."""
    said = []
    if report.overlap and report.overlap.share > OVERLAP_WARNED:
        said.append(
            f"{report.overlap.share:.1%} of the calibration tokens stand in the evaluation text "
            f"({report.overlap.text}) too: its figures will flatter"
        )
    if report.unique_tokens < min(FEW_TOKENS, report.tokens // 4):
        said.append(f"{report.text} gives only {report.unique_tokens} distinct tokens of {report.tokens}")
    if report.duplicate_windows:
        said.append(f"{report.duplicate_windows} of {report.samples} calibration windows repeat another one")
    if report.method == "documents" and report.documents_used < report.samples:
        said.append(
            f"{report.samples} windows come from {report.documents_used} documents longer than "
            f"{report.length} tokens: shorter windows meet more of the text"
        )
    return [Warn(text) for text in said]


def evaluation_windows(
    text: TextSet,
    encode: Encode,
    *,
    length: int = 2048,
    stride: int = 512,
    count: int | None = None,
    seed: int = 0,
    bos: int | None = None,
) -> Windows:
    """The windows of an evaluation text; `count` is how many at the most.

    c4: 256 random windows, each scored whole, drawn as the GPTQ reference draws them, so that `bos` begins
    documents and not windows. Other texts are joined and walked: with a stride below `length` each window
    is scored on what the one before did not see, with the stride `length` consecutive windows are scored
    whole (the literature's wikitext2); `bos`, where given, takes the place of each window's first token.
    Raises UsageError where the text is too short.
    """
    if text.method == "documents":
        ask = SampleRequest(count or EVALUATION_WINDOWS, length, seed, bos)
        return whole(draw(text, encode, ask).windows)
    ids = encode_long(encode, joined(text))
    windows = strided(ids, length, min(stride, length), bos)
    return Windows(windows.tokens[:count], windows.first[:count])
