"""Compares two models over the same text, block by block, side by side.

The models are WeightSources, so a checkpoint can be held against any format, with no target runtime. Each
pair of blocks is read, compared, used and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.experts import Load, streamed
from dsconvert.decoder.torch_config import same_arithmetic
from dsconvert.events import BlockCompared, Event, Step
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource
from dsconvert.proof.config_differences import check_sizes, differences
from dsconvert.proof.figures import (
    BlockError,
    Estimate,
    Figures,
    Foretold,
    IntArray,
    TensorError,
    TokenFigures,
    hidden_error,
    summary,
)
from dsconvert.proof.foretold import between, share_of
from dsconvert.proof.output_losses import rounded
from dsconvert.proof.row_sums import Matrix
from dsconvert.proof.scores import Scores, scored_states
from dsconvert.proof.side_by_side import Weights
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    `figures` and `tokens` are None when a model broke, and `broken` says where; or when only a sample of
    blocks ran. `config` are the differences of the two configs. `states` [tokens, d], kept when asked, are
    the reference's after the final norm: times its head they are its logits. `foretold` says what the
    figures should be by the errors of the weights. `routed` says of each layer of experts that ran how many
    tokens there were, and how many of them went to others than the reference's.
    """

    figures: Figures | None
    tokens: TokenFigures | None
    blocks: tuple[BlockError, ...]
    tensors: tuple[TensorError, ...]
    config: tuple[str, ...] = ()
    broken: str = ""
    routed: tuple[tuple[int, int], ...] = ()
    states: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    foretold: Foretold | None = None


