"""Compares two models over the same text, block by block, side by side.

The models are WeightSources, so a checkpoint can be held against any format, with no target runtime. Each
pair of blocks is read, compared, used and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.numpy_config import Numbers
from dsconvert.decoder.torch_config import read_numbers
from dsconvert.errors import CheckpointError
from dsconvert.events import BlockCompared, Check, Event, Step
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource, widened
from dsconvert.proof.figures import (
    BlockError,
    Figures,
    IntArray,
    TensorError,
    TokenFigures,
    hidden_error,
    summary,
)
from dsconvert.proof.nearest_rows import lost
from dsconvert.proof.output_losses import Losses, rounded
from dsconvert.proof.row_faults import Floats, faults
from dsconvert.proof.row_sums import Matrix
from dsconvert.proof.scores import Scores, scored_states
from dsconvert.proof.thresholds import (
    Thresholds,
    Verdict,
    judge_blocks,
    judge_figures,
    judge_tensors,
    verdict,
)
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
ROPE_CLOSE = 1e-5  # relative; float32 arithmetic of two programs differs by less


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    `figures` and `tokens` are None when a model broke, and `broken` says where; or when only a sample of
    blocks ran. `config` are the differences of the two configs. `states` [tokens, d], kept when asked, are
    the reference's after the final norm: times its head they are its logits.
    """

    figures: Figures | None
    tokens: TokenFigures | None
    blocks: tuple[BlockError, ...]
    tensors: tuple[TensorError, ...]
    config: tuple[str, ...] = ()
    broken: str = ""
    states: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False, compare=False)


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
    pair = (st.open_decoder(reference, config, place, kind), st.open_decoder(candidate, other, place, kind))
    run = Run(pair, windows, differences(*map(st.numbers, pair)), [], [])
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
    tokens, broken = run.score(states)
    if tokens is None:
        return run.ended(broken)
    found = replace(run.ended(""), figures=summary(tokens, token_bytes), tokens=tokens)
    return replace(found, states=(states[0], states[1])) if keep_states else found


def differences(reference: Numbers, candidate: Numbers) -> tuple[str, ...]:
    """The numbers that a runtime goes by and that differ; floats as float32 can hold them."""
    names = ("norm_eps", "heads", "kv_heads", "head_dim", "context_length")
    found = [text] if (text := rope_difference(reference, candidate)) else []
    for name in names:
        a, b = getattr(reference, name), getattr(candidate, name)
        if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6):
            continue
        if a != b:
            found.append(f"{name} is {b}, the reference has {a}")
    return tuple(found)


def config_differences(reference: ModelConfig, candidate: ModelConfig) -> tuple[str, ...]:
    """The `differences` of two files where no decoder is run."""
    return differences(read_numbers(reference), read_numbers(candidate))


def rope_difference(one: Numbers, other: Numbers) -> str:
    """What differs in the two decoders' RoPE angles, or nothing."""
    same = one.angles.shape == other.angles.shape and np.allclose(one.angles, other.angles, ROPE_CLOSE, 0.0)
    if same and math.isclose(one.scale, other.scale, rel_tol=ROPE_CLOSE):
        return ""
    if one.rope_theta != other.rope_theta:
        return f"rope_theta is {other.rope_theta}, the reference has {one.rope_theta}"
    if same:
        return f"RoPE's attention factor is {other.scale:g}, the reference has {one.scale:g}"
    return f"RoPE scaling is {other.rope}, the reference has {one.rope}"


def judge(comparison: Comparison, limits: Thresholds) -> Verdict:
    """Hold a comparison against the limits: figures, every tensor, config; a broken model fails."""
    checks = judge_config(comparison.config)
    checks += judge_tensors(comparison.tensors)
    checks += judge_blocks(comparison.blocks, limits)
    if comparison.broken:
        checks.append(Check("finite", False, comparison.broken))
    if comparison.figures is not None:
        checks += judge_figures(comparison.figures, limits)
    return verdict(checks)


def judge_config(found: tuple[str, ...]) -> list[Check]:
    """One check for each of `differences`, or one that says that there are none."""
    equal = Check("config", True, "sizes, RoPE, norm and context are those of the checkpoint's config")
    return [Check("config", False, text) for text in found] or [equal]


# Sizes on which the shapes of tensors depend.
SIZES = {"layers": "layers", "d": "hidden_size", "v": "vocab_size", "ff": "intermediate_size"}
SIZES |= {"q": "the width of the queries", "kv": "the width of keys and values"}


def check_sizes(reference: ModelConfig, candidate: ModelConfig, but: Collection[str] = ()) -> None:
    """Raises CheckpointError when the two cannot be the same model; the SIZES of `but` may differ."""
    for key, name in SIZES.items():
        a, b = reference.dims[key], candidate.dims[key]
        if a != b and key not in but:
            raise CheckpointError(
                "the two are not the same model",
                why=f"{name} is {b}, the reference has {a}",
                hint="Give the checkpoint that the output was made from",
            )


