"""Sums over every row and column of a matrix and of its candidate, in numpy or torch, chunk by chunk.

`row_faults` judges a row's direction and length by these sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.proof.figures import decibel

Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
CHUNK, CUDA_CHUNK = 1 << 15, 1 << 22  # values whose products are made at once, in cache


@dataclass(frozen=True)
class RowSums:
    """Of each row w of the base, whose error is e: w.w, e.e, w.e and the sum of w^4, float64 [rows] each.

    `labels` are the rows' numbers in the Hugging Face layout, `columns` is the rows' size.
    """

    labels: Labels
    signal: Doubles
    noise: Doubles
    along: Doubles
    fourth: Doubles
    columns: int

    @property
    def candidate(self) -> Doubles:
        """The sum of squares of the candidate's row."""
        return np.maximum(self.signal + 2 * self.along + self.noise, 0.0)

    @property
    def length(self) -> Doubles:
        """The logarithm of |q| / |w|."""
        with np.errstate(all="ignore"):
            found: Doubles = 0.5 * np.log(self.candidate / self.signal)
        return found

    @property
    def cosine(self) -> Doubles:
        """The cosine of the two rows; 0 where one of them is zero."""
        with np.errstate(all="ignore"):
            found = (self.signal + self.along) / np.sqrt(self.signal * self.candidate)
        return np.where((self.signal > 0) & (self.candidate > 0), np.clip(found, -1.0, 1.0), 0.0)

    @property
    def peaks(self) -> Doubles:
        """1 / sqrt(n) of n equal values, 1 of a single one: how few values the row's length rests on."""
        with np.errstate(all="ignore"):
            found: Doubles = np.sqrt(self.fourth) / self.signal
        return found


@dataclass(frozen=True)
class NearestSums:
    """Of rows w of the base: what the candidate q has of each, and what plain rounding n would have.

    `noise` and `plain` are the energies of q - w and n - w, `apart` that of q - n, `length` and `due` those
    of q and n; `signal` that of w. float64 [rows] each, `labels` the rows' numbers.
    """

    labels: Labels
    signal: Doubles
    noise: Doubles
    plain: Doubles
    apart: Doubles
    length: Doubles
    due: Doubles


@dataclass(frozen=True)
class _Part:
    labels: Labels
    rows: Doubles
    columns: Doubles
    energies: tuple[float, float]


