"""The one reader of small files that others made: regular files only, bounded, UTF-8, sound JSON.

A model's folder may hold a pipe or a device under any name, a file of any size, and JSON that breaks what
reads it. Everything but weights is read whole through here; weights are opened with `open_regular`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError, ConversionError, short

# The most bytes of a file, by its kind: some ten times the biggest that is published.
CONFIG = 8 << 20
INDEX = 64 << 20
TOKENIZER = 128 << 20
TEMPLATE = 1 << 20
RECORD = 64 << 20
DEPTH = 100  # of nested JSON; what walks it later may recurse
CONTAINERS = (dict, list)

AGAIN = "Fetch this file again from where the checkpoint came from"
LONE = re.compile(r"\\u[dD][89a-fA-F]")
Hook = Callable[[list[tuple[str, Any]]], Any]


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; OSError for a pipe, a device, a folder or a socket, without waiting for it."""
    _refuse_special(os.stat(path))  # before it is opened: opening a device can act on it
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_special(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def read_head(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a regular file, or all that it has; raises OSError."""
    with open_regular(path) as file:
        return file.read(limit)


def read_bytes(
    path: Path, limit: int, error: type[ConversionError] = CheckpointError, hint: str = AGAIN
) -> bytes:
    """A small file whole; raises `error` when it cannot be read, is not a regular file or exceeds `limit`."""
    try:
        data = read_head(path, limit + 1)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        why = getattr(cause, "strerror", None) or str(cause)
        raise error("cannot be read", where=path, why=why, hint=hint) from None
    if len(data) > limit:
        size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit >> 10} KiB"
        raise error(f"is too big: over {size}, which no such file is", where=path, hint=hint)
    return data


def read_text(
    path: Path, limit: int, error: type[ConversionError] = CheckpointError, hint: str = AGAIN
) -> str:
    """A small file of UTF-8 text, with or without its mark; raises `error` as `read_bytes`, or for bytes."""
    return decoded(read_bytes(path, limit, error, hint), path, error, hint)


def decoded(
    data: bytes, where: object, error: type[ConversionError] = CheckpointError, hint: str = AGAIN
) -> str:
    """UTF-8 text of bytes, without its mark; raises `error` that names the first wrong byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        why = f"Byte {cause.start} is 0x{data[cause.start]:02x}: {cause.reason}"
        raise error("is not UTF-8 text", where=where, why=why, hint=hint) from None


def parse_json(
    text: str,
    where: object,
    error: type[ConversionError] = CheckpointError,
    hint: str = AGAIN,
    pairs: Hook | None = None,
) -> Any:
    """The JSON value that `text` is; `pairs` makes its objects.

    Raises `error` for whatever the parser raises, for nesting over DEPTH, and for half a surrogate pair,
    which JSON can spell and no file that is written later can hold.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        _check_depth(value)
        if LONE.search(text):
            _check_surrogates(value)
    except Exception as cause:  # of any kind: text by strangers is what a parser is broken with
        raise error("cannot be read as JSON", where=where, why=short(cause), hint=hint) from None
    return value


def read_json(
    path: Path,
    limit: int,
    error: type[ConversionError] = CheckpointError,
    hint: str = AGAIN,
    pairs: Hook | None = None,
) -> Any:
    """The JSON value in a small file; raises `error` as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, limit, error, hint), path, error, hint, pairs)


def read_object(
    path: Path,
    limit: int,
    error: type[ConversionError] = CheckpointError,
    hint: str = AGAIN,
    pairs: Hook | None = None,
) -> dict[str, Any]:
    """The JSON object in a small file; raises `error` as `read_json`, and for any other value."""
    return as_object(read_json(path, limit, error, hint, pairs), path, error, hint)


def as_object(
    value: Any, where: object, error: type[ConversionError] = CheckpointError, hint: str = AGAIN
) -> dict[str, Any]:
    """The value, which should be a JSON object; raises `error`."""
    if not isinstance(value, dict):
        raise error(f"should hold a JSON object, holds {type(value).__name__}", where=where, hint=hint)
    return value


def inside(path: Path, folder: Path) -> bool:
    """Whether what `path` is, links followed, lies in `folder`, or in the hub cache's repository around it.

    The cache's files are links from models--ORG--NAME/snapshots/COMMIT into models--ORG--NAME/blobs.
    """
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return False
    caches = [p for p in home.parents if p.name.startswith("models--") and (p / "snapshots") in home.parents]
    return any(real.is_relative_to(place) for place in (home, *caches))


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, CONTAINERS) else []
    for _ in range(DEPTH):
        # A tokenizer has 100,000 strings in one object and as many pairs of them: each is asked for once.
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, CONTAINERS)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEPTH} deep")


def _check_surrogates(value: Any, place: str = "the value") -> None:
    """ValueError that names where half a surrogate pair stands."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{place} holds half a surrogate pair, which is not text") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key, f"the key {ascii(key)[:80]}")
            _check_surrogates(item, f"the value of {ascii(key)[:80]}")
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item, place)
