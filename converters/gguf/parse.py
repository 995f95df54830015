"""Parses GGUF files, ours or strangers': keys, tensor infos, split sets; reads no weight.

Every length and offset is checked against the file before it is used. Source: the GGUF specification of
the ggml project, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import re
import struct
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf.layout import MAGIC, VALUE_TYPES
from converters.gguf.qtypes import BY_ID, QType
from converters.gguf.rounding import dequantize
from converters.gguf.strangers import AGAIN, VERSIONS, no_gguf, of_version
from dsconvert.errors import CheckpointError, short
from dsconvert.machine import let_go
from dsconvert.reading import open_regular

KINDS = {number: (name, fmt) for name, (number, fmt) in VALUE_TYPES.items()}
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MAX_DIMS = 4
MAX_ITEMS = 1 << 22  # keys, tensors, strings, small arrays' numbers; a vocabulary of 260,000 has under 2^20
BIG = 1 << 20  # numbers of an array that is kept as it lies; no list of Python objects has so many
TYPECODES = {"uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i"}
TYPECODES |= {"float32": "f", "uint64": "Q", "int64": "q", "float64": "d", "bool": "B"}
MAX_NESTING = 8
STEP = 4 << 20  # bytes of a header that are fetched together, at the most
LARGEST = 256 << 20  # bytes of the longest header that is fetched; one of 260,000 words has some 10 MB


@dataclass(eq=False)
class Source:
    """The bytes of a file of `size`: `data` are all of them, or the first, of which `fetch` brings more."""

    path: Path
    data: mmap.mmap | bytearray
    size: int
    fetch: Callable[[int, int], bytes] | None = None

    def reach(self, stop: int) -> bool:
        """Whether the bytes before `stop` are there, after they were fetched if need be."""
        have = len(self.data)
        within = have < stop <= min(self.size, LARGEST)
        if within and self.fetch is not None and isinstance(self.data, bytearray):
            self.data += self.fetch(have, min(self.size, max(stop, have + min(have, STEP))))
        return stop <= len(self.data)


def mapped(path: Path) -> Source:
    """A file on this disk; raises CheckpointError."""
    try:
        with open_regular(path) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot be opened as a GGUF file", where=path, why=short(error)) from None
    return Source(path, data, len(data))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: shape rows first, type, absolute offset of its bytes."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    offset: int
    nbytes: int
    data: mmap.mmap | None = field(repr=False, compare=False)  # none of a file that is not on this disk

    @property
    def values(self) -> int:
        """The number of weights."""
        return prod(self.shape)

    def blocks(self) -> npt.NDArray[np.uint8]:
        """The stored bytes as [rows, bytes per row], memory-mapped."""
        assert self.data is not None
        flat = np.frombuffer(self.data, np.uint8, self.nbytes, self.offset)
        return flat.reshape(-1, self.qtype.nbytes(self.shape[-1]))

    def float32(self) -> npt.NDArray[np.float32]:
        """The dequantized values in the stored layout (the `gguf` library's dequantizers)."""
        return self.rows(0, self.values).reshape(self.shape)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `start` to `stop`, dequantized: [rows, columns]; a 1-D tensor is one row.

        Raises CheckpointError for a type whose values cannot be computed here.
        """
        blocks = self.blocks()[start:stop]
        try:
            return dequantize(blocks, self.qtype)
        except (NotImplementedError, ValueError):
            raise CheckpointError(
                f"tensor {self.name[:80]!r} is of type {self.qtype.name}, whose values cannot be read here",
                why="the gguf library has no dequantizer for it",
                hint="dsconvert inspect shows the file without them",
            ) from None
        finally:
            if self.data is not None:
                let_go(self.data, self.offset + start * blocks.shape[1], blocks.nbytes)


@dataclass(frozen=True)
class GGUFFile:
    """An opened file or split set: its keys (type name, value) and its tensors by GGUF name."""

    path: Path
    paths: tuple[Path, ...]
    version: int
    typed: dict[str, tuple[str, Any]]
    tensors: dict[str, StoredTensor]
    nbytes: int

    @property
    def keys(self) -> dict[str, Any]:
        """The values by key, without their types."""
        return {key: value for key, (_, value) in self.typed.items()}


def open_gguf(path: Path, source: Callable[[Path], Source] = mapped) -> GGUFFile:
    """Parse and check the file at `path`, or every file of the split set whose first file it is.

    `source` opens each.
    Raises CheckpointError for anything that is not a complete GGUF file; no weight is read.

    >>> from converters.gguf.convert import convert
    >>> from converters.gguf.output import Options
    >>> events = list(convert(Options("sample:", ("q4_0",), Path("sample-q4_0.gguf"), effort="off")))
    >>> file = open_gguf(Path("sample-q4_0.gguf"))
    >>> file.keys["tokenizer.ggml.bos_token_id"], file.tensors["blk.0.attn_q.weight"].qtype.name
    (2000, 'q4_0')
    """
    first = _parse(source(path))
    count = first.keys.get("split.count", 1)
    match = SPLIT.fullmatch(path.name)
    if not isinstance(count, int) or count < 2 or match is None:
        return first
    if first.keys.get("split.no") != 0:
        raise CheckpointError(
            "is not the first file of its split set",
            where=path,
            hint=f"Give {match[1]}-00001-of-{match[3]}.gguf",
        )
    files = [first] + [
        _parse(source(path.with_name(f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf")))
        for number in range(1, count)
    ]
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if len(tensors) != first.keys.get("split.tensors.count"):
        raise CheckpointError(
            f"the split set holds {len(tensors)} tensors, its first file says "
            f"{first.keys.get('split.tensors.count')}",
            where=path,
        )
    paths, nbytes = tuple(file.path for file in files), sum(file.nbytes for file in files)
    return GGUFFile(path, paths, first.version, first.typed, tensors, nbytes)


class _Cursor:
    """A position in a file's bytes; every read is checked against the end."""

    def __init__(self, source: Source) -> None:
        self.source, self.path, self.at, self.items = source, source.path, 0, 0

    def spend(self, count: int, what: str) -> None:
        """Count what takes many times its bytes in memory; raises CheckpointError over MAX_ITEMS."""
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.wrong(f"{self.items:,} {what} and such are more than any model has")

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=self.path, why=f"at byte {self.at}", hint=AGAIN)

    def take(self, fmt: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + fmt)
        if not self.source.reach(self.at + size):
            raise self.wrong("the file ends inside its header")
        values = struct.unpack_from("<" + fmt, self.source.data, self.at)
        self.at += size
        return values

    def string(self) -> str:
        (size,) = self.take("Q")
        if not self.source.reach(self.at + size):
            raise self.wrong(f"a string of {size} bytes does not fit in the file")
        raw = self.source.data[self.at : self.at + size]
        self.at += size
        return raw.decode("utf-8", errors="replace")

    def strings(self, count: int) -> list[str]:
        """As many calls of `string`, in a loop of its own: a vocabulary has some 200,000 of them."""
        data, at, unpack = self.source.data, self.at, struct.Struct("<Q").unpack_from
        end, found = len(data), []
        for _ in range(count):
            start = at + 8
            stop = start + unpack(data, at)[0] if start <= end else end + 1
            if stop > end:
                self.at = at
                found.append(self.string())  # fetches more, or says what is wrong
                at, end = self.at, len(data)
                continue
            found.append(str(data[start:stop], "utf-8", "replace"))
            at = stop
        self.at = at
        return found

    def value(self, kind: int, depth: int = 0) -> tuple[str, Any]:
        name, fmt = self.kind(kind)
        if name == "string":
            return name, self.string()
        if name != "array":
            return name, self.take(fmt)[0]
        item, count = self.take("IQ")
        item_name, fmt = self.kind(item)
        if depth == MAX_NESTING or count > self.source.size - self.at:
            raise self.wrong(f"an array of {count} items of type {item_name} cannot be")
        if count > BIG and item_name in TYPECODES:
            return f"array:{item_name}", self.numbers(TYPECODES[item_name], count)
        self.spend(count, "items of arrays")
        if item_name == "string":
            return "array:string", self.strings(count)
        if item_name == "array":
            return "array:array", [self.value(item, depth + 1)[1] for _ in range(count)]
        return f"array:{item_name}", list(self.take(f"{count}{fmt}"))

    def numbers(self, typecode: str, count: int) -> array[Any]:
        """A long array of numbers in no more memory than in the file."""
        found = array(typecode)
        size = count * found.itemsize
        if not self.source.reach(self.at + size):
            raise self.wrong("the file ends inside its header")
        found.frombytes(self.source.data[self.at : self.at + size])
        if sys.byteorder == "big":
            found.byteswap()
        self.at += size
        return found

    def kind(self, number: int) -> tuple[str, str]:
        if number not in KINDS:
            raise self.wrong(f"value type {number} is unknown")
        return KINDS[number]


