"""The numbers inside ggml's blocks as arrays, and back: where each bit of a code and of a scale lies.

A row of a table for each type; unpacking and packing are the same few lines for all. Sources: ggml-common.h
(the structs), dequantize_row_* of ggml-quants.c; kernels/blocks.py, kquants.py and nonlinear.py, whose
blocks these are. Importing this module imports numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.gguf.kernels.nonlinear import VALUES
from converters.gguf.qtypes import QType
from dsconvert.quantization.static_blocks import BlockType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
HALF = np.dtype("<f2")


@dataclass(frozen=True, eq=False)
class Piece:
    """Bits of numbers: number of[i] has `bits` of them in byte at[i], from shift[i] on, raised by `up`."""

    of: npt.NDArray[np.intp]
    at: npt.NDArray[np.intp]
    shift: npt.NDArray[np.uint8]
    bits: int
    up: int


Numbers = Sequence[int] | npt.NDArray[np.intp]


def _piece(at: Numbers, shift: Numbers | int, bits: int, up: int = 0, first: int = 0) -> Piece:
    places = np.asarray(at, np.intp)
    shifts = np.broadcast_to(np.asarray(shift, np.uint8), places.shape)
    return Piece(first + np.arange(len(places)), places, shifts, bits, up)


@dataclass(frozen=True, eq=False)
class Fields:
    """A type's blocks: what the numbers may be, and their places; `d` and `m` are those of float16 values.

    Integer scales are stored with `added` added, and with the bits `flipped` flipped.
    """

    kind: BlockType
    codes: tuple[Piece, ...]
    d: int
    m: int | None = None
    s: tuple[Piece, ...] = ()
    n: tuple[Piece, ...] = ()
    added: int = 0
    flipped: int = 0


def _nibbles(first: int, count: int, run: int) -> Piece:
    """4 bits each: of every `run` numbers, byte j has number j below and j + run / 2 above."""
    j = np.arange(count)
    return _piece(first + j // run * (run // 2) + j % (run // 2), j % run // (run // 2) * 4, 4)


def _quarters(first: int, up: int = 0) -> Piece:
    """2 bits each: of every 128 numbers, byte k has k, 32 + k, 64 + k and 96 + k, the first lowest."""
    j = np.arange(256)
    return _piece(first + j // 128 * 32 + j % 32, j % 128 // 32 * 2, 2, up)


def _eighths(first: int, up: int) -> Piece:
    """1 bit each: bit j of byte k is that of number 32 j + k."""
    j = np.arange(256)
    return _piece(first + j % 32, j // 32, 1, up)


def _fifth_bits(first: int) -> Piece:
    """Bit 4 of 32 numbers, in their order."""
    j = np.arange(32)
    return _piece(first + j // 8, j % 8, 1, 4)


def _six_bits(first: int, above: int) -> tuple[Piece, ...]:
    """8 scales (`above` 0) or mins (4) of 6 bits in the 12 bytes that they share (pack_affine_6_bit)."""
    k = np.arange(4)
    low = _piece(first + above + k, 0, 6)
    rest = _piece(first + 8 + k, above, 4, first=4)
    return low, rest, _piece(first + above + k, 6, 2, 4, first=4)


def _q3_scales(first: int) -> tuple[Piece, ...]:
    """16 scales: byte k of the first 8 has the low 4 bits of k and 8 + k, four more bytes the high 2 bits."""
    k = np.arange(16)
    return _nibbles(first, 16, 16), _piece(first + 8 + k % 4, k // 4 * 2, 2, 4)


def _xs_scales(first: int) -> tuple[Piece, ...]:
    """8 scales of iq4_xs: 2 bytes with the high 2 bits of each, then 4 with the low 4 bits."""
    k = np.arange(8)
    return _piece(first + 2 + k // 2, k % 2 * 4, 4), _piece(first + k // 4, k % 4 * 2, 2, 4)


def _five_bits(high: int, low: int) -> tuple[Piece, ...]:
    return _nibbles(low, 32, 32), _fifth_bits(high)


_TABLE = tuple(map(float, VALUES))
_BYTES = np.arange(16)
FIELDS: dict[str, Fields] = {
    "q4_0": Fields(BlockType(32, 32, 15, 8), (_nibbles(2, 32, 32),), 0),
    "q5_0": Fields(BlockType(32, 32, 31, 16), _five_bits(2, 6), 0),
    # The min of these is added: an n of -1 makes it so.
    "q4_1": Fields(BlockType(32, 32, 15, offsets=(-1, -1)), (_nibbles(4, 32, 32),), 0, 2),
    "q5_1": Fields(BlockType(32, 32, 31, offsets=(-1, -1)), _five_bits(4, 8), 0, 2),
    "q2_k": Fields(
        BlockType(256, 16, 3, scales=(0, 15), offsets=(0, 15)), (_quarters(16),), 80, 82,
        (_piece(_BYTES, 0, 4),), (_piece(_BYTES, 4, 4),),
    ),
    "q3_k": Fields(
        BlockType(256, 16, 7, 4, scales=(-32, 31)), (_quarters(32), _eighths(0, 2)), 108,
        s=_q3_scales(96), added=32,
    ),
    "q4_k": Fields(
        BlockType(256, 32, 15, scales=(0, 63), offsets=(0, 63)), (_nibbles(16, 256, 64),), 0, 2,
        _six_bits(4, 0), _six_bits(4, 4),
    ),
    "q5_k": Fields(
        BlockType(256, 32, 31, scales=(0, 63), offsets=(0, 63)), (_nibbles(48, 256, 64), _eighths(16, 4)), 0,
        2, _six_bits(4, 0), _six_bits(4, 4),
    ),
    "q6_k": Fields(
        BlockType(256, 16, 63, 32, scales=(-128, 127)), (_nibbles(0, 256, 128), _quarters(128, 4)), 208,
        s=(_piece(192 + _BYTES, 0, 8),), added=128, flipped=128,
    ),
    "iq4_nl": Fields(BlockType(32, 32, 15, values=_TABLE), (_nibbles(2, 32, 32),), 0),
    "iq4_xs": Fields(
        BlockType(256, 32, 15, scales=(-32, 31), values=_TABLE), (_nibbles(8, 256, 32),), 0,
        s=_xs_scales(2), added=32,
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Rows of blocks as numbers: `codes` uint8 [N, K]; d and m float32 [N, K / block]; s and n int16
    [N, K / sub], ones and zeros or the fixed number where the type stores none.
    """

    codes: Bytes
    d: Floats
    m: Floats
    s: npt.NDArray[np.int16]
    n: npt.NDArray[np.int16]


