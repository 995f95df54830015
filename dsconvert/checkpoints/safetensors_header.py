"""Reads the header of a safetensors file, wherever the file is: nothing in it is trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError, quoted, short

Fetch = Callable[[int, int], bytes | memoryview]  # the first of some bytes, and the end of them

HEADER_LIMIT = 100_000_000  # the reference implementation's own limit
TENSORS_LIMIT = 1 << 18  # of one file; a model of 671B has some 90,000 in all
DIMENSIONS = 16
WHOLE = (1 << 63) - 1  # the most bytes that an array's sizes may come to
REFETCH = "Fetch this file again and compare its size and sha256 with the published ones"

# Bits per value of every type that the format names.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F16": 16, "BF16": 16, "I16": 16}
BITS |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= {"U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}

# What is found under a weight file's name when it is not one: first bytes, what it is, what to do.
IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "Run `git lfs pull` in its folder"),
    (b"<!doctype", "is a web page, not the weights", "Download the file itself, not the page that shows it"),
    (b"<html", "is a web page, not the weights", "Download the file itself, not the page that shows it"),
    (b"gguf", "is a GGUF file already", "Look at it with `dsconvert inspect FILE`"),
)


@dataclass(frozen=True)
class Entry:
    """A tensor in a header: type, shape, its first byte after the header and the end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, size: int, read: Fetch) -> tuple[list[Entry], int]:
    """The tensors that a header names, checked, and where the data starts; CheckpointError."""
    header, start = _header(path, size, read)
    if not _is_string_map(header.pop("__metadata__", {})):
        raise damaged(path, "__metadata__ is not a map from strings to strings")
    entries = [_entry(path, name, value) for name, value in header.items()]
    _check_layout(path, entries, size - start)
    return entries, start


def check_head(path: Path, size: int, head: bytes) -> None:
    """Raises CheckpointError for a weight file that is empty, or whose first bytes say that it is none."""
    if size == 0:
        raise CheckpointError("is empty", where=path, hint=REFETCH)
    for magic, what, hint in IMPOSTORS:
        if head.lstrip().lower().startswith(magic):
            raise CheckpointError(what, where=path, hint=hint)


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that contradicts itself."""
    return CheckpointError("is damaged", where=path, why=why, hint=REFETCH)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for `json` that raises ValueError when a key comes twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {quoted(key)} comes twice")
            seen.add(key)
    return value


def _header(path: Path, size: int, read: Fetch) -> tuple[dict[str, Any], int]:
    """The header's JSON object and where the data starts."""
    head = bytes(read(0, min(8, size)))
    if head[:4] == b"PK\x03\x04":
        raise damaged(path, "It is a zip archive, perhaps a PyTorch file under the wrong name")
    length = int.from_bytes(head, "little")
    if size < 8 or length > HEADER_LIMIT:
        raise damaged(path, f"Its header claims {length:,} bytes, so this is not a safetensors file")
    if length > size - 8:
        raise damaged(path, f"Its header claims {length:,} bytes and the file ends after {size:,}")
    text = bytes(read(8, 8 + length))
    if not text.startswith(b"{"):
        raise damaged(path, "Its header does not start with '{'")
    if (count := text.count(b'"data_offsets"')) > TENSORS_LIMIT:
        raise damaged(path, f"Its header names {count:,} tensors, more than any model has")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except Exception as error:  # of any kind: a parser that strangers feed
        raise damaged(path, f"Its header is not valid JSON: {short(error)}") from None
    if not isinstance(header, dict):
        raise damaged(path, "Its header is not a JSON object")
    return header, 8 + length


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(path: Path, name: str, value: Any) -> Entry:
    """One tensor of the header, checked on its own."""
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(path, f"Tensor {quoted(name)} has the unknown dtype {quoted(dtype)}")
    if not isinstance(shape, list) or len(shape) > DIMENSIONS or not all(map(_is_size, shape)):
        raise damaged(path, f"Tensor {quoted(name)} has the impossible shape {quoted(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise damaged(path, f"Tensor {quoted(name)} has the impossible data_offsets {quoted(offsets)}")
    begin, end = offsets
    if (
        math.prod(size for size in shape if size) * BITS[dtype] // 8 > WHOLE
    ):  # numpy counts so, zeros left out
        raise damaged(path, f"Tensor {quoted(name)} has the impossible shape {quoted(shape)}")
    bits = math.prod(shape) * BITS[dtype]
    if begin > end or bits != (end - begin) * 8:
        raise damaged(
            path,
            f"Tensor {quoted(name)} of shape {shape} and type {dtype} needs {(bits + 7) // 8:,} bytes, "
            f"its data_offsets are {offsets}",
        )
    return Entry(name, dtype.lower(), tuple(shape), begin, end)


def _check_layout(path: Path, entries: list[Entry], available: int) -> None:
    """The tensors cover the data exactly: nothing outside the file, no overlap, no hole, no rest."""
    ordered = sorted(entries, key=lambda entry: (entry.begin, entry.end))
    needed = max((entry.end for entry in entries), default=0)
    if needed > available:
        raise damaged(path, f"It is cut short: {needed - available:,} bytes of {needed:,} are missing")
    cursor, previous = 0, "the header"
    for entry in ordered:
        if entry.begin < cursor:
            raise damaged(path, f"Tensors {quoted(previous)} and {quoted(entry.name)} overlap")
        if entry.begin > cursor:
            raise damaged(
                path, f"{entry.begin - cursor:,} bytes before {quoted(entry.name)} belong to no tensor"
            )
        cursor, previous = entry.end, entry.name
    if cursor < available:
        raise damaged(path, f"{available - cursor:,} bytes after the last tensor belong to no tensor")
