"""Writes safetensors files in a stream: the header is known first, no tensor is held in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.checkpoints.output_files import write_error
from dsconvert.checkpoints.safetensors_header import BITS
from dsconvert.checkpoints.safetensors_reader import Stored, plain

CHUNK = 16 << 20
# The format's names of numpy's types; bf16 travels as its bits.
NAMES = {"uint16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}
NAMES |= {"int16": "I16", "int32": "I32", "int64": "I64", "uint32": "U32"}


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor to be written: the format's type name, the shape, and its bytes in chunks, made on demand."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """How many bytes `chunks` must give."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def from_array(array: npt.NDArray[Any]) -> Piece:
    """A piece of an array of a type of NAMES, or float64; a view is copied row by row."""

    def chunks() -> Iterator[bytes | memoryview]:
        rows = array.reshape(1) if array.ndim == 0 else array
        step = max(1, CHUNK * len(rows) // max(array.nbytes, 1))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            part = plain(part) if part.dtype == np.float64 else part
            yield np.ascontiguousarray(part, part.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data

    kind = "float32" if array.dtype == np.float64 else array.dtype.name
    return Piece(NAMES[kind], array.shape, chunks)


def _decoded(stored: Stored) -> Piece:
    """A piece of the rows that a storage of its own kind stands for, in bf16 or float32."""
    kind = stored.rows(0, 0).dtype
    step = max(1, CHUNK * stored.shape[0] // (math.prod(stored.shape) * kind.itemsize or 1))

    def chunks() -> Iterator[bytes | memoryview]:
        for start in range(0, stored.shape[0], step):
            yield (
                stored.rows(start, start + step)
                .astype(kind.newbyteorder("<"))
                .reshape(-1)
                .view(np.uint8)
                .data
            )

    return Piece(NAMES[kind.name], stored.shape, chunks)


def from_bytes(dtype: str, shape: tuple[int, ...], data: bytes) -> Piece:
    """A piece of its bytes; `dtype` is the format's type name."""
    return Piece(dtype, shape, lambda: iter((data,)))


def from_file(path: Path, start: int, piece: Piece) -> Piece:
    """The same tensor, whose bytes lie in a file from `start` on; they are read on demand."""
    nbytes = piece.nbytes  # the piece itself may hold the tensor

    def chunks() -> Iterator[bytes | memoryview]:
        with path.open("rb") as file:
            file.seek(start)
            for first in range(0, nbytes, CHUNK):
                yield file.read(min(CHUNK, nbytes - first))

    return Piece(piece.dtype, piece.shape, chunks)


def from_stored(stored: Stored) -> Piece:
    """A piece copied as it is from a weight file; float64 becomes float32, what is decoded its numbers."""
    if stored.decode is not None:
        return _decoded(stored)
    if stored.fetch is None and (stored.offset is None or stored.dtype == "f64"):
        assert stored.data is not None  # it and strided tensors are of readable types
        return from_array(stored.data)
    if stored.dtype == "f64":
        return _decoded(stored)

    def chunks() -> Iterator[bytes | memoryview]:
        for start in range(0, stored.nbytes, CHUNK):
            yield stored.raw(start, min(start + CHUNK, stored.nbytes))

    return Piece(stored.dtype.upper(), stored.shape, chunks)


def write_safetensors(
    path: Path,
    pieces: Mapping[str, Piece],
    done: Callable[[str, Piece], None] = lambda name, piece: None,
    seen: Callable[[bytes | memoryview], None] = lambda chunk: None,
) -> int:
    """Write `pieces` to `path` and sync it; returns its size in bytes.

    Wider types come first, so that every tensor is aligned to its type; the header is padded to 8 bytes
    (safetensors README). `done` is called after each tensor, `seen` with all bytes that are
    written, a digest's update, say. Raises OutputError when the disk refuses.
    """
    ordered = sorted(pieces.items(), key=lambda item: -BITS[item[1].dtype])
    header, total = _header(dict(ordered))
    try:
        with open(path, "wb", opener=not_through_a_link) as file:
            file.write(header)
            seen(header)
            for name, piece in ordered:
                written = 0
                for chunk in piece.chunks():
                    written += file.write(chunk)
                    seen(chunk)
                if written != piece.nbytes:
                    raise AssertionError(f"{name} gave {written} bytes, {piece.nbytes} were announced")
                done(name, piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error
    return len(header) + total


def not_through_a_link(path: str, flags: int) -> int:
    """Opens a file for `open`, which must not be a link to another."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _header(pieces: Mapping[str, Piece]) -> tuple[bytes, int]:
    """Length and JSON of the header, and how many bytes of data follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, piece in pieces.items():
        end = offset + piece.nbytes
        entries[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset
