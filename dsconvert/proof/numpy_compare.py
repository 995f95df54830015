"""The quick comparison of a conversion: in numpy, on the CPU, read by threads, so that it begins at once.

What `compare.compare` and `block_sample.compare_blocks` find with torch, found without it. See numpy_decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from dsconvert.decoder import numpy_decoder
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.numpy_config import Floats, Numbers, Unread, numbers
from dsconvert.decoder.numpy_decoder import EMBED, NORM
from dsconvert.events import BlockCompared, Event
from dsconvert.machine import usable_cores
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource, widened
from dsconvert.proof.compare import Comparison
from dsconvert.proof.config_differences import check_sizes, differences
from dsconvert.proof.effort import Effort
from dsconvert.proof.figures import BlockError, Foretold, IntArray, TensorError, joined, mean, summary
from dsconvert.proof.foretold import between, share
from dsconvert.proof.numpy_figures import hidden_error, kld, length, token_figures
from dsconvert.proof.output_losses import Losses, errors_of, rounded
from dsconvert.proof.row_sums import Matrix
from dsconvert.proof.tensor_errors import tensor_error
from dsconvert.texts.windows import Windows

Pair = tuple[Floats, Floats]
CHUNK = 1 << 18  # values of a matrix that are read at a time


def compare_in_numpy(
    reference: WeightSource,
    candidate: WeightSource,
    config: ModelConfig,
    chosen: Effort,
    candidate_config: ModelConfig | None = None,
    threads: int = 0,
    token_bytes: IntArray | None = None,
) -> Generator[Event, None, Comparison]:
    """Run what was chosen of both models over the windows; the same findings as with torch.

    All blocks and the logits, or the chosen blocks in their order, each on the reference's input (see
    block_sample.compare_blocks). `threads` read the weights, by default one on each core. Yields
    BlockCompared. Raises CheckpointError, PlanError when the two cannot be the same model, and Unread where
    transformers' own code is needed.
    """
    other = candidate_config or config
    check_sizes(config, other)
    st.check_ids(chosen.windows.tokens, config.vocab_size)
    names, heads = zip(
        *(numpy_decoder.tensor_names(*side) for side in ((reference, config), (candidate, other))),
        strict=True,
    )
    pair = read_both(config, other, chosen.windows)
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        run = _Run((reference, candidate), pair, names[0], chosen.windows, pool)
        run.config += differences(*pair)
        if chosen.blocks is None:
            return (yield from run.whole(heads, token_bytes))
        return (yield from run.sample(chosen.blocks))


def read_both(config: ModelConfig, other: ModelConfig, windows: Windows) -> tuple[Numbers, Numbers]:
    """Both models' numbers, each by its own file; raises Unread where numpy is not enough."""
    pair = numbers(config), numbers(other)
    if windows.length > min(pair[0].within, pair[1].within):
        raise Unread("max_position_embeddings")
    return pair


def knows(config: ModelConfig, other: ModelConfig, windows: Windows) -> bool:
    """Whether the numpy decoder knows every key of both models' config."""
    try:
        read_both(config, other, windows)
    except Unread:
        return False
    return True


