"""Reads the weights of two models side by side: they are compared, piece by piece, as they are read.

In memory are the block of the model that runs, and of a large matrix of the other one a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from dsconvert.decoder import torch_decoder as st
from dsconvert.models.weights import Floats
from dsconvert.proof.figures import TensorError
from dsconvert.proof.foretold import between, share
from dsconvert.proof.output_losses import LEAST_ROWS, Losses, errors_of, rounded
from dsconvert.proof.row_sums import Matrix
from dsconvert.proof.tensor_errors import tensor_error

if TYPE_CHECKING:
    import torch

PIECE = 1 << 24  # values of a matrix that are compared together: 64 MB in float32


@dataclass(frozen=True)
class Piece:
    """Some `rows` of a tensor of both models in float32, and what plain rounding `made` of the first ones.

    `rows` is None where they are all of it.
    """

    rows: slice | None
    base: torch.Tensor
    candidate: torch.Tensor
    made: Floats | None

    def errors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The errors of the rows that were rounded: the candidate's, and those of plain rounding."""
        if self.made is not None:
            yield errors_of(self.base, self.candidate, self.made)


@dataclass(frozen=True)
class Weights:
    """The weights of a reference and of a candidate; `tensors` are the errors of those that were compared."""

    pair: tuple[st.Decoder, ...]
    tensors: list[TensorError] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    errors: dict[str, TensorError] = field(default_factory=dict)  # of the block at hand
    kept: dict[str, torch.Tensor] = field(default_factory=dict)  # what the candidate has of it, if small
    watched: list[str] = field(default_factory=list)  # the matrix of an expert at hand

    def forget(self) -> None:
        """Drop what is kept of a block, before the next one."""
        self.losses.observers.clear()
        self.errors.clear()
        self.kept.clear()

    def note(self, names: tuple[str, str], matrix: Matrix) -> TensorError:
        """Keep the error of a tensor, and what is wrong with its rows; `names` are each model's."""
        sources, head_dim = (self.pair[0].source, self.pair[1].source), self.pair[0].config.head_dim
        error = tensor_error(sources, names, matrix, head_dim)
        self.tensors.append(error)
        self.errors[names[0]] = error
        return error

    def compared(self, name: str) -> torch.Tensor:
        """The reference's tensor in the type that it runs in; both are compared before they are rounded."""
        matrix, whole, only = Matrix(), None, None
        for piece in self._pieces(name):
            labels = range(piece.rows.start, piece.rows.stop) if piece.rows else ()
            matrix.add(piece.base, piece.candidate, piece.made, labels=labels)
            whole = self._placed(name, whole, piece.rows, piece.base)
            only = None if piece.rows else piece
        assert whole is not None  # there is a piece
        error = self.note((name, name), matrix)
        if only is not None:
            self.kept[name] = st.as_run(self.pair[1], name, only.candidate)
        if error.lost:
            own = None if only is None else list(only.errors())
            self.losses.watch(name, partial(self._errors, name) if own is None else partial(iter, own))
        return whole

    def expert(self, name: str) -> torch.Tensor:
        """As `compared`, of a matrix of an expert: what was kept of the last one is dropped."""
        for watched in self.watched:
            self.losses.observers.pop(watched, None)
        self.watched[:] = [name]
        found = self.compared(name)
        self.kept.pop(name, None)
        return found

    def candidate(self, name: str) -> torch.Tensor:
        """The candidate's tensor in the type that it runs in."""
        kept = self.kept.get(name)
        return st.read_as_run(self.pair[1], name) if kept is None else kept

    def share(self, name: str) -> float:
        """How much of the error of a tensor of the block at hand is foretold: of a vector's all or none."""
        error = self.errors[name]
        if len(error.shape) == 1:
            return float(error.snr == math.inf)
        return share(error.type, error.snr, error.lost, self.losses.ratio(error.name), error.fed)

    def foretold(self, name: str) -> torch.Tensor:
        """What the foretold model has of a tensor; the candidate's itself where that is the same."""
        part, whole = self.share(name), None
        if part in (0, 1):
            return self.candidate(name) if part else st.read_as_run(self.pair[0], name)
        for rows in self._cuts(name):
            base, candidate = (st.as_run(d, name, st.read(d, name, rows)) for d in self.pair)
            whole = self._placed(name, whole, rows, between(base, candidate, part))
        assert whole is not None  # there is a piece
        return whole

    def _cuts(self, name: str) -> list[slice] | list[None]:
        """The rows of each piece of a tensor."""
        shape = self.pair[0].shapes[name]
        if len(shape) == 1 or math.prod(shape) <= PIECE:
            return [None]
        step = max(LEAST_ROWS, PIECE // math.prod(shape[1:]))
        return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def _pieces(self, name: str) -> Iterator[Piece]:
        """The pieces of a tensor; they are rounded as long as all before them were, or the first was not."""
        going = True
        for rows in self._cuts(name):
            base, candidate = (st.read(decoder, name, rows) for decoder in self.pair)
            first, source = rows.start if rows else 0, self.pair[1].source
            made = rounded(source, name, first, base, candidate, every=first > 0) if going else None
            yield Piece(rows, base, candidate, made)
            going = made is not None and len(made) == len(base)

    def _errors(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The errors of the rows of a large matrix that were rounded, read again."""
        for piece in self._pieces(name):
            yield from piece.errors()
            if piece.made is None or len(piece.made) < len(piece.base):
                return

    def _placed(
        self, name: str, whole: torch.Tensor | None, rows: slice | None, values: torch.Tensor
    ) -> torch.Tensor:
        """`values` as they run, put at the `rows` of the `whole`, which is made for the first of them."""
        values = st.as_run(self.pair[0], name, values)
        if rows is None:
            return values
        whole = values.new_empty(self.pair[0].shapes[name]) if whole is None else whole
        whole[rows] = values
        return whole
