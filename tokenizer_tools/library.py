"""Calls the `tokenizers` library; every failure on hostile input becomes a TokenizerError.

Its Rust side panics on some malformed files and on `str()` or `repr()` of some of its objects (a
BaseException that a plain `except Exception` misses), so it is only called here, and none of its objects
is ever printed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert import reading
from dsconvert.errors import TokenizerError
from tokenizer_tools.steps import PreTokenizer, to_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer as Splitter

EMPTY_BPE = {"type": "BPE", "vocab": {}, "merges": []}
MOST = 1 << 21  # tokens, merges; published tokenizers have up to some 260,000
LONGEST = 1 << 12  # characters of an added token; published ones have up to some 50
AGAIN = "Fetch the tokenizer files again"


@contextmanager
def guarded(doing: str, where: object) -> Iterator[None]:
    """Turns whatever the library raises, panics included, into a TokenizerError that says `doing`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(
            f"cannot {doing}",
            where=where,
            why=f"the tokenizers library says: {' '.join(str(error).split())[:300]}",
            hint="Fetch the tokenizer files again, or update the tokenizers package",
        ) from None


def open_tokenizer(text: str, where: object = "tokenizer.json") -> Tokenizer:
    """The tokenizer of a tokenizer.json's text, without truncation and padding.

    Raises TokenizerError when the library does not take it.
    """
    from tokenizers import Tokenizer

    with guarded("read the tokenizer", where):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def open_json(text: str, where: object) -> tuple[dict[str, Any], Tokenizer]:
    """A tokenizer.json's text as JSON and as the library's object.

    Raises TokenizerError for what the library does not take, and for sizes that would keep it busy for hours.
    """
    raw = parse_object(text, where)
    model = raw.get("model")
    if isinstance(model, dict):
        for key in ("vocab", "merges"):
            _check_size(model.get(key), f"model's {key} have", where)
    _check_size(raw.get("added_tokens"), "added_tokens have", where)
    added = raw.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict):
            check_length(entry.get("content"), where)
    return raw, open_tokenizer(text, where)


def _check_size(value: object, what: str, where: object) -> None:
    if isinstance(value, dict | list) and len(value) > MOST:
        raise TokenizerError(
            f"the {what} {len(value):,} entries", where=where, why=f"No tokenizer has over {MOST:,}"
        )


def check_length(content: object, where: object) -> None:
    """Raise TokenizerError for the text of an added token that is longer than any is."""
    if isinstance(content, str) and len(content) > LONGEST:
        raise TokenizerError(
            f"the token {content[:40]!r}... has {len(content):,} characters",
            where=where,
            why=f"No tokenizer has one of over {LONGEST:,}",
        )


def build_tokenizer(
    around: Mapping[str, Any],
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    model: Mapping[str, Any],
    added: Sequence[Mapping[str, Any]],
    where: object = "",
) -> Tokenizer:
    """The BPE tokenizer of its parts: what `open_tokenizer` makes of their JSON, in half the time.

    `around` is what a tokenizer.json says around the model, `model` what it says in it besides vocabulary
    and merges.
    Raises TokenizerError when the library does not take it.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    for token in added:
        check_length(token["content"], where)
    with guarded("read the tokenizer", where):
        tokenizer = Tokenizer.from_str(
            json.dumps({"version": "1.0", "model": EMPTY_BPE, **_NOTHING, **around})
        )
        tokenizer.model = BPE(dict(vocab), list(merges), **model)
        tokenizer.add_tokens([AddedToken(**token) for token in added])
        return tokenizer


def ids(tokenizer: Tokenizer, texts: Sequence[str], where: object = "tokenizer.json") -> list[list[int]]:
    """The token ids of each text, nothing added; added tokens inside a text are recognised.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> ids(data.tokenizer, ["a b", "12"])
    [[64, 279], [16, 17]]
    """
    with guarded("encode a text", where):
        return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def decode(tokenizer: Tokenizer, ids: Sequence[int], where: object = "tokenizer.json") -> str:
    """The text of token ids, special tokens among it.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> decode(data.tokenizer, [64, 279])
    'a b'
    """
    with guarded("decode tokens", where):
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def tokens(tokenizer: Tokenizer, text: str, where: object = "tokenizer.json") -> tuple[list[int], list[str]]:
    """The ids and the tokens of one text, nothing added.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> tokens(data.tokenizer, "f(x)")
    ([69, 7, 87, 8], ['f', '(', 'x', ')'])
    """
    with guarded("encode a text", where):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.tokens


def same_pieces(first: Splitter, second: Splitter, texts: Sequence[str], where: object = "") -> bool:
    """Whether two pre-tokenizers split every text into the same pieces."""
    with guarded("split a text", where):
        return all(first.pre_tokenize_str(text) == second.pre_tokenize_str(text) for text in texts)


def splitter(spec: PreTokenizer, where: object = "") -> Splitter:
    """The library's pre-tokenizer object of a spec; raises TokenizerError for a pattern it refuses."""
    from tokenizers import Tokenizer

    text = json.dumps({"version": "1.0", "model": EMPTY_BPE, "pre_tokenizer": to_json(spec), **_NOTHING})
    with guarded("build the pre-tokenizer", where):
        made: Splitter | None = Tokenizer.from_str(text).pre_tokenizer
    if made is None:
        raise TokenizerError("the tokenizers library made no pre-tokenizer of the steps", where=where)
    return made


_NOTHING: dict[str, Any] = {
    "added_tokens": [],
    "truncation": None,
    "padding": None,
    "normalizer": None,
    "post_processor": None,
    "decoder": None,
}


def read_text(path: Path, limit: int = reading.TOKENIZER) -> str:
    """A text file whole; raises TokenizerError when it is not there, no file, too big or not UTF-8."""
    return reading.read_text(path, limit, TokenizerError, AGAIN)


def parse_object(text: str, where: object) -> dict[str, Any]:
    """The JSON object that `text` is; raises TokenizerError when it is none."""
    value = reading.parse_json(text, where, TokenizerError, AGAIN)
    return reading.as_object(value, where, TokenizerError, AGAIN)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; an absent file is an empty object. Raises TokenizerError otherwise."""
    return parse_object(read_text(path, reading.CONFIG), path) if os.path.lexists(path) else {}
