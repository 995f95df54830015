"""Text from local files: plain text, JSON lines, either of them gzipped, and parquet."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from io import BufferedReader, RawIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError, ConversionError, UsageError, short
from dsconvert.libraries import need
from dsconvert.reading import open_regular

TEXT, JSON, PARQUET = (".txt", ".text", ".md"), (".jsonl", ".json", ".ndjson"), (".parquet",)
SUFFIXES = (*TEXT, *JSON, *(suffix + ".gz" for suffix in (*TEXT, *JSON)), *PARQUET)
KEYS = ("text", "content")
BATCH = 1024  # rows of a parquet file that are in memory at once
UNPACKED, RATIO = 64 << 20, 50  # a gzipped text may have so many bytes, or so many times its own
AGAIN = "Fetch or make this file again"


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


@dataclass
class Skipped:
    """Rows that are left out because they are null, and the place of the first."""

    rows: int = 0
    first: str = ""

    def add(self, place: str) -> None:
        """Count one more."""
        self.rows, self.first = self.rows + 1, self.first or place

    def notes(self, name: str) -> tuple[str, ...]:
        """What the user should know of it; nothing where there is none."""
        if not self.rows:
            return ()
        left_out = "1 row is" if self.rows == 1 else f"{self.rows} rows are"
        return (f"{name}: {left_out} null and left out, the first at {self.first}",)


def read_documents(path: Path, column: str = "", skipped: Skipped | None = None) -> Iterator[str]:
    """The documents of one file by its suffix; a file with none of SUFFIXES is read as plain text.

    Plain text is one document; JSON lines, a JSON array and parquet give one a row, from `column`, or from
    `text` or `content`; rows that are null there are counted in `skipped`. Raises CheckpointError for a
    file that is damaged, binary or not UTF-8, UsageError for a column of plain text.
    """
    skipped = skipped or Skipped()
    keys = (column,) if column else KEYS
    if has_rows(path):
        for place, row in read_rows(path, keys):
            found = _text_of(row, keys, path, place)
            if found is None:
                skipped.add(place)
            else:
                yield found
        return
    if column:
        raise UsageError(
            f"has no column {column[:80]!r}: it is plain text",
            where=path,
            hint=f"Columns are in {', '.join((*JSON, *PARQUET))} files; leave --calib-column out",
        )
    with _reading(path), _open(path) as file:
        raw = file.read()
    if raw:
        yield _decoded(raw, path)


def has_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows: JSON lines, a JSON array or parquet."""
    name = path.name.lower()
    return name.endswith(PARQUET) or name.removesuffix(".gz").endswith(JSON)


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON lines, JSON array or parquet file, each with its place.

    `columns` are those wanted, of which the first that a parquet file has is read; without, every one.
    Raises CheckpointError for a file that is damaged.
    """
    yield from _parquet(path, columns) if path.name.lower().endswith(PARQUET) else _rows(path)


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


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    """A text file to read, unpacked where it is gzipped."""
    with open_regular(path) as file:
        if not path.name.lower().endswith(".gz"):
            yield file
            return
        packed = os.fstat(file.fileno()).st_size
        with gzip.open(file) as unpacked:
            yield BufferedReader(_Bounded(unpacked, max(UNPACKED, RATIO * packed), path), 1 << 20)


class _Bounded(RawIOBase):
    """An unpacked stream; CheckpointError after `limit` bytes, which text never unpacks to."""

    def __init__(self, stream: gzip.GzipFile, limit: int, path: Path) -> None:
        self.stream, self.left, self.path = stream, limit, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            why = f"It unpacks to more than {RATIO} times its size, which text does not"
            raise CheckpointError("is not text", where=self.path, why=why)
        buffer[: len(data)] = data
        return len(data)


def _decoded(raw: bytes, path: Path, place: str = "") -> str:
    """UTF-8, with or without its mark; anything else is refused with the byte that shows it."""
    at = f" in {place}" if place else ""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise CheckpointError(
            "is UTF-16, not UTF-8", where=path, hint="Convert it: iconv -f UTF-16 -t UTF-8 IN > OUT"
        )
    if (zero := raw.find(b"\0")) >= 0:
        raise CheckpointError(
            f"is not text: byte {zero}{at} is NUL", where=path, hint=f"Give one of: {', '.join(SUFFIXES)}"
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
    except Exception:  # of any kind
        return True  # it goes on in the next lines
    return not any(isinstance(item, dict) and ("role" in item or "from" in item) for item in row)


def _parsed(raw: bytes, path: Path, place: str) -> Any:
    try:
        return json.loads(_decoded(raw, path, place))
    except ConversionError:
        raise
    except Exception as error:  # of any kind
        raise CheckpointError(
            f"{place} is not JSON", where=path, why=short(error), hint="Each line should hold one JSON value"
        ) from None


def _text_of(row: object, keys: Sequence[str], path: Path, place: str) -> str | None:
    """The text of a row, None where it is null."""
    if not isinstance(row, dict):
        found, there = row, row is None
    else:
        found = next((row[key] for key in keys if row.get(key) is not None), None)
        there = any(key in row for key in keys)
    if isinstance(found, str):
        return whole(found, path, place)
    if found is None and there:
        return None
    raise _no_text(row, keys, path, place)


def _no_text(row: object, keys: Sequence[str], path: Path, place: str) -> CheckpointError:
    from dsconvert.texts.conversations import holds_chat

    names = ", ".join(sorted(map(str, row)))[:100] if isinstance(row, dict) else type(row).__name__
    if keys != KEYS:
        return CheckpointError(
            f"{place} has no text as {keys[0][:80]!r}",
            where=path,
            why=f"it holds {names}",
            hint="Give --calib-column one of them that is text",
        )
    hint = f"Each row should hold a string as {' or '.join(keys)}; --calib-column NAME takes another column"
    if holds_chat(row):
        hint = "Conversations are read with --calib-chat"
        if isinstance(row, dict):
            hint += ", pairs of a question and an answer too; --calib-column NAME takes one column as text"
    return CheckpointError(f"{place} has no text", where=path, why=f"it holds {names}", hint=hint)


def whole(text: str, path: Path, place: str) -> str:
    """Refuse half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{place} holds half a surrogate pair", where=path, why=short(error)) from None
    return text


def parquet_reader() -> Any:
    """The module pyarrow.parquet; MissingLibrary where it is not installed."""
    need("pyarrow", what="reading a parquet file")
    return import_module("pyarrow.parquet")


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    reader = parquet_reader()
    with _reading(path):
        try:
            with reader.ParquetFile(path) as file:
                names = file.schema_arrow.names
                wanted = next(([key] for key in columns if key in names), None)
                if columns and wanted is None:
                    raise _no_text(dict.fromkeys(names), columns, path, "the table")
                batches = file.iter_batches(batch_size=BATCH, columns=wanted)
                rows = chain.from_iterable(batch.to_pylist() for batch in batches)
                yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        except ConversionError:
            raise
        except Exception as error:  # of any kind: pyarrow's, and what its types raise on odd values
            raise CheckpointError(
                "is damaged or no parquet file", where=path, why=short(error), hint=AGAIN
            ) from None
