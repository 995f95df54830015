"""The figures of predictions while the vocabulary goes by in slices, so that no head is whole in memory.

A prediction's logits are never held together: logarithms of sums, the divergence and the likeliest tokens are
carried from slice to slice (the running maximum and sum of online softmax; Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsconvert.decoder import torch_decoder as st
from dsconvert.events import BlockRun, Event
from dsconvert.proof.figures import TOP
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    import torch


@dataclass
class Side:
    """One model's sums over the slices so far, each [tokens] in float64; `best` are its likeliest tokens."""

    largest: torch.Tensor
    total: torch.Tensor
    target: torch.Tensor
    best: torch.Tensor  # [tokens, TOP] logits
    tokens: torch.Tensor  # and their ids
    top: torch.Tensor


@dataclass
class Scores:
    """The figures of predictions of `targets` [tokens], gathered by `add` and given by `columns`."""

    targets: torch.Tensor
    vocab: int
    sides: list[Side] = field(init=False)
    cross: torch.Tensor = field(init=False)  # sum of exp(base - largest) * (base - q)

    def __post_init__(self) -> None:
        import torch

        count, width = len(self.targets), min(TOP, self.vocab)
        values: dict[str, Any] = {"dtype": torch.float64, "device": self.targets.device}
        ids: dict[str, Any] = {"dtype": torch.int64, "device": self.targets.device}
        self.cross = torch.zeros(count, **values)
        self.sides = [
            Side(
                largest=torch.full((count,), -torch.inf, **values),
                total=torch.zeros(count, **values),
                target=torch.zeros(count, **values),
                best=torch.full((count, width), -torch.inf, **values),
                tokens=torch.full((count, width), -1, **ids),
                top=torch.zeros(count, **ids),
            )
            for _ in range(2)
        ]

    def add(self, rows: slice, first: int, base: torch.Tensor, candidate: torch.Tensor) -> None:
        """Count the logits [rows, slice] of the tokens of the vocabulary from `first` on, of both models."""
        base, candidate = base.double(), candidate.double()
        part = base - candidate
        weights, scale = self._add_side(self.sides[0], rows, first, base)
        self.cross[rows] = self.cross[rows] * scale + part.mul_(weights).sum(-1)
        self._add_side(self.sides[1], rows, first, candidate)

    def _add_side(
        self, side: Side, rows: slice, first: int, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(logits - the largest so far), and what the sums so far were multiplied by."""
        import torch

        value, index = logits.max(-1)
        before = side.largest[rows]
        side.top[rows] = index.add(first).where(value > before, side.top[rows])
        largest = before.maximum(value)
        scale = (before - largest).exp()
        weights = (logits - largest[:, None]).exp_()
        side.total[rows] = side.total[rows] * scale + weights.sum(-1)
        side.largest[rows] = largest
        place = self.targets[rows] - first
        inside = (place >= 0) & (place < logits.shape[1])
        own = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        side.target[rows] = own.where(inside, side.target[rows])
        width = side.best.shape[1]
        new, places = logits.topk(min(width, logits.shape[1]))
        both = torch.cat([side.best[rows], new], 1), torch.cat([side.tokens[rows], places + first], 1)
        side.best[rows], order = both[0].topk(width)
        side.tokens[rows] = both[1].gather(1, order)
        return weights, scale

    def columns(self) -> dict[str, Any]:
        """The measured columns of TokenFigures; the same as `figures.token_figures` of whole logits."""
        base, candidate = self.sides
        logs = [side.largest + side.total.log() for side in self.sides]
        kld = self.cross / base.total - (logs[0] - logs[1])
        same = (base.tokens[:, :, None] == candidate.tokens[:, None, :]).any(-1)
        columns = {
            "nll_base": logs[0] - base.target,
            "nll": logs[1] - candidate.target,
            "kld": kld.clamp(min=0.0),
            "top_base": base.top,
            "top": candidate.top,
            "overlap": same.double().mean(-1),
        }
        return {name: column.cpu().numpy() for name, column in columns.items()}


def scored_states(
    decoder: st.Decoder, norm: torch.Tensor, hidden: torch.Tensor, windows: Windows
) -> torch.Tensor:
    """Of states [n, length, d] those whose predictions are scored, after the final norm: [tokens, d]."""
    import torch

    places = windows.all_places()
    at = tuple(torch.from_numpy(places[name]).to(hidden.device) for name in ("window", "position"))
    return st.normed(decoder, norm, hidden[at])


def hidden_states(
    decoder: st.Decoder,
    windows: Windows,
    observers: Callable[[st.Block], Mapping[str, st.Observer]] | None = None,
) -> Generator[Event, None, torch.Tensor]:
    """One model's states [n, length, d] after the last block, a BlockRun for each; see run_block."""
    hidden = st.embed(st.read(decoder, st.EMBED), windows.tokens, decoder.dtype)
    for index in range(decoder.config.layers):
        block = st.load_block(decoder, index)
        hidden = st.run_block(decoder, block, hidden, observers(block) if observers else None)
        yield BlockRun(index, decoder.config.layers)
    return hidden
