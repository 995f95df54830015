"""Reads the header of a safetensors file and maps its tensors: no torch, no copy, nothing trusted."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import CheckpointError, quoted, short
from dsconvert.reading import open_regular

Array = npt.NDArray[Any]

HEADER_LIMIT = 100_000_000  # the reference implementation's own limit
TENSORS_LIMIT = 1 << 18  # of one file; a model of 671B has some 90,000 in all
DIMENSIONS = 16
WHOLE = (1 << 63) - 1  # the most bytes that an array's sizes may come to
REFETCH = "Fetch this file again and compare its size and sha256 with the published ones"

# Bits per value of every type that the format names.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F16": 16, "BF16": 16, "I16": 16}
BITS |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= {"U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}

# The types that weights are read in; bf16 travels as its bits.
READABLE: dict[str, np.dtype[Any]] = {"bf16": np.dtype("<u2"), "f16": np.dtype("<f2"), "f32": np.dtype("<f4")}
READABLE["f64"] = np.dtype("<f8")

# The types of packed tensors.
INTEGERS: dict[str, np.dtype[Any]] = {"i16": np.dtype("<i2"), "i32": np.dtype("<i4")}

# What is found under a weight file's name when it is not one: first bytes, what it is, what to do.
IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "Run `git lfs pull` in its folder"),
    (b"<!doctype", "is a web page, not the weights", "Download the file itself, not the page that shows it"),
    (b"<html", "is a web page, not the weights", "Download the file itself, not the page that shows it"),
    (b"gguf", "is a GGUF file already", "Look at it with `dsconvert inspect FILE`"),
)


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a weight file.

    `dtype` is "bf16", "f16", "f32" or another type's name in lower case. `data` is a read-only view of
    the mapped file in the stored shape (uint16 for bf16), None for a type that is not a plain number.
    `offset` is the first byte in the file, None where the bytes are not in one piece. `decode` reads what no
    view can show, scaled bytes for example: it takes the first of some rows and the end of them, and returns
    them as `rows` does. A type without either is not read.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None
    data: Array | None = field(repr=False)
    decode: Callable[[int, int], Array] | None = field(repr=False, default=None)

    @property
    def readable(self) -> bool:
        """Whether its values are known here."""
        return self.data is not None or self.decode is not None

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1, the bits of bf16 or float32, C-contiguous; a scalar is one row."""
        if self.decode is not None:
            return self.decode(start, min(stop, self.shape[0]))
        assert self.data is not None  # its type is readable
        return plain(self.data[start:stop] if self.shape else self.data.reshape(1))


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name, mapped and not read.

    Checks the whole header first (the format's description in the safetensors README): lengths, types,
    shapes, and that the tensors cover the data exactly. Raises CheckpointError.
    """
    size = check_file(path)
    with open_regular(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header, start = _header(path, mapped)
    if not _is_string_map(header.pop("__metadata__", {})):
        raise damaged(path, "__metadata__ is not a map from strings to strings")
    entries = [_entry(path, name, value) for name, value in header.items()]
    _check_layout(path, entries, size - start)
    return {entry.name: _stored(path, entry, mapped, start) for entry in entries}


def values(stored: Stored) -> Array:
    """A copy of a tensor's values in their stored type, for the types in READABLE and "i32", "i16"."""
    assert stored.offset is not None  # safetensors tensors are in one piece
    kind = READABLE.get(stored.dtype) or INTEGERS[stored.dtype]
    count = stored.nbytes // kind.itemsize
    flat: Array = np.fromfile(stored.path, kind, count, offset=stored.offset)
    return flat.reshape(stored.shape)


def mapped_values(stored: Stored) -> Array:
    """What `values` would copy, as a read-only view: of a slice only its own pages are read."""
    if stored.data is not None:
        return stored.data
    assert stored.offset is not None  # safetensors tensors are in one piece
    return np.memmap(stored.path, INTEGERS[stored.dtype], "r", stored.offset, stored.shape)


@np.errstate(over="ignore")  # infinity is reported where the value is used
def plain(data: Array) -> Array:
    """Values of a readable type in one of the two that are converted: the bits of bf16, or float32.

    The result is C-contiguous and aligned. f16 is widened and f64 rounded to float32; bf16 and f32 are
    copied only where their bytes lie apart.
    """
    if data.dtype in (READABLE["bf16"], READABLE["f32"]):
        return np.require(data, requirements=["C", "A"])
    return data.astype(np.float32, order="C")


def part_of(stored: Stored, start: int, stop: int, shape: tuple[int, ...]) -> Stored:
    """Rows `start` to `stop` - 1 of a tensor of a readable type as a tensor of its own, of this shape."""
    row = stored.nbytes // stored.shape[0]
    if stored.data is None:
        return replace(
            stored,
            shape=shape,
            nbytes=(stop - start) * row,
            decode=lambda a, b: stored.rows(start + a, start + b),
        )
    return replace(
        stored,
        shape=shape,
        nbytes=(stop - start) * row,
        offset=None if stored.offset is None else stored.offset + start * row,
        data=stored.data[start:stop].reshape(shape),
    )


def check_file(path: Path) -> int:
    """The size of a weight file in bytes; raises CheckpointError for what is plainly none."""
    try:
        with open_regular(path) as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(32).lstrip().lower()
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot be read", where=path, why=short(error)) from None
    if size == 0:
        raise CheckpointError("is empty", where=path, hint=REFETCH)
    for magic, what, hint in IMPOSTORS:
        if head.startswith(magic):
            raise CheckpointError(what, where=path, hint=hint)
    return size


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


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that contradicts itself."""
    return CheckpointError("is damaged", where=path, why=why, hint=REFETCH)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header's JSON object and where the data starts."""
    if mapped[:4] == b"PK\x03\x04":
        raise damaged(path, "It is a zip archive, perhaps a PyTorch file under the wrong name")
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > HEADER_LIMIT:
        raise damaged(path, f"Its header claims {length:,} bytes, so this is not a safetensors file")
    if length > len(mapped) - 8:
        raise damaged(path, f"Its header claims {length:,} bytes and the file ends after {len(mapped):,}")
    text = mapped[8 : 8 + length]
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


def _entry(path: Path, name: str, value: Any) -> _Entry:
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
    return _Entry(name, dtype.lower(), tuple(shape), begin, end)


def _check_layout(path: Path, entries: list[_Entry], available: int) -> None:
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


def _stored(path: Path, entry: _Entry, mapped: mmap.mmap, start: int) -> Stored:
    kind = READABLE.get(entry.dtype)
    offset = start + entry.begin
    # A view may be unaligned: old writers did not pad the header. numpy reads such views as they are.
    data = None if kind is None else np.ndarray(entry.shape, kind, buffer=mapped, offset=offset)
    return Stored(path, entry.dtype, entry.shape, entry.end - entry.begin, offset, data)