def _parse(source: Source) -> GGUFFile:
    cursor, path = _Cursor(source), source.path
    if source.data[:4] != MAGIC:
        raise no_gguf(bytes(source.data[:64]), path)
    cursor.at = 4
    (version,) = cursor.take("I")
    if version not in VERSIONS:
        raise of_version(version, path)
    n_tensors, n_keys = cursor.take("QQ")
    cursor.spend(n_keys + n_tensors, "keys and tensors")
    typed: dict[str, tuple[str, Any]] = {}
    for _ in range(n_keys):
        key = cursor.string()
        typed[key] = cursor.value(cursor.take("I")[0])
    infos = [_info(cursor) for _ in range(n_tensors)]
    alignment = typed.get("general.alignment", ("uint32", 32))[1]
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.wrong(f"alignment {alignment!r} is not a power of two")
    base = -(-cursor.at // alignment) * alignment
    tensors = {info[0]: _place(info, base, alignment, cursor) for info in infos}
    if len(tensors) != n_tensors:
        raise cursor.wrong("two tensors have the same name")
    return GGUFFile(path, (path,), version, typed, tensors, source.size)


_Info = tuple[str, tuple[int, ...], int, int]


def _info(cursor: _Cursor) -> _Info:
    name = cursor.string()
    (n_dims,) = cursor.take("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.wrong(f"tensor {name[:80]!r} has {n_dims} dimensions")
    dims = cursor.take(f"{n_dims}Q")
    kind, offset = cursor.take("IQ")
    return name, dims[::-1], kind, offset


def _place(info: _Info, base: int, alignment: int, cursor: _Cursor) -> StoredTensor:
    name, shape, kind, offset = info
    qtype = BY_ID.get(kind)
    if qtype is None:
        raise cursor.wrong(f"tensor {name[:80]!r} has type {kind}, which is not known here")
    values = prod(shape)
    if values == 0 or shape[-1] % qtype.block:
        raise cursor.wrong(f"tensor {name[:80]!r} of shape {list(shape)} is not a whole number of blocks")
    nbytes = qtype.nbytes(values)
    if offset % alignment or base + offset + nbytes > cursor.source.size:
        raise cursor.wrong(f"tensor {name[:80]!r} lies outside the file, which is cut short or damaged")
    data = cursor.source.data if isinstance(cursor.source.data, mmap.mmap) else None
    return StoredTensor(name, shape, qtype, base + offset, nbytes, data)