def unpack(rows: Bytes, qtype: QType) -> Unpacked:
    """The numbers in rows of blocks, uint8 [N, bytes per row]."""
    fields, count = FIELDS[qtype.name], len(rows)
    blocks, kind = rows.reshape(-1, qtype.size), fields.kind
    subs = kind.block // kind.sub

    def integers(pieces: tuple[Piece, ...], fixed: int) -> npt.NDArray[np.int16]:
        if not pieces:
            return np.full((count, len(blocks) // count * subs), fixed, np.int16)
        return _gathered(blocks, pieces, subs).astype(np.int16).reshape(count, -1)

    def half(at: int | None) -> Floats:
        if at is None:
            return np.zeros((count, len(blocks) // count), np.float32)
        return np.ascontiguousarray(blocks[:, at : at + 2]).view(HALF).astype(np.float32).reshape(count, -1)

    s = integers(fields.s, kind.scales[0])
    if fields.s:
        s = (s ^ fields.flipped) - np.int16(fields.added)
    codes = _gathered(blocks, fields.codes, kind.block).reshape(count, -1)
    return Unpacked(codes, half(fields.d), half(fields.m), s, integers(fields.n, kind.offsets[0]))


def pack(numbers: Unpacked, qtype: QType) -> Bytes:
    """Rows of blocks, uint8 [N, bytes per row], of these numbers; what a type does not store is not read."""
    fields, count = FIELDS[qtype.name], len(numbers.codes)
    blocks = np.zeros((numbers.d.size, qtype.size), np.uint8)
    _scatter(blocks, fields.codes, numbers.codes)
    stored = (numbers.s.astype(np.int16) + np.int16(fields.added)) ^ np.int16(fields.flipped)
    _scatter(blocks, fields.s, stored.astype(np.uint8))
    _scatter(blocks, fields.n, numbers.n.astype(np.uint8))
    for at, values in ((fields.d, numbers.d), (fields.m, numbers.m)):
        if at is not None:
            blocks[:, at : at + 2] = values.astype(HALF).reshape(-1, 1).view(np.uint8)
    return blocks.reshape(count, -1)


def _gathered(blocks: Bytes, pieces: tuple[Piece, ...], count: int) -> Bytes:
    """The numbers of each block, uint8 [blocks, count]."""
    found = np.zeros((len(blocks), count), np.uint8)
    for piece in pieces:
        bits = blocks[:, piece.at] >> piece.shift
        bits &= np.uint8((1 << piece.bits) - 1)
        bits <<= np.uint8(piece.up)
        found[:, piece.of] |= bits
    return found


def _scatter(blocks: Bytes, pieces: tuple[Piece, ...], numbers: Bytes) -> None:
    """Put numbers where `_gathered` finds them; the bits there are 0 before."""
    if not pieces:
        return
    flat = numbers.reshape(len(blocks), -1)
    for piece in pieces:
        bits = flat[:, piece.of] >> np.uint8(piece.up)
        bits &= np.uint8((1 << piece.bits) - 1)
        bits <<= piece.shift
        for shift in np.unique(piece.shift):  # of one shift no two numbers share a byte
            here = piece.shift == shift
            blocks[:, piece.at[here]] |= bits[:, here]
