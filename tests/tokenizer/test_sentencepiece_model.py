"""tokenizer.model without a tokenizer.json: SentencePiece's protobuf, written here by its definition."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny_spm import CONFIG, SPACE, tokenizer_json
from tiny_tokenizer import write

from dsconvert.errors import TokenizerError
from tokenizer_tools import parity
from tokenizer_tools.library import ids
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import resolve
from tokenizer_tools.show import open_folder
from tokenizer_tools.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

KINDS = {NORMAL: 1, UNKNOWN: 2, CONTROL: 3, USER_DEFINED: 4, BYTE: 6}
BPE: dict[int, int] = {3: 2}
LLAMA: dict[int, int | bytes] = {3: 1, 4: 0, 5: 1}


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def message(fields: dict[int, Any]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


def model(data: TokenizerData, trainer: dict[int, Any] = BPE, normal: dict[int, Any] = LLAMA) -> bytes:
    """A tokenizer.model of a tokenizer's tokens and scores; runs of spaces have one score, as Llama's do."""
    pieces = b""
    for token, kind, score in zip(data.tokens[: data.used], data.types, data.scores, strict=False):
        run = len(token) > 1 and set(token) == {SPACE}
        pieces += field(1, message({1: token.encode(), 2: -1e9 if run else score, 3: KINDS[kind]}))
    return pieces + field(2, message({**trainer, 44: b"\x01"})) + field(3, message(normal))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizerData:
    return load_tokenizer(write(tmp_path_factory.mktemp("json"), tokenizer_json(), CONFIG), 2000)


def folder(path: Path, content: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(content)
    (path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return path


def test_the_same_tokenizer_from_either_file(data: TokenizerData, tmp_path: Path) -> None:
    found = load_tokenizer(folder(tmp_path / "m", model(data)), 2000)
    assert (found.tokens, found.types, found.special, found.spaces) == (
        data.tokens,
        data.types,
        data.special,
        "prepend",
    )
    texts = [*parity.PROBES, *(" " * n + "x" for n in range(30)), *parity.random_texts(3, 2000)]
    assert found.encode(texts) == data.encode(texts)
    assert resolve(found).proven
    shown = open_folder(tmp_path / "m" / "tokenizer.model")
    assert ids(shown.tokenizer, texts) == data.encode(texts)
    assert (shown.spec, shown.kind[:18]) == (None, "SentencePiece-like")
    never = load_tokenizer(folder(tmp_path / "n", model(data, normal={**LLAMA, 3: 0})), 2000)
    assert never.spaces == "never"
    assert never.encode([" a"]) == data.encode(["a"])


@pytest.mark.parametrize(
    ("trainer", "normal", "said"),
    [
        ({}, LLAMA, "is a Unigram model of SentencePiece"),
        ({3: 1}, LLAMA, "is a Unigram model"),
        ({3: 4}, LLAMA, "is a character model"),
        (BPE, {**LLAMA, 2: b"map"}, "maps characters to others"),
        (BPE, {**LLAMA, 4: 1}, "drops spaces"),
        (BPE, {3: 1}, "drops spaces"),
        (BPE, {**LLAMA, 5: 0}, "leaves spaces as they are"),
    ],
)
def test_refused_by_name(
    trainer: dict[int, Any], normal: dict[int, Any], said: str, data: TokenizerData, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(folder(tmp_path, model(data, trainer, normal)), 2000)


def test_what_is_no_such_file(data: TokenizerData, tmp_path: Path) -> None:
    whole = model(data)
    cut = [whole[:n] for n in (0, 1, 7, 40, len(whole) // 2, len(whole) - 1)]
    odd = [b"\xff" * 20, b"\x0b\x00", field(1, 7), field(1, message({1: b"\xff\xfe"})), b"\x0a\xff\xff\x03a"]
    for content in (*cut, *odd):
        with pytest.raises(TokenizerError):
            load_tokenizer(folder(tmp_path, content), 2000)
