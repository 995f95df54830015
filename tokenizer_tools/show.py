"""Opens any file that holds a tokenizer, and tells its pre-tokenizer, for `dsconvert tokenizer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError
from tokenizer_tools import sentencepiece_model
from tokenizer_tools.kinds import KINDS, kind_of
from tokenizer_tools.library import open_json, read_object, read_text
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
    """The tokenizer of a checkpoint folder, a tokenizer.json or a tokenizer.model; raises TokenizerError."""
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
    """The tokenizer rebuilt from a GGUF file's keys alone; raises TokenizerError."""
    tokenizer, kind = rebuild(keys, path), KINDS[str(keys["tokenizer.ggml.model"])]
    return Opened(path, tokenizer, from_gguf(keys, path), keys.get("tokenizer.ggml.pre"), kind.words)
