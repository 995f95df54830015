"""Rows of a stored matrix against what plain rounding to nearest in its own type makes of the checkpoint's.

A plain quantizer does just that; one with an importance matrix, or with error feedback, loses some signal
to noise, about the same in every row. So a row is wrong that is not the rounded one where nearly all others
are, and one that loses much more than the others; a matrix is wrong that loses more than any faithful one.
Measured over the sample, SmolLM2-135M and random models, in dB that a whole matrix loses: importance -1.7 to
1.5, GPTQ .7 to 3.5, EXL2 1.1 to 2.5; and a row more than the median row: at most 38 robust standard
deviations (of .04 to 1.6 dB), where a few values of no importance bear most of its error. The sums hold for
the rows that were rounded, which may be a sample.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dsconvert.proof.row_sums import NearestSums

Values = npt.NDArray[np.float64]
# The dB that a faithful matrix may lose against plain rounding: by importance, and by error feedback.
MOST_LOST, MOST_LOST_FED, FED = 3.0, 5.0, ("gptq", "exl2", "w", "mlx")
# The squared error of a linear's outputs by that of plain rounding: .06 to 1.4 on the sample, SmolLM2 and
# random models, all types and settings; error feedback loses as its weights do, 2.03 times where the text
# had few of the tokens. A linear that is zero: 2.6 (tq2_0), 3.7 (2-bit GPTQ), else 6.5 and more.
MOST_LOSS, MOST_LOSS_FED = 2.0, 3.5
# Up to where all of it is foretold by the type: rounding by importance does hardly more than plain rounding
# (1.23 times, of 128 tokens); error feedback of so few tokens does 2.5 times as much.
LOSS_FORETOLD, LOSS_FORETOLD_FED = 1.0, MOST_LOSS_FED
SAME_SHARE = 0.85  # of a matrix's rows: where so many are the rounded ones, all should be
# A row that another compiler rounded has some values at a tie, or a scale of nearly the same error.
SAME_NOISE, SAME_LENGTH = 1.01, 0.02
SPREADS, LEAST_EXCESS = 45.0, 2.0  # robust standard deviations, and dB, by which a row may lose more
LEAST_ROWS, FEW = 8, 32  # of which it is said whether they are the rounded ones; how they are distributed
STORED_AS_GIVEN = ("f32", "f64", "f16", "bf16")  # another 16-bit copy of a model differs in the last bit
TINY = 1e-300


def lost(rows: NearestSums, kind: str) -> float | None:
    """The dB of signal to noise of these rows that rounding to nearest would have had more than they have.

    Negative where they are better; None of types that store values as given.
    """
    if kind in STORED_AS_GIVEN:
        return None
    noise, plain = float(rows.noise.sum()), float(rows.plain.sum())
    if noise == plain:
        return 0.0
    return float(10 * np.log10(max(noise, TINY) / max(plain, TINY)))


def most_lost(kind: str, fed: bool = False) -> float:
    """The dB that a faithful matrix of this type may lose; `fed` says that error feedback chose its codes."""
    return MOST_LOST_FED if fed or kind.startswith(FED) else MOST_LOST


def most_loss(kind: str, fed: bool = False) -> float:
    """The squared error of its outputs, by that of plain rounding, that a faithful linear may have."""
    return MOST_LOSS_FED if fed or kind.startswith(FED) else MOST_LOSS


def loss_foretold(kind: str, fed: bool = False) -> float:
    """The squared error of its outputs, by that of plain rounding, that a linear of this type foretells."""
    return LOSS_FORETOLD_FED if fed or kind.startswith(FED) else LOSS_FORETOLD


def unlike_rows(rows: NearestSums, kind: str, unseen: float, peaks: Values) -> dict[int, str]:
    """What is wrong, by place in `rows`, with those that are not like the others.

    `unseen` is the energy of a row that may be lost in the last bit of its scales, `peaks` say how few values
    each row rests on (RowSums.peaks): one value of no importance may bear all of a row's error.
    """
    same = rows.apart == 0
    if len(same) < LEAST_ROWS:
        return {}
    if same.mean() >= SAME_SHARE:
        return _unrounded(rows, kind, unseen)
    return {} if kind in STORED_AS_GIVEN else _outliers(rows, unseen, peaks)


def _unrounded(rows: NearestSums, kind: str, unseen: float) -> dict[int, str]:
    """The rows that are not the rounded ones, and worse, or of another length."""
    with np.errstate(all="ignore"):
        far = np.abs(0.5 * np.log(np.maximum(rows.length, TINY) / np.maximum(rows.due, TINY)))
    worse = ~(rows.noise <= SAME_NOISE * rows.plain + unseen)
    wrong = (rows.apart != 0) & (worse | (~(far <= SAME_LENGTH) & (rows.signal > 4 * unseen)))
    count = f"as {int((rows.apart == 0).sum()):,} of {len(rows.apart):,} rows are"
    return {
        int(i): f"is not what rounding to {kind} gives, {count}: signal to noise {_decibel(rows, i)}"
        for i in np.flatnonzero(wrong)
    }


def _outliers(rows: NearestSums, unseen: float, peaks: Values) -> dict[int, str]:
    """The rows that lose more than the spread of the others allows."""
    alive = rows.signal > 4 * unseen
    if alive.sum() < FEW:
        return {}
    with np.errstate(all="ignore"):
        losses = 10 * np.log10((rows.noise + unseen + TINY) / (rows.plain + unseen + TINY))
    middle = float(np.median(losses[alive]))
    deviation = 1.4826 * float(np.median(np.abs(losses[alive] - middle)))
    few = np.maximum(1.0, peaks / max(float(np.median(peaks[alive])), TINY))
    limit = middle + max(SPREADS * deviation, LEAST_EXCESS) * few
    return {
        int(i): f"loses {losses[i]:.1f} dB against plain rounding, the median row {middle:.1f}"
        for i in np.flatnonzero(alive & (rows.noise > 0) & ~(losses <= limit))
    }


def _decibel(rows: NearestSums, i: np.intp) -> str:
    noises = np.maximum([rows.noise[i], rows.plain[i]], TINY)
    reached, due = 10 * np.log10(max(rows.signal[i], TINY) / noises)
    return f"{reached:.1f} dB instead of {due:.1f}"
