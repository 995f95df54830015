"""The table of GGUF tensor types: ids and block geometry as ggml defines them."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED, TAKEN, WANTED, NEEDED = 0, 1, 2, 3


@dataclass(frozen=True)
class QType:
    """One tensor type: `block` values are stored in `size` bytes; `ggml` is its id in a file.

    `importance` says what an importance matrix is to it: IGNORED, TAKEN where there is one, WANTED as
    llama-quantize wants it for all but the embedding and the output layer, or NEEDED for lack of another way.
    """

    name: str
    ggml: int
    block: int
    size: int
    fallback: str = ""  # the type taken instead when a row is not a multiple of `block`
    importance: int = 0

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
        QType("q4_0", 2, 32, 18, "f16", TAKEN),
        QType("q4_1", 3, 32, 20, "f16", TAKEN),
        QType("q5_0", 6, 32, 22, "f16", TAKEN),
        QType("q5_1", 7, 32, 24, "f16", TAKEN),
        QType("q2_k", 10, 256, 84, "q4_0", TAKEN),
        QType("q3_k", 11, 256, 110, "q4_0", TAKEN),
        QType("q4_k", 12, 256, 144, "q5_0", TAKEN),
        QType("q5_k", 13, 256, 176, "q5_1", TAKEN),
        QType("q6_k", 14, 256, 210, "q8_0", TAKEN),
        QType("iq4_nl", 20, 32, 18, "f16", TAKEN),
        QType("iq4_xs", 23, 256, 136, "iq4_nl", TAKEN),
        QType("iq3_s", 21, 256, 110, "iq4_nl", TAKEN),
        QType("iq3_xxs", 18, 256, 98, "iq4_nl", WANTED),
        QType("iq2_s", 22, 256, 82, "iq4_nl", WANTED),
        QType("iq2_xs", 17, 256, 74, "iq4_nl", NEEDED),
        QType("iq2_xxs", 16, 256, 66, "iq4_nl", NEEDED),
        QType("tq1_0", 34, 256, 54, "q4_0"),
        QType("tq2_0", 35, 256, 66, "q4_0"),
        QType("mxfp4", 39, 32, 17, "f16"),
        QType("nvfp4", 40, 64, 36, "f16"),
    )
}

# Types of files of others, which are read but not written.
FOREIGN: tuple[QType, ...] = (
    QType("q8_1", 9, 32, 40),
    QType("q8_k", 15, 256, 292),
    QType("iq1_s", 19, 256, 50),
    QType("i8", 24, 1, 1),
    QType("i16", 25, 1, 2),
    QType("i32", 26, 1, 4),
    QType("i64", 27, 1, 8),
    QType("f64", 28, 1, 8),
    QType("iq1_m", 29, 256, 56),
    QType("q1_0", 41, 128, 18),
    QType("q2_0", 42, 64, 18),
)

BY_ID: dict[int, QType] = {row.ggml: row for row in (*QTYPES.values(), *FOREIGN)}