@dataclass
class Matrix:
    """A matrix of two models that comes in parts of whole rows, in any order and from any thread.

    A vector is a matrix of one row.
    """

    parts: list[_Part] = field(default_factory=list)
    rounded: list[tuple[Labels, Doubles]] = field(default_factory=list)

    def add(
        self, base: Any, candidate: Any, nearest: Any = None, *, labels: Sequence[int] | Labels = ()
    ) -> Matrix:
        """Count rows [rows, columns] of both, float32 in numpy or torch, and give the matrix back.

        `nearest` is what plain rounding to the candidate's type makes of the base's rows, or of the first
        of them, where that is known; `labels` are the rows' numbers, those from 0 on by default.
        """
        width = CUDA_CHUNK
        if getattr(base, "is_cuda", None) is not True:
            base, candidate, width = np.asarray(base), np.asarray(candidate), CHUNK
            nearest = None if nearest is None else np.asarray(nearest)
        elif nearest is not None:
            nearest = base.new_tensor(nearest)
        base, candidate, nearest = (
            None if x is None else x.reshape(-1, x.shape[-1]) for x in (base, candidate, nearest)
        )
        numbers = np.asarray(labels, np.int64) if len(labels) else np.arange(len(base))
        found: list[Doubles] = []
        columns, energies = np.zeros((3, base.shape[1])), (0.0, 0.0)
        for rows in _cut(base.shape[0], base.shape[1], width):
            across, down = sums(base[rows], candidate[rows])
            signal, noise = _energies(across, base[rows], candidate[rows])
            found.append(across)
            columns += down  # one for each chunk would take more than the rows themselves
            energies = energies[0] + signal, energies[1] + noise
            if nearest is not None and rows.start < len(nearest):
                some = slice(rows.start, min(rows.stop, len(nearest)))
                self.rounded.append((numbers[some], nearest_sums(base[some], candidate[some], nearest[some])))
        if found:
            self.parts.append(_Part(numbers, np.concatenate(found, 1), columns, energies))
        return self

    def extend(self, other: Matrix) -> None:
        """Count the rows of another part too."""
        self.parts += other.parts
        self.rounded += other.rounded

    def against_nearest(self) -> NearestSums | None:
        """The sums of every row that was rounded, by number; None where none was."""
        if not self.rounded:
            return None
        labels = np.concatenate([part[0] for part in self.rounded])
        order = np.argsort(labels, kind="stable")
        return NearestSums(labels[order], *np.concatenate([part[1] for part in self.rounded], 1)[:, order])

    def rows(self) -> RowSums:
        """The sums of every row so far, by number."""
        labels = np.concatenate([part.labels for part in self.parts])
        order = np.argsort(labels, kind="stable")
        signal, noise, along, fourth = np.concatenate([part.rows for part in self.parts], 1)[:, order]
        return RowSums(labels[order], signal, noise, along, fourth, self.parts[0].columns.shape[1])

    @property
    def count(self) -> int:
        """The number of rows so far."""
        return sum(len(part.labels) for part in self.parts)

    @property
    def decibel(self) -> float:
        """Signal to noise of all of it, see figures.decibel."""
        signal, noise = (sum(part.energies[i] for part in self.parts) for i in (0, 1))
        return decibel(signal, noise)

    def columns(self) -> tuple[Doubles, Doubles, Doubles]:
        """Of each column w of the base, whose error is e: w.w, e.e and w.e, each row at length 1."""
        signal, noise, along = np.sum([part.columns for part in self.parts], 0)
        return signal, noise, along


def _cut(rows: int, columns: int, width: int) -> Iterator[slice]:
    step = max(1, width // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def sums(base: Any, candidate: Any) -> tuple[Doubles, Doubles]:
    """The four sums of RowSums [4, rows], and the three of `Matrix.columns` [3, columns]."""
    with np.errstate(all="ignore"):
        error = candidate - base
        square, noise, along = base * base, error * error, base * error
        signal = square.sum(1)
        rows = [signal, noise.sum(1), along.sum(1), (square * square).sum(1)]
        weight = 1 / (signal + (signal == 0))
        columns = [weight @ square, weight @ noise, weight @ along]
    return _doubles(rows), _doubles(columns)


def nearest_sums(base: Any, candidate: Any, made: Any) -> Doubles:
    """The six sums of NearestSums of rows [rows, columns] of the base, the candidate and the rounded base."""
    with np.errstate(all="ignore"):
        differences = (base, candidate - base, made - base, candidate - made, candidate, made)
        return _doubles([(x * x).sum(1) for x in differences])


def _energies(across: Doubles, base: Any, candidate: Any) -> tuple[float, float]:
    """The sums of squares of the base and of the error, in float64 where float32 breaks or sees nothing."""
    signal, noise = float(across[0].sum()), float(across[1].sum())
    if math.isfinite(signal + noise) and signal > 0 and (noise > 0 or bool((base == candidate).all())):
        return signal, noise
    b, q = (np.asarray(x.cpu() if hasattr(x, "cpu") else x, np.float64) for x in (base, candidate))
    with np.errstate(all="ignore"):
        return float(np.square(b).sum()), float(np.square(q - b).sum())


def snr(base: Any, candidate: Any) -> float:
    """Signal to noise of a whole tensor in dB; see figures.decibel."""
    return Matrix().add(base, candidate).decibel


def _doubles(values: list[Any]) -> Doubles:
    return np.stack([np.asarray(x.cpu() if hasattr(x, "cpu") else x, np.float64) for x in values])
