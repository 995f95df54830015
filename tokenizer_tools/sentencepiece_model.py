"""Reads a SentencePiece BPE from tokenizer.model and writes it as a tokenizer.json.

The file is a protobuf message (sentencepiece_model.proto); the few fields that say what a text becomes are
read here: pieces = 1 {piece = 1, score = 2, type = 3}, trainer_spec = 2 {model_type = 3, byte_fallback = 35},
normalizer_spec = 3 {precompiled_charsmap = 2, add_dummy_prefix = 3, remove_extra_whitespaces = 4,
escape_whitespaces = 5}.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsconvert import reading
from dsconvert.errors import TokenizerError
from tokenizer_tools import spm

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
UNIGRAM, BPE = 1, 2
MODELS = {UNIGRAM: "Unigram", BPE: "BPE", 3: "word", 4: "character"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ADDED = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}  # whether an added token is special
Field = int | bytes


def to_json(path: Path) -> str:
    """The tokenizer.json that does as a tokenizer.model.

    Raises TokenizerError for a file that is none, for another model than BPE, and for one that normalises.
    """
    data = reading.read_bytes(path, reading.TOKENIZER, TokenizerError)
    try:
        message = list(_fields(data))
        pieces = [dict(_fields(_data(value))) for key, value in message if key == 1]
        trainer, normal = (dict(_fields(_last(message, key))) for key in (2, 3))
        rows = [(_data(p[1]).decode(), _score(p), int(p.get(3, NORMAL))) for p in pieces]
        kind = int(trainer.get(3, UNIGRAM))
        if not rows or len({piece for piece, *_ in rows}) < len(rows):
            raise ValueError("no pieces, or one twice")
    except (ValueError, KeyError, IndexError, struct.error):
        raise TokenizerError("is not a SentencePiece model", where=path, hint="Fetch it again") from None
    _check(kind, normal, path)
    return json.dumps(_tokenizer(rows, bool(normal.get(3, 1)), path), ensure_ascii=False)


def _check(kind: int, normal: dict[int, Field], path: Path) -> None:
    faults = {
        f"is a {MODELS.get(kind, kind)} model of SentencePiece": kind != BPE,
        "maps characters to others before it tokenizes": bool(normal.get(2)),
        "drops spaces that are more than one": bool(normal.get(4, 1)),
        "leaves spaces as they are": not normal.get(5, 1),
    }
    found = next((fault for fault, there in faults.items() if there), None)
    if found:
        raise TokenizerError(
            found,
            where=path,
            why="llama.cpp merges by score and puts a space before a text, and does nothing else",
            hint="Only SentencePiece's BPE models without normalization can be carried",
        )


def _tokenizer(rows: list[tuple[str, float, int]], prefix: bool, path: Path) -> dict[str, Any]:
    scored = {piece: score for piece, score, kind in rows if kind in (NORMAL, BYTE)}
    unknown = next((piece for piece, _, kind in rows if kind == UNKNOWN), None)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece, "special": ADDED[kind], **flags}
            for i, (piece, _, kind) in enumerate(rows)
            if kind in ADDED
        ],
        **spm.around(spm.PREPEND if prefix else spm.NEVER),
        "post_processor": None,
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for *_, kind in rows),
            "vocab": {piece: i for i, (piece, _, _) in enumerate(rows)},
            "merges": [list(pair) for pair in spm.pairs_by_score(scored, path)],
        },
    }


def _score(piece: dict[int, Field]) -> float:
    value = piece.get(2, b"\0\0\0\0")
    return float(struct.unpack("<f", _data(value))[0])


def _data(value: Field) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError("a number where bytes should be")


def _last(message: list[tuple[int, Field]], key: int) -> bytes:
    return next((_data(value) for found, value in reversed(message) if found == key), b"")


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """The fields of a protobuf message: number and value, a fixed one as its bytes; raises ValueError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, size = tag & 7, 0
        if kind == VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field ends beyond the message")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")
