"""Text from local files: plain text, JSON lines, either of them gzipped, and parquet; and conversations."""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError, ConversionError, UsageError
from dsconvert.reading import short

TEXT, JSON, PARQUET = (".txt", ".text", ".md"), (".jsonl", ".json", ".ndjson"), (".parquet",)
SUFFIXES = (*TEXT, *JSON, *(suffix + ".gz" for suffix in (*TEXT, *JSON)), *PARQUET)
KEYS = ("text", "content")
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
AGAIN = "Fetch or make this file again"
Message = dict[str, str]


@dataclass(frozen=True)
class Texts:
    """Many documents in one buffer of UTF-8, so that they take no more memory than their text."""

    data: bytearray = field(repr=False)
    ends: array[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(index)
        return self.data[self._start(index) : self.ends[index]].decode()

    def nbytes(self, index: int) -> int:
        """The document's size in UTF-8."""
        return self.ends[index] - self._start(index)

    def _start(self, index: int) -> int:
        return self.ends[index - 1] if index else 0


def pack(documents: Iterable[str]) -> Texts:
    """Put documents into one buffer; UnicodeEncodeError for half a surrogate pair."""
    texts = Texts(bytearray(), array("q"))
    for document in documents:
        texts.data.extend(document.encode())
        texts.ends.append(len(texts.data))
    return texts


def is_text(path: Path) -> bool:
    """Whether the name has one of SUFFIXES."""
    return path.name.lower().endswith(SUFFIXES)


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file by its suffix; a file with none of SUFFIXES is read as plain text.

    Plain text is one document; JSON lines, a JSON array and parquet give one a row, from the column `text`
    or `content`. Raises CheckpointError for a file that is damaged, binary or not UTF-8.
    """
    name = path.name.lower()
    if name.endswith(PARQUET):
        yield from _parquet(path)
    elif name.removesuffix(".gz").endswith(JSON):
        for place, row in _rows(path):
            yield _text_of(row, path, place)
    else:
        with _reading(path), _open(path) as file:
            raw = file.read()
        if raw:
            yield _decoded(raw, path)


def read_chats(path: Path) -> Iterator[list[Message]]:
    """Conversations as lists of {"role", "content"}, one a row of JSON lines or of a JSON array.

    A row is the list itself or holds it as `messages` or `conversations`; `from` and `value` are taken for
    `role` and `content`. Raises CheckpointError for anything else.
    """
    for place, row in _rows(path):
        listed = row.get("messages", row.get("conversations")) if isinstance(row, dict) else row
        if not isinstance(listed, list) or not listed:
            raise CheckpointError(
                f"{place} holds no messages",
                where=path,
                hint='Each row should be {"messages": [{"role": "user", "content": "..."}, ...]}',
            )
        yield [_message(message, path, place) for message in listed]


def _message(raw: object, path: Path, place: str) -> Message:
    if isinstance(raw, dict):
        role, content = raw.get("role", raw.get("from")), raw.get("content", raw.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": _whole(content, path, place)}
    raise CheckpointError(f"{place} holds a message without a role and a text", where=path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a CheckpointError."""
    try:
        yield
    except ConversionError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CheckpointError("is damaged or cut short", where=path, why=short(error), hint=AGAIN) from None
    except OSError as error:
        raise CheckpointError("cannot be read", where=path, why=short(error)) from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _decoded(raw: bytes, path: Path, place: str = "") -> str:
    """UTF-8, with or without its mark; anything else is refused with the byte that shows it."""
    at = f" in {place}" if place else ""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise CheckpointError(
            "is UTF-16, not UTF-8", where=path, hint="Convert it: iconv -f UTF-16 -t UTF-8 IN > OUT"
        )
    if (zero := raw.find(b"\0")) >= 0:
        raise CheckpointError(
            f"is no text: byte {zero}{at} is NUL", where=path, hint=f"Give one of: {', '.join(SUFFIXES)}"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"is not UTF-8: byte {error.start}{at} is 0x{raw[error.start]:02x}",
            where=path,
            hint="If it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 IN > OUT",
        ) from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines, or of one JSON array, each with its place."""
    with _reading(path), _open(path) as file:
        first = file.readline()
        if _opens_array(first):
            whole = _parsed(first + file.read(), path, "the array")
            yield from ((f"row {i}", row) for i, row in enumerate(whole, 1))
            return
        for number, line in enumerate(chain([first], file), 1):
            if line.strip():
                yield f"line {number}", _parsed(line, path, f"line {number}")


def _opens_array(line: bytes) -> bool:
    """Whether one array is the whole file; a conversation that is a list of messages is a row."""
    text = line.removeprefix(b"\xef\xbb\xbf").strip()
    if not text.startswith(b"["):
        return False
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return True  # it goes on in the next lines
    return not any(isinstance(item, dict) and ("role" in item or "from" in item) for item in row)


def _parsed(raw: bytes, path: Path, place: str) -> Any:
    try:
        return json.loads(_decoded(raw, path, place))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{place} is not JSON", where=path, why=short(error), hint="Each line should hold one JSON value"
        ) from None


def _text_of(row: object, path: Path, place: str) -> str:
    found = next((row[key] for key in KEYS if key in row), None) if isinstance(row, dict) else row
    if isinstance(found, str):
        return _whole(found, path, place)
    keys = ", ".join(sorted(row))[:100] if isinstance(row, dict) else type(row).__name__
    chat = isinstance(row, list) or (isinstance(row, dict) and ("messages" in row or "conversations" in row))
    raise CheckpointError(
        f"{place} has no text",
        where=path,
        why=f"it holds {keys}",
        hint="Conversations are read with --calib-chat"
        if chat
        else f"Each row should hold a string as {' or '.join(KEYS)}",
    )


def _whole(text: str, path: Path, place: str) -> str:
    """Refuse half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{place} holds half a surrogate pair", where=path, why=short(error)) from None
    return text


def parquet_reader() -> Any:
    """The module pyarrow.parquet; UsageError where it is not installed."""
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            "parquet files are read with pyarrow, which is not installed", hint="Run `pip install pyarrow`"
        ) from None


def _parquet(path: Path) -> Iterator[str]:
    reader = parquet_reader()
    damaged = (ValueError, NotImplementedError, import_module("pyarrow").ArrowException)
    with _reading(path):
        try:
            with reader.ParquetFile(path) as file:
                names = file.schema_arrow.names
                column = next((key for key in KEYS if key in names), None)
                if column is None:
                    _text_of(dict.fromkeys(names), path, "the table")
                for batch in file.iter_batches(columns=[column]):
                    for row, text in enumerate(batch.column(0).to_pylist()):
                        yield text if isinstance(text, str) else _text_of({column: text}, path, f"row {row}")
        except damaged as error:
            raise CheckpointError(
                "is damaged or no parquet file", where=path, why=short(error), hint=AGAIN
            ) from None
