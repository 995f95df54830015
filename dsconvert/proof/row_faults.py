"""Which rows of a stored matrix are not the checkpoint's: zeroed, swapped, scaled, another's.

A row is held against an absolute floor of its type and against the other rows of its own matrix, whose
lengths and noise say what the type and its quantizer do to rows of this model: a factor of 1.05 is 26 dB,
less noise than 4 bits make, but the lengths of rows of 256 values in 4 bits agree to .006. The limits were
set by faithful files of every type (ggml's quantizers with and without importance, GPTQ, EXL2; trained and
heavy-tailed rows). What they do not see: 1.05 on one row where the lengths spread by more than .01, as in
2 and 3 bits of GPTQ and EXL2 with rows of a few hundred values (.03 and .013 for 256). Where plain rounding
of the same rows is known, `nearest_rows` sees more: in a file that was quantized plainly any row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsconvert.proof.figures import RowFault
from dsconvert.proof.nearest_rows import FED, unlike_rows
from dsconvert.proof.row_sums import Matrix, NearestSums, RowSums

Flags = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Again = Callable[[int], tuple[Floats, Floats]]

# The least signal to noise in dB of a row, where a type bounds it: below that of rows with one outlier in
# a column of no importance. GPTQ and EXL2 trade weights' errors over whole rows, and have no bound.
ROW_FLOOR: dict[str, float] = {
    "f32": 97.0,
    "f16": 37.0,
    "bf16": 42.0,
    "q8_0": 28.0,
    "q6_k": 12.0,
    "q5": 8.0,
    "q4": 6.0,
    "q3": 3.0,
    "q2": -2.0,
}
# The largest code times the largest scale's code: what the last bit of a float16 scale, 2^-25, is
# multiplied by. Rows so small that their scales are below float16 are stored as zero by right.
SPAN: dict[str, float] = {
    "f32": 0.0,
    "bf16": 0.0,
    "f16": 1.0,
    "q8_0": 127.0,
    "q6_k": 32.0 * 128,
    "q5_0": 16.0,
    "q5_1": 31.0,
    "q5_k": 31.0 * 63,
    "q4_0": 8.0,
    "q4_1": 15.0,
    "q4_k": 15.0 * 63,
    "q3_k": 4.0 * 32,
    "q2_k": 3.0 * 15,
}
ANY_SPAN = 256.0
SMALLEST = 2.0**-25
# Values to a scale, in types that round to nearest by the scale as it is stored.
BLOCKS = {"q2_k": 16, "q3_k": 16, "q4_k": 32, "q5_k": 32, "q6_k": 16}
# How many values a block of these has at most.
LEVELS = {"q2_k": 4, "q3_k": 8} | dict.fromkeys(("q4_k", "q4_0", "q4_1", "iq4_nl", "iq4_xs"), 16)
LEVELS |= {"nvfp4": 16, "mxfp4": 16}
# Of all types of blocks, and the share of a row's values that are nearer to another of their block: on the
# sample up to .0033 where ggml rounds by a scale that it rounds afterwards, with error feedback from .027 on.
FED_BLOCKS = BLOCKS | dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs"), 32)
FED_BLOCKS |= {"nvfp4": 16, "mxfp4": 32}
FED_SHARE = 0.01
COSINE = 0.3  # of any faithful row; two rows of a model have 0 +- 1 / sqrt(columns)
WORSE = 8.0  # times the noise of the matrix's rows, at the same share of outliers
SPREADS = (
    5.0,
    6.0,
)  # robust standard deviations of the rows' lengths, by the width: big models have many rows
LEAST_LENGTH = 0.02  # by which a row may be longer or shorter in any case
# One scale for 256 values, their largest, and three codes: of a model that is not ternary itself, the length
# of a row hangs on a few of its values, and says nothing.
ANY_LENGTH = ("tq1_0", "tq2_0")
SUSPECT, BLUNT, WITNESSES = 1.5, 0.03, 8  # see `_misrounded`
FEW = 16  # too few rows to estimate a distribution from
LEAST_COLUMNS = 128  # of which the lengths of rows say something
LEAST_ROWS, LEAST_WRONG, LEFT = 128, 8, 0.15  # of wrong columns: rows, columns, what is theirs in them
HEAVY = 0.25  # of the mean column's sum of squares: lighter ones may be lost in the others' noise
LEAST_NOISE, CLEAR, TINY = 1e-3, 1e4, 1e-300
SHOWN = 3
HEADED_ROWS = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
HEADED_COLUMNS = ("self_attn.o_proj.weight",)
ALONE = 1.5  # of a row's own error, should its largest values bear it
# Error feedback moves whole rows, some of them far: of 200,000 rows of SmolLM2-135M one of GPTQ was
# 1.04 times as far off in 2 bits as the limit without this margin, .86 in 3 and .99 in 4 bits; and of the
# head's 49,152 rows one in EXL2's 6 bits had 1.04 times the noise, of its linears in GGUF files one in q6_k
# 1.14 times.
FED_MARGIN = 1.3


def faults(
    matrix: Matrix, name: str, kind: str, head_dim: int, again: Again | None = None, fed: bool = False
) -> tuple[RowFault, ...]:
    """What is wrong with the rows and columns of the matrix `name`, stored in type `kind`.

    Heads of `head_dim` are named where rows or columns lie in heads; `again` and `fed` as in `row_faults`.
    """
    rows, head = matrix.rows(), head_dim if name.endswith(HEADED_ROWS) else 0
    found = row_faults(rows, kind, again, head, fed)
    if (rounded := matrix.against_nearest()) is not None:
        found = _with_unlike(found, rows, rounded, kind, head)
    clear = np.median(rows.signal) > CLEAR * _unseen(kind, rows.columns)
    columns = column_faults(matrix, head_dim if name.endswith(HEADED_COLUMNS) else 0) if clear else ()
    return columns if columns and 2 * len(found) > len(rows.signal) else found + columns


def _with_unlike(
    found: tuple[RowFault, ...], rows: RowSums, rounded: NearestSums, kind: str, head: int
) -> tuple[RowFault, ...]:
    """`found` without the rows that are the rounded ones, and with those that are not like the others."""
    at = np.searchsorted(rows.labels, rounded.labels)
    names = [_named("row", int(label), head) for label in rounded.labels]
    unlike = unlike_rows(rounded, kind, _unseen(kind, rows.columns), rows.peaks[at])
    same = {names[int(i)] for i in np.flatnonzero(rounded.apart == 0)}
    kept = tuple(fault for fault in found if fault.where not in same)
    known = {fault.where for fault in kept}
    return kept + tuple(RowFault(names[i], why) for i, why in unlike.items() if names[i] not in known)


def told(found: tuple[RowFault, ...]) -> str:
    """The first faults in words, and how many more there are."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(f"{fault.where} {fault.why}" for fault in found[:SHOWN]) + more


