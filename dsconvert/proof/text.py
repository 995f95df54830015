"""The text of a proof: the windows that are scored, and whether an output handles text as its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsconvert.calibration.record import evaluation_windows
from dsconvert.errors import TokenizerError
from dsconvert.events import Check, Event
from dsconvert.models.config import ModelConfig
from dsconvert.proof import logprob_file
from dsconvert.proof.options import ProofOptions
from dsconvert.proof.sources import Opened, Reference
from dsconvert.texts import builtin
from dsconvert.texts.defaults import LENGTH, STRIDE, WINDOWS
from dsconvert.texts.encode_long import Encode
from dsconvert.texts.sets import BUILTIN, load_text
from dsconvert.texts.windows import Windows, consecutive, strided
from tokenizer_tools import identity, parity
from tokenizer_tools.library import ids as encode
from tokenizer_tools.load import load_tokenizer

PICTURED = "the model's format, for strings and pictures"
PAGE = 20_000  # characters of text on which tokenizers are compared, besides the probes


@dataclass(frozen=True)
class Text:
    """The windows that are scored, and the pages on which tokenizers are compared."""

    windows: Windows
    pages: tuple[str, ...]
    source: str


def choose_text(reference: Reference, asked: ProofOptions) -> Generator[Event, None, Text]:
    """The windows to score, cut as asked from the text that is named; raises UsageError, CheckpointError."""
    tokenizer, bos = reference.tokenizer.tokenizer, reference.tokenizer.first_id
    length = min(asked.length or LENGTH, reference.config.context_length)
    stride = min(asked.stride, length)
    if asked.kld_base is not None and os.path.lexists(asked.kld_base):
        base = logprob_file.open_base(asked.kld_base)
        return Text(base.windows, pages_of(builtin.evaluation_page(PAGE)), str(asked.kld_base))
    if asked.text == BUILTIN:
        count = length + (asked.windows - 1) * (length if asked.kld_base else stride)
        page = builtin_page(reference.tokenizer.encode, count)
        ids = np.array(encode(tokenizer, [page])[0][:count], np.int64)
        if asked.kld_base is not None:
            return Text(consecutive(ids, length, bos), pages_of(page), BUILTIN)
        return Text(strided(ids, length, stride, bos), pages_of(page), BUILTIN)
    found = yield from load_text(asked.text, "evaluation")
    if asked.kld_base is not None:
        stride = length
    windows = evaluation_windows(
        found, lambda texts: encode(tokenizer, texts), length=length, stride=stride, count=asked.windows,
        bos=bos,
    )  # fmt: skip
    if asked.kld_base is not None:
        windows = Windows(windows.tokens, np.full(len(windows.tokens), length // 2, np.int64))
    return Text(windows, pages_of(found.documents[0]), f"{found.name} {found.provenance}")


def default_windows(encode: Encode, config: ModelConfig, bos: int | None) -> Windows:
    """The windows that a proof scores where no text is asked for; `encode` returns the ids of texts."""
    length = min(LENGTH, config.context_length)
    count = length + (WINDOWS - 1) * min(STRIDE, length)
    ids = np.array(encode([builtin_page(encode, count)])[0][:count], np.int64)
    return strided(ids, length, min(STRIDE, length), bos)


def builtin_page(encode: Encode, tokens: int) -> str:
    """A page of the built-in evaluation text (prose, code, some Chinese) of at least so many tokens."""
    chars = 4 * tokens
    while True:
        page = builtin.evaluation_page(chars)
        found = len(encode([page])[0])
        if found >= tokens:
            return page
        chars = max(chars + 1000, chars * tokens // max(found, 1))


def pages_of(page: str) -> tuple[str, ...]:
    """The probes, and the beginning of a text in pieces that every runtime takes."""
    pieces = [page[at : at + 4000] for at in range(0, min(len(page), PAGE), 4000)]
    return (*parity.PROBES, *pieces)


def check_text(opened: Opened, reference: Reference, pages: Sequence[str]) -> list[Check]:
    """Tokenizer, special tokens and chat template, from the output's own files."""
    if isinstance(opened.text, TokenizerError):
        return [Check("token ids", False, str(opened.text))]
    own = handling(reference, opened)
    found = identity.findings(own, opened.text, pages)
    if opened.keys:
        found.append(identity.same_runtime(own, opened.keys, pages))
    if len(reference.templates) > 1 and own.template == reference.templates[-1]:
        found = [replace(f, detail=PICTURED) if f.same and f.name == "chat template" else f for f in found]
    return [Check(f.name, f.same, f.detail, f.count) for f in found]


def handling(reference: Reference, opened: Opened) -> identity.TextHandling:
    """How the checkpoint handles text; of the templates that an output may carry the one that it does.

    Whether BOS is put before a text a file states, and can be asked to; a folder's files are copies.
    """
    data = reference.tokenizer
    if not opened.keys and reference.add_bos is not None:
        data = load_tokenizer(reference.folder, reference.whole.vocab_size)
    own = identity.of_data(data)
    template = "" if isinstance(opened.text, TokenizerError) else opened.text.template
    known = template if template in reference.templates else reference.templates[-1]
    return replace(own, template=known)
