"""A SentencePiece-like BPE (Llama 2, Mistral 7B, Phi-3) in a GGUF file's terms: `tokenizer.ggml.model` llama.

llama.cpp reads no merges there. Of all neighbours whose text together is a token it joins those of the
highest score first, the leftmost of equals (llm_tokenizer_spm in src/llama-vocab.cpp). BPE by ranks does the
same where each token's score is minus the rank of the merge that makes it. That can be proven of all texts:
until something is joined across a token's bounds, its characters are joined in the same order as when the
token stands alone, so the last merge of the token alone is the only one that ever makes it; where every
token alone has the same ids by ranks and by scores, every text has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from dsconvert.errors import TokenizerError
from tokenizer_tools.library import check_length
from tokenizer_tools.special import UTF8_BYTES
from tokenizer_tools.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN

SPACE = "\u2581"  # how such a vocabulary spells a space
BYTES = {f"<0x{b:02X}>": b for b in range(256)}
# How a space comes before a text: PREPEND before every text between added tokens, as llama.cpp does it; the
# Metaspace step's two not before a text that begins with one, FIRST not behind an added token either.
PREPEND, FIRST, ALWAYS, NEVER = "prepend", "first", "always", "never"
METASPACE = (FIRST, ALWAYS)
NO_RANK = 1 << 62
Pair = tuple[str, str]


def spaces(raw: Mapping[str, Any], path: Path) -> str:
    """How a space comes before a text: PREPEND, FIRST, ALWAYS or NEVER.

    `raw` is a tokenizer.json. Raises TokenizerError where it does anything else to a text.
    """
    found, spelled = NEVER, False
    for step in _steps(raw.get("normalizer"), "normalizers", path):
        replaces = step.get("type") == "Replace" and step.get("pattern") == {"String": " "}
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            found = PREPEND
        elif replaces and step.get("content") == SPACE:
            spelled = True
        else:
            raise _refused("normalises text by", step, path)
    for step in _steps(raw.get("pre_tokenizer"), "pretokenizers", path):
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE:
            spelled, found = True, found if found == PREPEND else _scheme(step, path)
        elif not _keeps(step):
            raise _refused("splits text by", step, path)
    if not spelled:
        raise TokenizerError(
            f"does not spell a space as {SPACE}, as SentencePiece does",
            where=path,
            hint="Only byte-level and SentencePiece-like BPE can be carried",
        )
    return found


def _steps(raw: object, key: str, path: Path, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, sequences flattened."""
    if raw is None:
        return
    if not isinstance(raw, Mapping) or depth > 16:
        raise TokenizerError(f"has an unreadable {key[:-1]}", where=path, hint="Fetch the file again")
    if raw.get("type") != "Sequence":
        yield raw
        return
    inner = raw.get(key)
    for step in inner if isinstance(inner, list) else [inner]:
        yield from _steps(step, key, path, depth + 1)


def _scheme(step: Mapping[str, Any], path: Path) -> str:
    scheme = step.get("prepend_scheme", ALWAYS if step.get("add_prefix_space", True) else NEVER)
    if scheme not in (FIRST, ALWAYS, NEVER):
        raise _refused("splits text by", step, path)
    return str(scheme)


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a step splits each place by itself (then every token alone is proof), or nothing at all.

    Gemma's splits at spaces, where none is left.
    """
    return step.get("type") == "Digits" or (
        step.get("type") == "Split" and step.get("pattern") == {"String": " "}
    )


def _refused(doing: str, step: Mapping[str, Any], path: Path) -> TokenizerError:
    what = {key: value for key, value in step.items() if key in ("pattern", "content", "prepend")}
    return TokenizerError(
        f"{doing} {str(step.get('type'))[:40]}{f' {what}'[:100] if what else ''}",
        where=path,
        why="llama.cpp's SentencePiece tokenizer puts a space before a text and does nothing else to it",
        hint="Such a tokenizer cannot be stated in a GGUF file",
    )


def check(model: Mapping[str, Any], vocab: Mapping[str, int], merges: Sequence[Pair], path: Path) -> None:
    """Raises TokenizerError where llama.cpp cannot tokenize as `model` does, for lack of some token."""
    missing = [token for token, b in BYTES.items() if b in UTF8_BYTES and token not in vocab]
    if not model.get("byte_fallback") or missing:
        listed = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise TokenizerError(
            "is a BPE without a ByteLevel pre-tokenizer and without byte_fallback",
            where=path,
            why=f"these bytes have no token: {listed}" if missing else "its bytes are the unknown token",
            hint="llama.cpp makes bytes of what has no token, and needs all of them",
        )
    made = _made(merges)
    for token in made:
        check_length(token, path)
    odd = next((pair for pair in merges if not BYTES.keys().isdisjoint(pair)), None)
    apart = next((t for t in vocab if t in made and not all(c in vocab for c in t)), None)
    if odd or apart:
        said = f"merges the bytes {' '.join(odd)}" if odd else f"has no token for a character of {apart!r}"
        raise TokenizerError(
            f"{said[:120]}", where=path, why="llama.cpp turns what has no token into bytes after it merged"
        )


def _made(merges: Sequence[Pair]) -> frozenset[str]:
    return frozenset(left + right for left, right in merges)


def types(tokens: Sequence[str], kinds: Sequence[int], unk: object) -> tuple[int, ...]:
    """The token types, with those of the bytes and, where it is a special token, of the unknown token."""
    found = list(kinds)
    for i, token in enumerate(tokens):
        if token in BYTES and kinds[i] == NORMAL:
            found[i] = BYTE
        elif token == unk and kinds[i] == CONTROL:
            found[i] = UNKNOWN
    return tuple(found)


def scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[Pair]) -> tuple[float, ...]:
    """Every token's score: minus the rank of the merge that makes it; below all of those where none does.

    Tokens that are not pieces of text have 0, as in SentencePiece.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ways = Counter(left + right for left, right in ranks)
    last = {left + right: rank for (left, right), rank in ranks.items()}
    found = []
    for i, token in enumerate(tokens):
        rank = last.get(token, NO_RANK)
        if ways[token] > 1:
            rank = _last_rank(token, ranks)
        if kinds[i] != NORMAL:
            found.append(0.0)
        else:
            found.append(float(-rank if rank != NO_RANK else -len(merges) - i))
    return tuple(found)


