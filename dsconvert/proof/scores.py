"""The figures of predictions while the vocabulary goes by in slices, so that no head is whole in memory.

A prediction's logits are never held together: logarithms of sums, the divergence and the likeliest tokens are
carried from slice to slice (the running maximum and sum of online softmax; Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.experts import Observer
from dsconvert.events import BlockRun, Event
from dsconvert.proof.figures import TOP, Foretold, mean
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

    @property
    def logarithm(self) -> torch.Tensor:
        """The logarithm of the sum of the logits' exponentials."""
        return self.largest + self.total.log()


@dataclass
class Scores:
    """The figures of predictions of `targets` [tokens], gathered by `add` and given by `columns`.

    Of the base, the candidate and, of three `models`, the foretold one.
    """

    targets: torch.Tensor
    vocab: int
    models: int = 2
    sides: list[Side] = field(init=False)
    # Of each pair of models (p, q) the sum of exp(p - largest) * (p - q).
    cross: dict[tuple[int, int], torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        import torch

        count, width = len(self.targets), min(TOP, self.vocab)
        values: dict[str, Any] = {"dtype": torch.float64, "device": self.targets.device}
        ids: dict[str, Any] = {"dtype": torch.int64, "device": self.targets.device}
        pairs = ((0, 1), (0, 2), (2, 1))[: 1 if self.models == 2 else 3]
        self.cross = {pair: torch.zeros(count, **values) for pair in pairs}
        self.sides = [
            Side(
                largest=torch.full((count,), -torch.inf, **values),
                total=torch.zeros(count, **values),
                target=torch.zeros(count, **values),
                best=torch.full((count, width), -torch.inf, **values),
                tokens=torch.full((count, width), -1, **ids),
                top=torch.zeros(count, **ids),
            )
            for _ in range(self.models)
        ]

    def add(self, rows: slice, first: int, *logits: torch.Tensor) -> None:
        """Count the logits [rows, slice] of the tokens of the vocabulary from `first` on, of every model."""
        values = [x.double() for x in logits]
        for side, own in enumerate(values):
            weights, scale = self._add_side(self.sides[side], rows, first, own)
            for (one, other), total in self.cross.items():
                if one == side:
                    total[rows] = total[rows] * scale + (own - values[other]).mul_(weights).sum(-1)

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

    def kld(self, one: int, other: int) -> torch.Tensor:
        """KL(one || other) of each prediction, in nats."""
        logs = self.sides[one].logarithm - self.sides[other].logarithm
        return (self.cross[one, other] / self.sides[one].total - logs).clamp(min=0.0)

    def columns(self) -> dict[str, Any]:
        """The measured columns of TokenFigures; the same as `figures.token_figures` of whole logits."""
        base, candidate = self.sides[:2]
        same = (base.tokens[:, :, None] == candidate.tokens[:, None, :]).any(-1)
        columns = {
            "nll_base": base.logarithm - base.target,
            "nll": candidate.logarithm - candidate.target,
            "kld": self.kld(0, 1),
            "top_base": base.top,
            "top": candidate.top,
            "overlap": same.double().mean(-1),
        }
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def foretold(self) -> Foretold:
        """What the third model foretells."""
        kld, apart = (self.kld(*pair).cpu().numpy() for pair in ((0, 2), (2, 1)))
        return Foretold(mean(kld), mean(apart))


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
    observers: Callable[[st.Block], Mapping[str, Observer]] | None = None,
) -> Generator[Event, None, torch.Tensor]:
    """One model's states [n, length, d] after the last block, a BlockRun for each; see run_block."""
    hidden = st.embed(st.read(decoder, st.EMBED), windows.tokens, decoder.dtype)
    for index in range(decoder.config.layers):
        block = st.load_block(decoder, index)
        hidden = st.run_block(decoder, block, hidden, observers(block) if observers else None)
        yield BlockRun(index, decoder.config.layers)
    return hidden
