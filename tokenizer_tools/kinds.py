"""The two kinds of tokenizer that a GGUF file can state, as a table: what each reads of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconvert.errors import TokenizerError
from tokenizer_tools import spm
from tokenizer_tools.special import check_bytes, normalizer
from tokenizer_tools.steps import PreTokenizer, extract
from tokenizer_tools.vocabulary import BYTE, NORMAL, read_merges, read_pairs

# Pre-tokenizer names under which llama.cpp puts BOS before a text unless the file says otherwise
# (src/llama-vocab.cpp); under every other name of this kind it does not.
BOS_BY_DEFAULT = frozenset(
    ["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"]
)
# Steps of a pre-tokenizer without which a text is not byte-level; one that is not known is named elsewhere.
WORDS = (None, "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary on its way to a file: one text and one type for each row, and the model's own tokens."""

    texts: Sequence[str]
    types: Sequence[int]
    vocab: Mapping[str, int]


@dataclass(frozen=True)
class Parts:
    """What a kind of tokenizer states besides its tokens; see `TokenizerData`."""

    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...] = ()
    spaces: str = ""
    ignore_merges: bool = False
    normalizer: str = ""
    spec: PreTokenizer = field(default_factory=lambda: PreTokenizer(()))
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """One kind: its `tokenizer.ggml.model`, what a runtime does where a file is silent, and its verbs.

    `ids` are the special ids that llama.cpp takes where a file has no key for them, `adds_bos` whether it
    puts BOS before a text under a pre-tokenizer's name, `steps` the pre-tokenizer as regex steps.
    """

    model: str
    words: str
    ids: Mapping[str, int]
    adds_bos: Callable[[object], bool]
    steps: Callable[[Mapping[str, Any], Path], PreTokenizer | None]
    parts: Callable[[Mapping[str, Any], Vocabulary, Path], Parts]
    nbytes: Callable[[str], int]


def _byte_level(raw: Mapping[str, Any], tokens: Vocabulary, path: Path) -> Parts:
    model = raw["model"]
    notes = check_bytes(tokens.vocab, model.get("unk_token"), path)
    kept, told = normalizer(raw.get("normalizer"), path)
    return Parts(
        types=tuple(tokens.types),
        merges=read_merges(model, path),
        ignore_merges=model.get("ignore_merges") is True,
        normalizer=kept,
        spec=extract(raw.get("pre_tokenizer"), path),
        notes=(*notes, *told),
    )


def _sentencepiece(raw: Mapping[str, Any], tokens: Vocabulary, path: Path) -> Parts:
    model = raw["model"]
    merges = read_pairs(model, path)
    spm.check(model, tokens.vocab, merges, path)
    form = spm.spaces(raw, path)
    types = spm.types(tokens.texts, tokens.types, model.get("unk_token"))
    return Parts(
        types=types,
        merges=tuple(map(" ".join, merges)),
        scores=spm.scores(tokens.texts, types, merges),
        spaces=form,
        ignore_merges=model.get("ignore_merges") is True,
    )


def _piece_bytes(token: str) -> int:
    return 1 if token in spm.BYTES else len(token.replace(spm.SPACE, " ").encode())


BYTE_LEVEL = Kind(
    model="gpt2",
    words="byte-level BPE",
    ids={},
    adds_bos=lambda name: name in BOS_BY_DEFAULT,
    steps=lambda raw, path: extract(raw.get("pre_tokenizer"), path),
    parts=_byte_level,
    nbytes=len,  # a character for each byte
)
SENTENCEPIECE = Kind(
    model="llama",
    words="SentencePiece-like BPE: merged by score, no pre-tokenizer",
    ids={"bos": 1, "eos": 2, "unk": 0},
    adds_bos=lambda name: True,
    steps=lambda raw, path: None,
    parts=_sentencepiece,
    nbytes=_piece_bytes,
)
KINDS = {kind.model: kind for kind in (BYTE_LEVEL, SENTENCEPIECE)}


def token_bytes(model: str, tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    """The length in bytes of the text of every token; that of an added token is its own."""
    own = (NORMAL, BYTE)
    nbytes = KINDS[model].nbytes
    return [nbytes(t) if kind in own else len(t.encode()) for t, kind in zip(tokens, types, strict=True)]


def kind_of(raw: Mapping[str, Any], path: Path) -> Kind:
    """The kind of a tokenizer.json; raises TokenizerError for one that is of neither, with the reason."""
    model = raw.get("model")
    if not isinstance(model, dict):
        raise TokenizerError("has no model", where=path, hint="Fetch the file again")
    steps = list(_step_types(raw.get("pre_tokenizer")))
    level = "ByteLevel" in steps
    kind = model.get("type", "BPE")
    found = ""
    if kind != "BPE":
        found = f"a {str(kind)[:40]} model"
    elif level and model.get("byte_fallback"):
        found = "a byte-level BPE with byte_fallback besides"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        found = "a BPE with subword prefixes or suffixes"
    elif model.get("dropout"):
        found = f"a BPE with dropout {model['dropout']}, which gives random ids"
    if found:
        raise TokenizerError(
            f"is {found}; only byte-level BPE and SentencePiece-like BPE are supported",
            where=path,
            hint="llama.cpp's own converter handles Unigram models" if kind == "Unigram" else "",
        )
    words = all(step in WORDS for step in steps)
    return SENTENCEPIECE if not level and (model.get("byte_fallback") or words) else BYTE_LEVEL


def _step_types(raw: object, depth: int = 0) -> Sequence[object]:
    """The types of a pre-tokenizer's steps, sequences flattened."""
    if not isinstance(raw, Mapping) or depth > 16:
        return [None]
    inner = raw.get("pretokenizers")
    if isinstance(inner, list):
        return [step for item in inner for step in _step_types(item, depth + 1)]
    return [raw.get("type")]
