"""A tokenizer on its own, as `dsconvert tokenizer` shows it: opened, described, encoding, compared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError, UsageError
from tokenizer_tools import parity, sentencepiece_model
from tokenizer_tools.kinds import KINDS, kind_of
from tokenizer_tools.library import open_json, read_object, read_text, tokens
from tokenizer_tools.load import read_tokens
from tokenizer_tools.rebuild import rebuild
from tokenizer_tools.steps import PreTokenizer, from_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ANY_ROWS = 1 << 31  # where no embedding says how many tokens there are


@dataclass(frozen=True)
class Opened:
    """A tokenizer, the steps that it states itself (None when it states none), and its runtime name.

    `kind` says what kind it is, in words.
    """

    path: Path
    tokenizer: Tokenizer
    spec: PreTokenizer | None
    runtime: str | None
    kind: str


def open_folder(path: Path) -> Opened:
    """The tokenizer of a checkpoint folder, a tokenizer.json or a tokenizer.model; raises TokenizerError.

    >>> from dsconvert.checkpoints.locate import locate
    >>> open_folder(locate("sample:")).kind
    'byte-level BPE'
    """
    if os.path.isdir(path):
        found = read_tokens(path, read_object(path / "tokenizer_config.json"), ANY_ROWS)
        return _opened(found.path, found.raw, found.library)
    if not os.path.isfile(path):
        raise TokenizerError(
            "there is no tokenizer here",
            where=path,
            hint="Give a GGUF file, a model folder, a tokenizer.json or a tokenizer.model",
        )
    text = sentencepiece_model.to_json(path) if path.suffix == ".model" else read_text(path)
    raw, library = open_json(text, path)
    return _opened(path, raw, library)


def _opened(path: Path, raw: Mapping[str, Any], library: Tokenizer) -> Opened:
    kind = kind_of(raw, path)
    return Opened(path, library, kind.steps(raw, path), None, kind.words)


def open_metadata(path: Path, keys: Mapping[str, Any]) -> Opened:
    """The tokenizer rebuilt from a GGUF file's keys alone; raises TokenizerError.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> from tokenizer_tools.rebuild import gguf_keys
    >>> keys = {name: value for name, (_, value) in gguf_keys(data, "deepseek-llm").items()}
    >>> open_metadata(Path("x.gguf"), keys).runtime
    'deepseek-llm'
    """
    tokenizer, kind = rebuild(keys, path), KINDS[str(keys["tokenizer.ggml.model"])]
    return Opened(path, tokenizer, from_gguf(keys, path), keys.get("tokenizer.ggml.pre"), kind.words)


def described(opened: Opened) -> dict[str, Any]:
    """The tokenizer as plain data: kind, runtime name and, where it states them, its regex steps.

    >>> from dsconvert.checkpoints.locate import locate
    >>> found = described(open_folder(locate("sample:")))
    >>> [step["type"] for step in found["pre_tokenizer"]["steps"]]
    ['split', 'split', 'split', 'split', 'split', 'digits', 'bytelevel']
    """
    found: dict[str, Any] = {"kind": opened.kind, "runtime": opened.runtime}
    if opened.spec:
        steps = [vars(step) for step in opened.spec.steps]
        found["pre_tokenizer"] = {"sha256": opened.spec.sha256, "flavor": "oniguruma", "steps": steps}
    return found


def encoded(opened: Opened, text: str) -> dict[str, Any]:
    """A text with its ids and tokens; raises UsageError for text that is not UTF-8, TokenizerError.

    >>> from dsconvert.checkpoints.locate import locate
    >>> encoded(open_folder(locate("sample:")), "a b")
    {'text': 'a b', 'ids': [64, 279], 'tokens': ['a', 'Ġb']}
    """
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError("--encode needs text in UTF-8", where=text)
    ids, pieces = tokens(opened.tokenizer, text, opened.path)
    return {"text": text, "ids": ids, "tokens": pieces}


def compared(
    first: Opened, second: Opened, lines_file: Path | None, strings: int, seed: int
) -> dict[str, Any]:
    """The comparison of two tokenizers' ids: on the probes, the lines of a file and random strings.

    >>> from dsconvert.checkpoints.locate import locate
    >>> opened = open_folder(locate("sample:"))
    >>> compared(opened, opened, lines_file=None, strings=100, seed=0)["different"]
    0
    """
    lines = read_text(lines_file).splitlines() if lines_file else []
    texts = chain(parity.PROBES, lines, parity.random_texts(seed, strings))
    encoders = parity.encoder(first.tokenizer), parity.encoder(second.tokenizer)
    return asdict(parity.compare_ids(*encoders, texts))