def _last_rank(token: str, ranks: Mapping[Pair, int]) -> int:
    """The rank of the last merge that makes a token of its characters; NO_RANK where they stay apart."""
    parts, rank = list(token), NO_RANK
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, NO_RANK), n) for n, pair in enumerate(pairwise(parts)))
        if rank == NO_RANK:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return rank


def merge_order(
    tokens: Sequence[str], kinds: Sequence[int], merges: int, scored: Sequence[float]
) -> list[int]:
    """The ids of the tokens that merges make, in the order in which they are made."""
    made = [i for i, kind in enumerate(kinds) if kind == NORMAL and scored[i] > -merges]
    return sorted((i for i in made if len(tokens[i]) > 1), key=lambda i: -scored[i])


def out_of_order(order: Sequence[int], scored: Sequence[float]) -> list[int]:
    """Of ids in the order of their merges those that `scored` puts above the ones before them."""
    wrong, least = [], float("inf")
    for i in order:
        if i < len(scored) and scored[i] <= least:
            least = scored[i]
        else:
            wrong.append(i)
    return wrong


def pairs_by_score(scored: Mapping[str, float], where: object = "") -> list[Pair]:
    """Every pair of tokens whose text together is a token, by that one's score: merges that do as scores do.

    Llama's and Mistral's runs of spaces all have one score. There the leftmost of equals, with the longest
    left part first, grows a run from its left as llama.cpp does. Raises TokenizerError where other tokens
    have the same score: no list of merges can say "leftmost".
    """
    found: list[tuple[float, int, int, Pair]] = []
    owners: dict[float, str] = {}
    for token, score in scored.items():
        check_length(token, where)
        if not isfinite(score):
            raise TokenizerError(f"gives {token[:40]!r} the score {score}", where=where)
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(a, b) for a, b in cuts if a in scored and b in scored and not BYTES.keys() & {a, b}]
        owner = owners.setdefault(score, token) if pairs else token
        if owner != token and not (_is_run(owner) and _is_run(token)):
            raise _tied(owner, token, score, where)
        found += [(-score, -len(a), -len(b), (a, b)) for a, b in pairs]
    return [pair for *_, pair in sorted(found)]


def _is_run(token: str) -> bool:
    return len(set(token)) == 1


def _tied(first: str, second: str, score: float, where: object) -> TokenizerError:
    return TokenizerError(
        f"gives {first[:40]!r} and {second[:40]!r} the same score, {score:g}",
        where=where,
        why="a score says which of two tokens is merged first",
        hint="Convert the model again from its checkpoint",
    )


def around(form: str) -> dict[str, Any]:
    """What a tokenizer.json says around its model: the steps of a form of spaces, and the way back."""
    replace: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = [prepend, replace] if form == PREPEND else [replace]
    meta = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": form, "split": False}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": None if form in METASPACE else {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": meta if form in METASPACE else None,
        "decoder": {"type": "Sequence", "decoders": back if form == NEVER else [*back, strip]},
    }


def foreseen(form: str, text: str) -> bool:
    """Whether llama.cpp puts a space before a text where a tokenizer of this form puts none."""
    return form in METASPACE and text[:1] in (" ", SPACE)