def _unseen(kind: str, columns: int) -> float:
    """The energy of a row that may be lost in the last bit of the scales."""
    return columns * (SMALLEST * _of(SPAN, kind, ANY_SPAN)) ** 2


def row_faults(
    rows: RowSums, kind: str, again: Again | None = None, head: int = 0, fed: bool = False
) -> tuple[RowFault, ...]:
    """The rows that cannot be a faithful row of type `kind`; of rows in `head`s, the head is named too.

    `again` reads a row of both, for a closer look at what the sums leave open. `fed` says that error feedback
    chose the codes, as it does of some kinds always.
    """
    unseen = _unseen(kind, rows.columns)
    floor = _of(ROW_FLOOR, kind, -np.inf)
    alive = rows.signal > 4 * unseen
    noisy = np.where(
        alive,
        ~(rows.noise <= unseen + rows.signal * 10 ** (-floor / 10)),
        ~(rows.noise <= 16 * unseen),
    )
    found = {int(i): _noisy(rows, int(i), kind, floor) for i in np.flatnonzero(noisy)}
    margin = FED_MARGIN if fed or kind.startswith(FED) else 1.0
    own = _own(rows, alive & (rows.cosine >= COSINE), unseen, margin)
    turned = alive & ~(rows.cosine >= COSINE)
    if own is not None:
        turned |= alive & ~(own.noises <= own.worst)
        off = np.abs(rows.length - own.length)
        longer = alive & ~turned & ~(off <= own.limit) & (kind not in ANY_LENGTH)
        if again is not None and kind in BLOCKS:
            clear = rows.signal > CLEAR * unseen
            longer |= _misrounded(rows, own, clear & ~turned & ~longer, kind, again)
        for i in np.flatnonzero(longer):
            times = np.exp(rows.length[i] - own.length)
            found[int(i)] = f"is {times:.3f} times as long as the checkpoint's, by the other rows' measure"
    found |= {int(i): _direction(rows, int(i)) for i in np.flatnonzero(turned)}
    return tuple(RowFault(_named("row", int(rows.labels[i]), head), found[i]) for i in sorted(found))