@dataclass
class _Run:
    sources: tuple[WeightSource, WeightSource]
    numbers: tuple[Numbers, Numbers]
    names: tuple[dict[str, str], ...]
    windows: Windows
    pool: ThreadPoolExecutor
    config: tuple[str, ...] = ()
    room: Pair | None = None
    blocks: list[BlockError] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    tensors: dict[tuple[str, str], TensorError] = field(default_factory=dict)

    def whole(
        self, heads: tuple[str, str], token_bytes: IntArray | None
    ) -> Generator[Event, None, Comparison]:
        """Every block on its own model's states, then the logits of every scored prediction."""
        tables = self.read([EMBED])[EMBED]
        hidden = [table[self.windows.tokens] for table in tables]
        hidden.append(between(hidden[0], hidden[1], self.share(EMBED, EMBED)))
        for index in range(len(self.names)):
            hidden = self.apply(index, hidden)
            if broken := _broken(hidden, f"after block {index}"):
                return self.ended(broken)
            relative, cosine = hidden_error(*hidden[:2])
            due, _ = hidden_error(hidden[0], hidden[2])
            self.blocks.append(BlockError(index, relative, cosine, foretold=due))
            yield BlockCompared(index, len(self.names), relative, cosine)
        norms = self.read([NORM])[NORM]
        tied = heads == (EMBED, EMBED)
        matrices = tables if tied else self.read_pair(*heads)
        third = between(*matrices, self.share(*heads))
        parts_of = (*self.numbers, self.numbers[0]), (*norms, norms[0]), (*matrices, third)
        models = tuple(zip(*parts_of, strict=True))
        parts, klds = [], []
        for window, first in enumerate(self.windows.first.tolist()):
            rows = slice(first, self.windows.length - 1)
            logits = [
                numpy_decoder.logits(x[window, rows], norm, head, numbers.norm_eps)
                for x, (numbers, norm, head) in zip(hidden, models, strict=True)
            ]
            if broken := _broken(logits, f"as logits in window {window}"):
                return self.ended(broken)
            columns = token_figures(logits[0], logits[1], self.windows.targets(window, rows))
            klds.append(np.stack([kld(logits[0], logits[2]), kld(logits[2], logits[1])]))
            parts.append(columns | self.windows.places(window, rows))
        tokens = joined(parts)
        foretold = Foretold(*(mean(column) for column in np.concatenate(klds, 1)))
        return replace(self.ended(""), figures=summary(tokens, token_bytes), tokens=tokens, foretold=foretold)

    def sample(self, blocks: tuple[int, ...]) -> Generator[Event, None, Comparison]:
        """Block 0 on the embedded text, the others on what the reference's block 0 made of it."""
        start = self.embedded()
        for index in blocks:
            base, candidate, foretold = self.stream(index, [start, start, start])
            if broken := _broken([base, candidate], f"after block {index}"):
                return self.ended(broken)
            relative, cosine = hidden_error(base, candidate)
            size = np.maximum(length(base - start), 1e-38)
            updates = (float(np.mean(length(made - base) / size)) for made in (candidate, foretold))
            self.blocks.append(BlockError(index, relative, cosine, *updates))
            yield BlockCompared(index, len(self.names), relative, cosine)
            start = base if index == 0 else start
        return self.ended("")

    def ended(self, broken: str) -> Comparison:
        """The comparison without figures, as it stands."""
        tensors = self.losses.noted(sorted(self.tensors.values(), key=lambda tensor: tensor.name))
        return Comparison(None, None, tuple(self.blocks), tensors, self.config, broken)

    def embedded(self) -> Floats:
        """The reference's embedded text; of both tables only the rows in use are read and compared."""
        used, places = np.unique(self.windows.tokens, return_inverse=True)
        base, candidate = (
            np.concatenate([widened(source.rows(EMBED, i, i + 1)) for i in used.tolist()])
            for source in self.sources
        )
        made = self.sources[1].nearest(EMBED, 0, base)
        self.note(EMBED, EMBED, Matrix().add(base, candidate, made, labels=used))
        states: Floats = base[places.reshape(self.windows.tokens.shape)]
        return states

    def apply(self, index: int, hidden: list[Floats]) -> list[Floats]:
        """What block `index` of each model makes of its states; its tensors are compared too."""
        names = self.names[index]
        self.losses.observers.clear()
        both = self.read(names.values())

        def product(name: str, states: list[Floats]) -> list[Floats]:
            if observe := self.losses.observers.get(name):
                observe(states[0])
            return self.products(name, both[name], states)

        return self.in_step(names, both, hidden, product)

    def stream(self, index: int, hidden: list[Floats]) -> list[Floats]:
        """As `apply`, with one matrix of each model in memory at a time."""
        names, shapes = self.names[index], self.sources[0].shapes()
        small = self.read(name for name in names.values() if len(shapes[name]) == 1)
        return self.in_step(names, small, hidden, self.product)

    @np.errstate(over="ignore", invalid="ignore")  # as numpy_decoder.block
    def in_step(
        self,
        names: Mapping[str, str],
        both: Mapping[str, Pair],
        hidden: list[Floats],
        product: Callable[[str, list[Floats]], list[Floats]],
    ) -> list[Floats]:
        """A layer of the reference, the candidate and the foretold model, which has the reference's vectors.

        `names` by module attribute, `product` gives every model's product with a matrix.
        """
        sides = [{a: both[name][side] for a, name in names.items() if name in both} for side in (0, 1, 0)]
        numbers = (*self.numbers, self.numbers[0])
        runs = [numpy_decoder.steps(*given) for given in zip(numbers, sides, hidden, strict=True)]

        def products(asked: numpy_decoder.Names, states: list[Floats]) -> list[tuple[Floats, ...]]:
            made = [product(names[name + ".weight"], states) for name in asked]
            return [tuple(products[side] for products in made) for side in range(len(states))]

        return numpy_decoder.in_step(runs, products)

    def products(self, name: str, pair: Pair, states: list[Floats]) -> list[Floats]:
        """Every model's states times its matrix `name`; `pair` are the reference's and the candidate's."""
        part = self.share(name, name)
        base, candidate, third = states
        found = [base @ pair[0].T, candidate @ pair[1].T]
        if part == 1 and np.array_equal(third, candidate):
            return [*found, found[1].copy()]
        if part in (0, 1):
            return [*found, third @ pair[int(part)].T]
        return [*found, (1 - np.float32(part)) * (third @ pair[0].T) + np.float32(part) * (third @ pair[1].T)]

    def share(self, name: str, other: str) -> float:
        """How much of the error of the candidate's tensor `other` is foretold."""
        error = self.tensors[name, other]
        return share(error.type, error.snr, error.lost, self.losses.ratio(name), error.fed)

    def product(self, name: str, states: list[Floats]) -> list[Floats]:
        """Every model's states times its matrix `name`, whose error is noted.

        Read some rows at a time, so that what is made on the way stays in cache, into the same memory for
        every matrix: memory that a process takes for the first time costs more than what is done in it.
        """
        rows, columns = self.sources[0].shapes()[name]
        pair = [room[: rows * columns].reshape(rows, columns) for room in self.rooms(rows * columns)]
        head = self.numbers[1].head_dim  # RoPE's order is undone by whole heads
        step = max(CHUNK // columns // head, 1) * head

        compared = Matrix()

        def read(start: int) -> None:
            stop = min(start + step, rows)
            parts = [widened(source.rows(name, start, stop)) for source in self.sources]
            for matrix, part in zip(pair, parts, strict=True):
                matrix[start:stop] = part
            # The first rows stand for all: a block is rounded as slowly as it was made.
            made = self.sources[1].nearest(name, 0, parts[0]) if not start else None
            compared.add(parts[0], parts[1], made, labels=range(start, stop))

        list(self.pool.map(read, range(0, rows, step)))
        self.note(name, name, compared)
        return self.products(name, (pair[0], pair[1]), states)

    def rooms(self, size: int) -> tuple[Floats, Floats]:
        """Memory for a matrix of so many values of each model, the same as long as it suffices."""
        if self.room is None or len(self.room[0]) < size:
            self.room = np.empty(size, np.float32), np.empty(size, np.float32)
        return self.room

    def read(self, names: Iterable[str]) -> dict[str, Pair]:
        """These tensors of both in float32, read on every core, each one's error noted."""
        names = list(names)
        return dict(zip(names, self.pool.map(lambda name: self.read_pair(name, name), names), strict=True))

    def read_pair(self, name: str, other: str) -> Pair:
        """A tensor of the reference and its counterpart."""
        base, candidate = self.sources[0].float32(name), self.sources[1].float32(other)
        made = rounded(self.sources[1], other, 0, base, candidate)
        error = self.note(name, other, Matrix().add(base, candidate, made))
        if made is not None and error.lost:
            errors = errors_of(base, candidate, made)
            self.losses.watch(name, lambda: iter([errors]))
        return base, candidate

    def note(self, name: str, other: str, compared: Matrix) -> TensorError:
        """Keep the error of a tensor of the candidate, and what is wrong with its rows."""
        head_dim = self.numbers[0].head_dim
        error = tensor_error(self.sources, (name, other), compared, head_dim)
        self.tensors[name, other] = error
        return error


def _broken(values: list[Floats], where: str) -> str:
    """Which of the two computed a value that is not finite, if either did."""
    for who, array in zip(("the reference", "the candidate"), values, strict=False):
        if not np.isfinite(np.abs(array).max()):
            return f"{who} gives non-finite values {where}"
    return ""
