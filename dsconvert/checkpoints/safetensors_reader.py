"""Reads the header of a safetensors file and maps its tensors: no torch, no copy, nothing trusted."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.checkpoints.safetensors_header import Entry, Fetch, check_head, read_header
from dsconvert.errors import CheckpointError, short
from dsconvert.reading import open_regular

Array = npt.NDArray[Any]

# The types that weights are read in; bf16 travels as its bits.
READABLE: dict[str, np.dtype[Any]] = {"bf16": np.dtype("<u2"), "f16": np.dtype("<f2"), "f32": np.dtype("<f4")}
READABLE["f64"] = np.dtype("<f8")

# The types of packed tensors.
INTEGERS: dict[str, np.dtype[Any]] = {"i16": np.dtype("<i2"), "i32": np.dtype("<i4"), "i64": np.dtype("<i8")}
INTEGERS["u32"] = np.dtype("<u4")
INTEGERS |= dict.fromkeys(("u8", "f8_e4m3", "f8_e8m0"), np.dtype("u1"))  # small floats as their bytes


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a weight file.

    `dtype` is "bf16", "f16", "f32" or another type's name in lower case. `data` is a read-only view of
    the mapped file in the stored shape (uint16 for bf16), None for a type that is not a plain number.
    `offset` is the first byte in the file, None where the bytes are not in one piece. `decode` reads what no
    view can show, scaled bytes for example: it takes the first of some rows and the end of them, and returns
    them as `rows` does. Of a file that is not on this disk there is no view: `fetch` gives bytes of the
    tensor, from the first of some to the end of them. A type without any of these is not read. `parts` are
    the tensors that `decode` reads, codes and scales.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None
    data: Array | None = field(repr=False)
    decode: Callable[[int, int], Array] | None = field(repr=False, default=None)
    fetch: Fetch | None = field(repr=False, default=None)
    parts: tuple[Stored, ...] = field(repr=False, default=())

    @property
    def readable(self) -> bool:
        """Whether its values are known here."""
        plainly = self.fetch is not None and self.dtype in READABLE
        return self.data is not None or self.decode is not None or plainly

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1, the bits of bf16 or float32, C-contiguous; a scalar is one row."""
        stop = min(stop, self.shape[0] if self.shape else 1)
        if self.decode is not None:
            return self.decode(start, stop)
        if self.fetch is not None:
            return plain(self._fetched(start, stop))
        assert self.data is not None  # its type is readable
        return plain(self.data[start:stop] if self.shape else self.data.reshape(1))

    def raw(self, start: int, stop: int) -> bytes | memoryview:
        """Bytes `start` to `stop` - 1 of the tensor as they are stored, in one piece; CheckpointError."""
        if self.fetch is not None:
            return self.fetch(start, stop)
        assert self.offset is not None  # of tensors in one piece only
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start)
                data = file.read(stop - start)
        except OSError as error:
            raise CheckpointError("cannot be read", where=self.path, why=short(error)) from None
        if len(data) < stop - start:
            raise CheckpointError(
                "was cut short while it was read",
                where=self.path,
                hint="Run the same command again when nothing writes there",
            )
        return data

    def _fetched(self, start: int, stop: int) -> Array:
        """Rows of a file elsewhere, in their stored type."""
        row = self.nbytes // max(self.shape[0] if self.shape else 1, 1)
        shape = (max(stop - start, 0), *self.shape[1:])
        return np.ndarray(shape, READABLE[self.dtype], buffer=self.raw(start * row, max(start, stop) * row))


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name, mapped and not read.

    Checks the whole header first (the format's description in the safetensors README): lengths, types,
    shapes, and that the tensors cover the data exactly. Raises CheckpointError.
    """
    size = check_file(path)
    with open_regular(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    entries, start = read_header(path, size, lambda first, end: mapped[first:end])
    return {entry.name: _stored(path, entry, mapped, start) for entry in entries}


def fetched_safetensors(
    path: Path, size: int, read: Fetch, span: Callable[[int, int], Fetch]
) -> dict[str, Stored]:
    """Every tensor of a safetensors file of `size` bytes that is elsewhere, by name; only its header is read.

    `path` is what messages call it, `read` gives bytes of the file, and `span` what gives bytes of one part
    of it. Raises CheckpointError as `read_safetensors` does.
    """
    check_head(path, size, bytes(read(0, min(32, size))))
    entries, start = read_header(path, size, read)
    return {
        entry.name: Stored(
            path, entry.dtype, entry.shape, entry.end - entry.begin, start + entry.begin, None,
            fetch=span(start + entry.begin, start + entry.end),
        )
        for entry in entries
    }  # fmt: skip


def values(stored: Stored) -> Array:
    """A copy of a tensor's values in their stored type, for the types in READABLE and INTEGERS."""
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
    if (fetch := stored.fetch) is not None and stored.decode is None:
        return replace(
            stored,
            shape=shape,
            nbytes=(stop - start) * row,
            offset=None if stored.offset is None else stored.offset + start * row,
            fetch=lambda a, b: fetch(start * row + a, start * row + b),
        )
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
            size, head = os.fstat(file.fileno()).st_size, file.read(32)
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot be read", where=path, why=short(error)) from None
    check_head(path, size, head)
    return size


def _stored(path: Path, entry: Entry, mapped: mmap.mmap, start: int) -> Stored:
    kind = READABLE.get(entry.dtype)
    offset = start + entry.begin
    # A view may be unaligned: old writers did not pad the header. numpy reads such views as they are.
    data = None if kind is None else np.ndarray(entry.shape, kind, buffer=mapped, offset=offset)
    return Stored(path, entry.dtype, entry.shape, entry.end - entry.begin, offset, data)