@dataclass(frozen=True)
class _Own:
    """What a matrix's own rows say of each of them.

    `length` is the median of the rows' lengths, `spread` the standard deviation of each about it, `limit`
    how far it may be off; `noises` are the shares of noise across the rows, `worst` what they may be.
    """

    length: float
    spread: Values
    limit: Values
    noises: Values
    worst: Values


def _own(rows: RowSums, live: Flags, unseen: float, margin: float) -> _Own | None:
    """The measure of a matrix by its different rows; None where they are too few or too short for one."""
    (chosen,) = np.nonzero(live)
    chosen = chosen[np.unique(rows.signal[chosen], return_index=True)[1]]
    if rows.columns < LEAST_COLUMNS or len(chosen) < FEW:
        return None
    noises, signal, lengths = 1 - rows.cosine**2, np.maximum(rows.signal, TINY), rows.length[chosen]
    with np.errstate(all="ignore"):
        errors = np.sqrt(rows.noise / signal) * rows.peaks + np.sqrt(unseen / signal) / 2
    length, noise = float(np.median(lengths)), float(np.median(noises[chosen]))
    deviation = 1.4826 * float(np.median(np.abs(lengths - length)))
    spread = deviation * np.maximum(1.0, errors / max(float(np.median(errors[chosen])), TINY))
    slack = np.abs(noises - noise) / 2  # the length of a row depends on its noise
    far = margin * np.maximum(_spreads(rows.columns) * spread, ALONE * errors)
    limit = np.maximum(far, LEAST_LENGTH) + slack
    usual = max(float(np.median(rows.peaks[chosen])), TINY)
    worst = margin * WORSE * noise * np.maximum(1.0, rows.peaks / usual) + 2 * unseen / signal
    return _Own(length, spread, limit, noises, np.maximum(worst, LEAST_NOISE))


def _spreads(columns: int) -> float:
    low, high = SPREADS
    return float(np.clip(low + 0.5 * math.log2(columns / 256), low, high))


