"""The table of GGUF tensor types: ids and block geometry as ggml defines them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QType:
    """One tensor type: `block` values are stored in `size` bytes; `ggml` is its id in a file."""

    name: str
    ggml: int
    block: int
    size: int
    fallback: str = ""  # the type taken instead when a row is no multiple of `block`

    def nbytes(self, values: int) -> int:
        """Bytes of `values` values (a multiple of `block`)."""
        return values // self.block * self.size

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.size * 8 / self.block


QTYPES: dict[str, QType] = {
    row.name: row
    for row in (
        QType("f32", 0, 1, 4),
        QType("f16", 1, 1, 2),
        QType("bf16", 30, 1, 2),
        QType("q8_0", 8, 32, 34, "f16"),
        QType("q4_0", 2, 32, 18, "f16"),
        QType("q4_1", 3, 32, 20, "f16"),
        QType("q5_0", 6, 32, 22, "f16"),
        QType("q5_1", 7, 32, 24, "f16"),
        QType("q2_k", 10, 256, 84, "q4_0"),
        QType("q3_k", 11, 256, 110, "q4_0"),
        QType("q4_k", 12, 256, 144, "q5_0"),
        QType("q5_k", 13, 256, 176, "q5_1"),
        QType("q6_k", 14, 256, 210, "q8_0"),
    )
}

BY_ID: dict[int, QType] = {row.ggml: row for row in QTYPES.values()}
