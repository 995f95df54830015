"""The bytes of a GGUF file ahead of its tensor data: key-values, tensor infos, offsets (GGUF v3).

Everything here is pure: a plan in, bytes and offsets out, so the exact size of every file is known before
the first byte is written. Source: the GGUF specification of the ggml project.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from converters.gguf.qtypes import QType
from dsconvert.reading import read_head

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

# Value type name -> (id in the file, struct format of a scalar).
VALUE_TYPES: dict[str, tuple[int, str]] = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "array": (9, ""),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
# A key's value with its type: ("uint32", 7), ("array:string", ["a", "b"]).
KeyValues = Mapping[str, tuple[str, Any]]
BY_COST = "dsconvert.types."  # what the keys begin with that tell of types chosen by cost


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its name, shape (rows first, the reverse of ggml's order) and type."""

    name: str
    shape: tuple[int, ...]
    qtype: QType

    @property
    def nbytes(self) -> int:
        return self.qtype.nbytes(prod(self.shape))


@dataclass(frozen=True)
class Layout:
    """One file: its name, the bytes before the data, where each tensor lies, the size of the whole."""

    name: str
    head: bytes
    offsets: dict[str, int]
    nbytes: int


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        return read_head(path, len(MAGIC)) == MAGIC
    except OSError:
        return False


def utf8(text: str) -> bytes:
    """The text in UTF-8; U+FFFD for what no UTF-8 has: a file name's bytes that are none, half a pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode("utf-8")


def length(size: int) -> bytes:
    """The length of a string as it stands before it."""
    return size.to_bytes(8, "little")


def encode_string(text: str) -> bytes:
    data = utf8(text)
    return length(len(data)) + data


def encode_value(kind: str, value: Any) -> bytes:
    """A typed value as it stands after its key; `kind` is a name of VALUE_TYPES or "array:NAME"."""
    kind, _, item = kind.partition(":")
    head = struct.pack("<I", VALUE_TYPES[kind][0])
    if kind == "array":
        head += struct.pack("<IQ", VALUE_TYPES[item][0], len(value))
        if item == "string":
            # A vocabulary has 100,000 of them: written out here, a call of encode_string each takes longer.
            encoded = list(map(utf8, value))
            sizes = {size: length(size) for size in set(map(len, encoded))}
            return head + b"".join(chain.from_iterable((sizes[len(data)], data) for data in encoded))
        return head + struct.pack(f"<{len(value)}{VALUE_TYPES[item][1]}", *value)
    if kind == "string":
        return head + encode_string(value)
    return head + struct.pack("<" + VALUE_TYPES[kind][1], value)


def lay_out(name: str, keys: KeyValues, tensors: Sequence[Tensor]) -> Layout:
    """Place `tensors` in the order given after `keys` in a file called `name`."""
    infos: list[bytes] = []
    relative: list[int] = []
    position = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        infos.append(encode_string(tensor.name))
        infos.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.qtype.ggml, position))
        relative.append(position)
        position += padded(tensor.nbytes)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    parts += [encode_string(key) + encode_value(*value) for key, value in keys.items()]
    head = b"".join(parts + infos)
    head += bytes(padded(len(head)) - len(head))
    offsets = {tensor.name: len(head) + at for tensor, at in zip(tensors, relative, strict=True)}
    return Layout(name, head, offsets, len(head) + position)


def lay_out_split(
    name: str, keys: KeyValues, tensors: Sequence[Tensor], max_size: int | None
) -> list[Layout]:
    """As `lay_out`, in as many files as `max_size` bytes of tensor data each ask for.

    Split names and keys are llama.cpp's: the first file carries all keys. One file stays unsplit.
    """
    groups = list(_groups(tensors, max_size)) if max_size else [list(tensors)]
    if len(groups) == 1:
        return [lay_out(name, keys, tensors)]
    stem = name.removesuffix(".gguf")
    layouts = []
    for number, group in enumerate(groups):
        split: KeyValues = {
            "split.no": ("uint16", number),
            "split.count": ("uint16", len(groups)),
            "split.tensors.count": ("int32", len(tensors)),
        }
        shard = f"{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        layouts.append(lay_out(shard, {**keys, **split} if number == 0 else split, group))
    return layouts


def _groups(tensors: Iterable[Tensor], max_size: int) -> Iterable[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + padded(tensor.nbytes) > max_size:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += padded(tensor.nbytes)
    yield group