def _misrounded(rows: RowSums, own: _Own, among: Flags, kind: str, again: Again) -> Flags:
    """The rows somewhat off whose values lie nearer to another code of their own block than to their own.

    A quantizer that rounds to nearest leaves none; a row that was scaled afterwards has some, where its
    length alone is within the noise of a short row. Rows that are not stored as blocks say nothing: those
    of latent attention's keys lie across the blocks of a GGUF file.
    """
    found, block = np.zeros_like(among), BLOCKS[kind]
    suspects = among & (own.limit > BLUNT) & (np.abs(rows.length - own.length) > SUSPECT * own.spread)
    for i in np.flatnonzero(suspects):
        base, candidate = again(int(rows.labels[i]))
        found[i] = in_blocks(candidate, kind) and misrounded(base, candidate, block) > 0
    if not found.any():
        return found
    # Where many suspects have some, or rows of the usual length, this quantizer does not round to nearest.
    (usual,) = np.nonzero(among & ~suspects)
    usual = usual[np.argsort(np.abs(rows.length[usual] - own.length), kind="stable")[:WITNESSES]]
    fed = sum(misrounded(*again(int(rows.labels[i])), block) > 0 for i in usual)
    alone = found.sum() <= max(1, suspects.sum() // 4) and 2 * fed <= len(usual)
    return found if alone else np.zeros_like(found)


def fed(rows: int, kind: str, again: Again) -> bool:
    """Whether a matrix's codes were chosen for its outputs' sake: rounding leaves few not nearest.

    Rows that are not stored as blocks have other values than those that a code stands for, and say nothing.
    """
    block, shares = FED_BLOCKS.get(kind, 0), []
    for row in range(0, rows if block else 0, max(1, rows // WITNESSES)):
        base, candidate = again(row)
        if in_blocks(candidate, kind):
            shares.append(misrounded(base, candidate, block) / base.size)
    return bool(shares) and float(np.median(shares)) > FED_SHARE


def in_blocks(row: Floats, kind: str) -> bool:
    """Whether the blocks of a row have no more values than those of the type."""
    if row.size % FED_BLOCKS[kind]:
        return False
    values = np.sort(row.reshape(-1, FED_BLOCKS[kind]), 1)
    return bool((np.diff(values, axis=1) != 0).sum(1).max() < LEVELS.get(kind, values.shape[1]))


def misrounded(base: Floats, candidate: Floats, block: int) -> int:
    """How many values of a row are nearer, by 2 %, to another value stored in the same block."""
    if base.size % block:
        return 0
    w, q = base.reshape(-1, block), candidate.reshape(-1, block)
    error = np.abs(w - q)
    nearest = np.abs(w[:, :, None] - q[:, None, :]).min(2)
    return int(np.sum(error - nearest > 0.02 * error))


def column_faults(matrix: Matrix, head: int = 0) -> tuple[RowFault, ...]:
    """The columns of some weight that hold another's values: of another head, or of another order.

    Those that hold nothing are lost in the noise of an outlier beside them, as coarse types do by right.
    """
    signal, noise, along = matrix.columns()
    with np.errstate(all="ignore"):
        gain, energy = 1 + along / signal, signal + 2 * along + noise
    bad = (signal >= HEAVY * signal.mean()) & (gain < LEFT) & (energy > signal / 2)
    if matrix.count < LEAST_ROWS or bad.sum() < LEAST_WRONG:
        return ()
    return tuple(
        RowFault(
            _named("column", int(i), head), f"points elsewhere: {gain[i]:.2f} of the checkpoint's is in it"
        )
        for i in np.flatnonzero(bad)
    )


def _direction(rows: RowSums, i: int) -> str:
    if rows.candidate[i] <= 1e-12 * rows.signal[i]:
        return "is zero, and the checkpoint's is not"
    return f"points elsewhere: its cosine with the checkpoint's is {rows.cosine[i]:.3f}"


def _noisy(rows: RowSums, i: int, kind: str, floor: float) -> str:
    if not np.isfinite(rows.noise[i]):
        return "has values that are not finite"
    if not rows.signal[i]:
        return "is not zero, and the checkpoint's is"
    reached = 10 * np.log10(rows.signal[i] / rows.noise[i])
    return f"has a signal to noise of {reached:.1f} dB, a row of {kind} should reach {floor:g} dB"


def _named(word: str, number: int, head: int) -> str:
    return f"{word} {number}" + (f" (head {number // head})" if head else "")


def _of(table: dict[str, float], kind: str, other: float) -> float:
    """A type's number, or that of its bits."""
    return table.get(kind, table.get(kind[:2] if kind.startswith("q") else kind, other))