def tensor_error(
    sources: tuple[WeightSource, WeightSource], names: tuple[str, str], matrix: Matrix, head_dim: int
) -> TensorError:
    """What the sums over a tensor of both sources say; its rows count where it is a matrix."""
    kind, shape = sources[1].dtype(names[1]), sources[1].shapes()[names[1]]
    if len(shape) != 2:
        return TensorError(names[1], kind, shape, matrix.decibel)
    rounded = matrix.against_nearest()

    def again(row: int) -> tuple[Floats, Floats]:
        base, candidate = (widened(s.rows(n, row, row + 1)) for s, n in zip(sources, names, strict=True))
        return base[0], candidate[0]

    found = faults(matrix, names[1], kind, head_dim, again)
    less = None if rounded is None else lost(rounded, kind)
    return TensorError(names[1], kind, shape, matrix.decibel, matrix.count, found, less)


@dataclass(frozen=True)
class Run:
    """A comparison under way: the two decoders and what has been found so far."""

    pair: tuple[st.Decoder, st.Decoder]
    windows: Windows
    config: tuple[str, ...]
    blocks: list[BlockError]
    tensors: list[TensorError]
    losses: Losses = field(default_factory=Losses)

    def ended(self, broken: str) -> Comparison:
        """The comparison without figures, as it stands."""
        tensors = self.losses.noted(self.tensors)
        return Comparison(None, None, tuple(self.blocks), tensors, self.config, broken)

    def broken(self, values: list[torch.Tensor], where: str) -> str:
        """Which of the two computed a value that is not finite, if either did."""
        for who, tensor in zip(("the reference", "the candidate"), values, strict=True):
            if not st.finite(tensor):
                return f"{who} gives non-finite values {where}"
        return ""

    def read(self, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same tensor of both, in the decoders' dtype, its error noted before it is rounded to it."""
        base, candidate = (st.read(d, name) for d, name in zip(self.pair, names, strict=True))
        made = rounded(self.pair[1].source, names[1], 0, base, candidate)
        self.note(names, Matrix().add(base, candidate, made))
        if made is not None and self.tensors[-1].lost:
            self.losses.watch(names[0], base, candidate, made)
        dtype = self.pair[0].dtype
        return base.to(dtype), candidate.to(dtype)

    def apply(self, index: int, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """What block `index` of both makes of their hidden states; its tensors are compared too."""
        self.losses.observers.clear()
        both = {name: self.read(name, name) for name in self.pair[0].blocks[index].values()}
        out = []
        for side, decoder in enumerate(self.pair):
            block = st.assemble_block(decoder, index, {name: pair[side] for name, pair in both.items()})
            out.append(st.run_block(decoder, block, hidden[side], {} if side else self.losses.observers))
        return out

    def compare_hidden(self, index: int, hidden: list[torch.Tensor]) -> BlockError:
        """The error of the states after block `index`, noted too."""
        parts = [
            hidden_error(hidden[0][rows], hidden[1][rows])
            for rows in st.batches(self.pair[0], len(hidden[0]), self.windows.length)
        ]
        relative, cosine = (
            float(np.concatenate([part[i].cpu().numpy().ravel() for part in parts]).mean(dtype=np.float64))
            for i in (0, 1)
        )
        self.blocks.append(BlockError(index, relative, cosine))
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
        self.note((st.EMBED, st.EMBED), matrix)
        return [st.embed(torch.cat(part), places, self.pair[0].dtype) for part in parts]

    def note(self, names: tuple[str, ...], matrix: Matrix) -> None:
        """Keep the error of a tensor, and what is wrong with its rows; `names` are each model's."""
        sources = self.pair[0].source, self.pair[1].source
        head_dim = self.pair[0].config.head_dim
        self.tensors.append(tensor_error(sources, (names[0], names[1]), matrix, head_dim))

    def final_states(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Both models' states [tokens, d] where predictions are scored, normed; `hidden` is emptied."""
        norms = self.read(st.NORM, st.NORM)
        return [
            scored_states(decoder, norm, hidden.pop(0), self.windows)
            for decoder, norm in zip(self.pair, norms, strict=True)
        ]

    def score(self, states: list[torch.Tensor]) -> tuple[TokenFigures | None, str]:
        """The figures of every scored prediction, or who broke.

        Both heads go by in slices. A tied pair's error is the embedding's, noted already.
        """
        import torch

        places: dict[str, Any] = self.windows.all_places()
        config, matrix = self.pair[0].config, Matrix()
        scores = Scores(torch.from_numpy(places["target"]).to(states[0].device), config.vocab_size)
        for part in st.slices(config.vocab_size, config.hidden_size):
            heads = [st.read(decoder, decoder.head, part) for decoder in self.pair]
            made = rounded(self.pair[1].source, self.pair[1].head, part.start, heads[0], heads[1])
            matrix.add(heads[0], heads[1], made, labels=range(part.start, part.stop))
            heads = [head.to(self.pair[0].dtype) for head in heads]
            for rows in st.chunks(0, len(states[0]), len(heads[0])):
                both = [(x[rows] @ head.T).float() for x, head in zip(states, heads, strict=True)]
                if broken := self.broken(both, f"as logits in window {places['window'][rows.start]}"):
                    return None, broken
                scores.add(rows, part.start, both[0], both[1])
        names = self.pair[0].head, self.pair[1].head
        if names != (st.EMBED, st.EMBED):
            self.note(names, matrix)
        return TokenFigures(**places, **scores.columns()), ""
