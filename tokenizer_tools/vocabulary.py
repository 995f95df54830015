"""The vocabulary of a BPE: tokens, types, added tokens and merges, checked for contradictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError
from tokenizer_tools.library import guarded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# llama.cpp's token types (llama.h, llama_token_type); UNKNOWN and BYTE are a SentencePiece model's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u0120"  # how a byte-level vocabulary spells a space
# The classes whose tokenizer is defined by vocab.json and merges.txt alone.
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
FLAGS = ("normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """An entry of `added_tokens`: matched in the text as it is, before the pre-tokenizer."""

    id: int
    content: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


def read_vocab(model: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Token -> id of the BPE model; raises TokenizerError when an id is not a number or has two tokens."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise TokenizerError("has a vocabulary that is not token to id", where=path)
    seen: dict[int, str] = {}
    for token, i in vocab.items():
        if seen.setdefault(i, token) != token:
            raise TokenizerError(
                f"gives the id {i} to two tokens, {seen[i][:60]!r} and {token[:60]!r}",
                where=path,
                hint="Fetch the file again",
            )
    return vocab


def read_merges(model: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The merges as "left right"; both forms of the file; a space inside a part becomes U+0120."""
    entries = model.get("merges") or ()
    if not _are_pairs(entries):
        return _merge_lines(entries, path)
    pairs = tuple(f"{left} {right}" for left, right in entries)
    if "".join(pairs).count(" ") == len(pairs):
        return pairs
    return tuple(f"{left.replace(' ', SPACE)} {right.replace(' ', SPACE)}" for left, right in entries)


def read_pairs(model: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    """The merges as pairs, of both forms of the file."""
    entries = model.get("merges") or ()
    pairs = entries if _are_pairs(entries) else [line.split(" ") for line in _merge_lines(entries, path)]
    if not all(len(pair) == 2 for pair in pairs):
        raise TokenizerError("has a merge that is not a pair of texts", where=path)
    return [(left, right) for left, right in pairs]


def _are_pairs(entries: Any) -> bool:
    listed = set(map(type, entries)) == {list} and set(map(len, entries)) == {2}
    return listed and set(map(type, chain(*entries))) == {str}


def _merge_lines(entries: Any, path: Path) -> tuple[str, ...]:
    if set(map(type, entries)) <= {str}:
        return tuple(entry for entry in entries if not entry.startswith("#version"))
    raise TokenizerError("has a merge that is not a pair of texts", where=path)


def gpt2_json(vocab: Mapping[str, Any], merges: Sequence[str], prefix_space: bool) -> str:
    """The text of GPT-2's tokenizer.json of a vocabulary and the lines of merges.txt."""
    kind = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    pairs = [line for line in merges if line.strip() and not line.startswith("#version")]
    parts: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**kind, "add_prefix_space": prefix_space},
        "post_processor": None,
        "decoder": {**kind, "add_prefix_space": True},
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": pairs},
    }
    return json.dumps(parts, ensure_ascii=False)


def added_tokens(
    raw: Mapping[str, Any], library: Tokenizer, vocab: Mapping[str, int], path: Path
) -> dict[int, AddedToken]:
    """The added tokens of a tokenizer.json by id, in order of id.

    Raises TokenizerError when the library gives one another id than the file says, or when an id has two.
    """
    added: dict[int, AddedToken] = {}
    owners = {i: token for token, i in vocab.items()}
    for entry in raw.get("added_tokens") or ():
        token = _added_token(entry, path)
        with guarded("look up an added token", path):
            actual = library.token_to_id(token.content)
        owner = added[token.id].content if token.id in added else owners.get(token.id, token.content)
        if actual != token.id or token.id in added or owner != token.content:
            taken = f"that id belongs to {owner[:60]!r}" if owner != token.content else ""
            raise TokenizerError(
                f"the added token {token.content[:60]!r} cannot have the id {token.id} of the file",
                where=path,
                why=taken or f"the tokenizers library gives it {actual}",
                hint="Fetch the file again, or save it anew with the tokenizers library",
            )
        added[token.id] = token
    return dict(sorted(added.items()))


def _added_token(entry: Any, path: Path) -> AddedToken:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("content"), str)
        or not entry["content"]
        or type(entry.get("id")) is not int
    ):
        raise TokenizerError("has an added token without text or id", where=path, hint="Fetch the file again")
    flags = {name: entry.get(name) is True for name in FLAGS}
    return AddedToken(entry["id"], entry["content"], entry.get("special") is True, **flags)


def rows_of(
    vocab: Mapping[str, int], added: Mapping[int, AddedToken], rows: int, path: Path
) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Tokens and types, one per row, and the rows in use; rows that no token has are `[PADn]`, unused.

    Raises TokenizerError when there are more ids than rows.
    """
    used = max(max(vocab.values(), default=-1), max((t.id for t in added.values()), default=-1)) + 1
    if used > rows or not used:
        raise TokenizerError(
            f"has token ids up to {used - 1}, the embedding has {rows} rows",
            where=path,
            hint="Resize the embedding (model.resize_token_embeddings) and save both, or fetch them again",
        )
    tokens, types = [""] * rows, [UNUSED] * rows
    for token, i in vocab.items():
        tokens[i], types[i] = token, NORMAL
    for t in added.values():
        tokens[t.id], types[t.id] = t.content, CONTROL if t.special else USER_DEFINED
    taken = {token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED}
    for i in (i for i in range(rows) if types[i] == UNUSED):
        tokens[i] = f"[PAD{i}]"
        while tokens[i] in taken:
            tokens[i] += "_"
    return tuple(tokens), tuple(types), used