def result(run: Generator[Event, None, Result]) -> Result:
    """Run a generator of events to its end and return its value, dropping the events."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            value: Result = end.value
            return value


def compare(
    reference: WeightSource,
    candidate: WeightSource,
    config: ModelConfig,
    windows: Windows,
    *,
    candidate_config: ModelConfig | None = None,
    device: str = "auto",
    dtype: str | None = None,
    token_bytes: IntArray | None = None,
    keep_states: bool = False,
) -> Generator[Event, None, Comparison]:
    """Run both models over the windows and compare every tensor, block and scored prediction.

    `candidate_config` is what the candidate's own file states, the reference's when None. Yields Step and
    BlockCompared, returns the Comparison. A model that computes a value that is not a number ends the run and
    is named in `broken`. Raises PlanError and CheckpointError when a source cannot be run at all, and
    UsageError for a device, a dtype, or token ids outside the vocabulary.
    """
    other = candidate_config or config
    check_sizes(config, other)
    place = st.pick_device(device)
    kind = st.pick_dtype(dtype, place)
    sides = (reference, config), (candidate, other)
    pair = tuple(streamed(st.open_decoder(*side, place, kind)) for side in sides)
    run = Run(pair, windows, differences(*map(st.numbers, pair)), Weights(pair))
    name = str(kind).removeprefix("torch.")
    yield Step(f"comparing {config.layers} blocks over {windows.tokens.size} tokens on {place} in {name}")
    hidden = run.embed()
    for index in range(config.layers):
        hidden = run.apply(index, hidden)
        if broken := run.broken(hidden, f"after block {index}"):
            return run.ended(broken)
        error = run.compare_hidden(index, hidden)
        yield BlockCompared(index, config.layers, error.relative, error.cosine)
    yield Step(f"scoring {windows.scored} predictions")
    states = run.final_states(hidden)
    tokens, foretold, broken = run.score(states)
    if tokens is None:
        return run.ended(broken)
    figures = summary(tokens, token_bytes)
    foretold = foretold or Foretold(figures.kld, Estimate(0.0, 0.0))
    found = replace(run.ended(""), figures=figures, tokens=tokens, foretold=foretold)
    return replace(found, states=(states[0], states[1])) if keep_states else found


@dataclass(frozen=True)
class Run:
    """A comparison under way: the two decoders and what has been found so far.

    Beside them goes the foretold model (see `foretold`), by the states that are the third of each list: the
    candidate's own where it is that model.
    """

    pair: tuple[st.Decoder, ...]
    windows: Windows
    config: tuple[str, ...]
    weights: Weights
    blocks: list[BlockError] = field(default_factory=list)
    routed: list[tuple[int, int]] = field(default_factory=list)  # see Comparison

    def ended(self, broken: str) -> Comparison:
        """The comparison without figures, as it stands."""
        tensors = self.weights.losses.noted(self.weights.tensors)
        routed = tuple(self.routed)
        return Comparison(None, None, tuple(self.blocks), tensors, self.config, broken, routed=routed)

    def broken(self, values: list[torch.Tensor], where: str) -> str:
        """Which of the two computed a value that is not finite, if either did."""
        for who, tensor in zip(("the reference", "the candidate"), values, strict=False):
            if not st.finite(tensor):
                return f"{who} gives non-finite values {where}"
        return ""

    @cached_property
    def alike(self) -> bool:
        """Whether both decoders do the same to the same weights and states."""
        base, candidate = self.pair
        scores = (st.numbers(decoder).softmax for decoder in self.pair)
        same = same_arithmetic(base.library, base.rotary, candidate.library, candidate.rotary)
        return same and math.isclose(*scores, rel_tol=1e-6)

    def apply(self, index: int, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """What block `index` of each model makes of its states; its tensors are compared too."""
        weights, base = self.weights, self.pair[0]
        weights.forget()
        chosen: list[torch.Tensor] = []
        loads = (weights.compared, weights.expert), (weights.candidate, weights.candidate)
        out = [self.run(side, index, hidden[side], loads[side], chosen) for side in (0, 1)]
        self.compare_routes(index, chosen)
        names = [*base.blocks[index].values(), *(name for names in base.experts[index] for name in names)]
        same = all(weights.share(name) == 1 for name in names)
        if hidden[2] is hidden[1] and self.alike and same:
            return [*out, out[1]]
        return [*out, self.run(0, index, hidden[2], (weights.foretold, weights.foretold))]

    def run(
        self,
        side: int,
        index: int,
        hidden: torch.Tensor,
        loads: tuple[Load, Load],
        chosen: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """States after block `index` of one of the pair; `loads` give its own matrices and its experts'.

        With `chosen`, which takes the experts that tokens went to, the reference's inputs are observed too.
        """
        decoder = self.pair[side]
        own = {name: loads[0](name) for name in decoder.blocks[index].values()}
        block = st.assemble_block(decoder, index, own, loads[1])
        observers = self.weights.losses.observers if chosen is not None and not side else {}
        out = st.run_block(decoder, block, hidden, observers)
        if chosen is not None and block.experts and block.experts.chosen is not None:
            chosen.append(block.experts.chosen)
        return out

    def compare_routes(self, index: int, chosen: list[torch.Tensor]) -> None:
        """Count the tokens that both went to other experts, and compare the experts that none came to."""
        if not chosen:
            return
        one, other = chosen
        turned = len(one) if one.shape != other.shape else int(one.ne(other).any(-1).sum())
        self.routed.append((len(one), turned))
        for names in self.pair[0].experts[index]:
            for name in names:
                if name not in self.weights.errors:
                    self.weights.expert(name)

    def compare_hidden(self, index: int, hidden: list[torch.Tensor]) -> BlockError:
        """The error of the states after block `index`, noted too."""

        def error(states: torch.Tensor) -> tuple[float, float]:
            parts = [
                hidden_error(hidden[0][rows], states[rows])
                for rows in st.batches(self.pair[0], len(states), self.windows.length)
            ]
            relative, cosine = (
                np.concatenate([part[i].cpu().numpy().ravel() for part in parts]) for i in (0, 1)
            )
            return float(relative.mean(dtype=np.float64)), float(cosine.mean(dtype=np.float64))

        relative, cosine = error(hidden[1])
        due = relative if hidden[2] is hidden[1] else error(hidden[2])[0]
        self.blocks.append(BlockError(index, relative, cosine, foretold=due))
        return self.blocks[-1]

    def embed(self) -> list[torch.Tensor]:
        """The windows' hidden states before the first block; both tables are read and compared in slices."""
        import torch

        used, places = np.unique(self.windows.tokens, return_inverse=True)
        places = places.reshape(self.windows.tokens.shape)
        config, matrix = self.pair[0].config, Matrix()
        st.check_ids(self.windows.tokens, config.vocab_size)
        parts: tuple[list[torch.Tensor], ...] = ([], [])
        for rows in st.slices(config.vocab_size, config.hidden_size):
            both = [st.read(decoder, st.EMBED, rows) for decoder in self.pair]
            made = rounded(self.pair[1].source, st.EMBED, rows.start, both[0], both[1])
            matrix.add(both[0], both[1], made, labels=range(rows.start, rows.stop))
            wanted = torch.from_numpy(used[(used >= rows.start) & (used < rows.stop)] - rows.start)
            for part, table in zip(parts, both, strict=True):
                part.append(table[wanted.to(table.device)])
        self.weights.note((st.EMBED, st.EMBED), matrix)
        base, candidate = (st.embed(torch.cat(part), places, self.pair[0].dtype) for part in parts)
        return [base, candidate, between(base, candidate, self.weights.share(st.EMBED))]

    def final_states(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Every model's states [tokens, d] where predictions are scored, normed; `hidden` is emptied."""
        norms = self.weights.compared(st.NORM), self.weights.candidate(st.NORM)
        same = hidden[2] is hidden[1] and self.alike and bool((norms[0] == norms[1]).all())
        states = [
            scored_states(decoder, norm, hidden.pop(0), self.windows)
            for decoder, norm in zip(self.pair, norms, strict=True)
        ]
        third = hidden.pop()
        return [*states, states[1] if same else scored_states(self.pair[0], norms[0], third, self.windows)]

    def score(
        self, states: list[torch.Tensor], models: int = 2
    ) -> tuple[TokenFigures | None, Foretold | None, str]:
        """The figures of every scored prediction and what is foretold of them, or who broke.

        The heads go by in slices. A tied pair's error is the embedding's, noted already. Where the candidate
        is the foretold model, nothing else is foretold than its figures, and no third of the `models` runs.
        """
        import torch

        if models == 2 and states[2] is not states[1]:
            return self.score(states, 3)
        places: dict[str, Any] = self.windows.all_places()
        names, config, matrix = (self.pair[0].head, self.pair[1].head), self.pair[0].config, Matrix()
        kind = self.pair[1].source.dtype(names[1])
        scores = Scores(torch.from_numpy(places["target"]).to(states[0].device), config.vocab_size, models)
        for part in st.slices(config.vocab_size, config.hidden_size):
            both = [st.read(decoder, name, part) for decoder, name in zip(self.pair, names, strict=True)]
            made = rounded(self.pair[1].source, names[1], part.start, both[0], both[1])
            own = Matrix().add(both[0], both[1], made, labels=range(part.start, part.stop))
            matrix.extend(own)
            base, candidate = (head.to(self.pair[0].dtype) for head in both)
            heads = base, candidate, between(base, candidate, share_of(own, kind))
            if models == 2 and heads[2] is not candidate:
                return self.score(states, 3)
            for rows in st.chunks(0, len(states[0]), len(base)):
                logits = [(x[rows] @ head.T).float() for x, head in zip(states[:models], heads, strict=False)]
                if broken := self.broken(logits, f"as logits in window {places['window'][rows.start]}"):
                    return None, None, broken
                scores.add(rows, part.start, *logits)
        if names != (st.EMBED, st.EMBED):
            self.weights.note(names, matrix)
        return TokenFigures(**places, **scores.columns()), scores.foretold() if models == 3 else None, ""
