"""A part of a comparison: some blocks on the reference's input, and some rows of every other tensor."""

from __future__ import annotations

from collections.abc import Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.experts import streamed
from dsconvert.decoder.numpy_decoder import EMBED, HEAD
from dsconvert.events import BlockCompared, Event
from dsconvert.machine import usable_cores
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource, widened
from dsconvert.proof.compare import Comparison, Run
from dsconvert.proof.config_differences import check_sizes, differences
from dsconvert.proof.figures import BlockError, TensorError, hidden_error, update_error
from dsconvert.proof.output_losses import rounded
from dsconvert.proof.row_sums import Matrix
from dsconvert.proof.side_by_side import Weights
from dsconvert.proof.tensor_errors import tensor_error
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    import torch

AT_ONCE = 1024  # rows that are read together
SAMPLED = (8, 4)  # rows in a row, places: how much of a matrix is compared


def compare_blocks(
    reference: WeightSource,
    candidate: WeightSource,
    config: ModelConfig,
    windows: Windows,
    blocks: tuple[int, ...],
    *,
    candidate_config: ModelConfig | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> Generator[Event, None, Comparison]:
    """Run some blocks of both models on the same input, and compare all their tensors.

    Block 0 gets the embedded text. Every other gets what the reference's block 0 made of it: not what it
    would see in the model, but states of the right kind, on which a wrong weight, layout or RoPE shows.
    """
    other = candidate_config or config
    check_sizes(config, other)
    place = st.pick_device(device)
    kind = st.pick_dtype(dtype, place)
    sides = (reference, config), (candidate, other)
    decoders = tuple(streamed(st.open_decoder(*side, place, kind)) for side in sides)
    run = Run(decoders, windows, differences(*map(st.numbers, decoders)), Weights(decoders))
    hidden = _embedded(run)
    for index in sorted({0, *blocks}):
        error, hidden, broken = _same_input(run, index, hidden)
        if broken:
            return run.ended(broken)
        if index in blocks:
            yield BlockCompared(index, config.layers, error.relative, error.cosine)
    return run.ended("")


def sample_tensors(
    pair: tuple[WeightSource, WeightSource],
    known: Collection[str],
    head_dim: int,
    threads: int = 0,
    every: bool = False,
) -> tuple[TensorError, ...]:
    """The errors of the candidate's tensors that are not among `known`, from some rows of each, or `every`.

    `threads` read them, by default one on each core.
    """
    shapes = pair[1].shapes()
    places = all_rows if every else sampled_rows

    def compared(names: tuple[str, str]) -> TensorError:
        matrix, shape = Matrix(), shapes[names[1]]
        if len(shape) == 1:
            matrix.add(*(source.float32(name) for source, name in zip(pair, names, strict=True)))
        for rows in places(shape[0]) if len(shape) > 1 else ():
            both = zip(pair, names, strict=True)
            parts = [widened(source.rows(name, rows.start, rows.stop)) for source, name in both]
            # The first rows stand for all: to round a few costs as much as to read them.
            made = pair[1].nearest(names[1], 0, parts[0]) if not rows.start else None
            matrix.add(parts[0], parts[1], made, labels=rows)
        return tensor_error(pair, names, matrix, head_dim)

    names = [both for both in counterparts(*pair) if both[1] not in known or both[0] != both[1]]
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        return tuple(pool.map(compared, names))


def counterparts(reference: WeightSource, candidate: WeightSource) -> list[tuple[str, str]]:
    """The names of each tensor that both have in the same shape; a head that one lacks goes with the
    embedding.
    """
    ours, theirs = reference.shapes(), candidate.shapes()
    both = [(name, name) for name in theirs if ours.get(name) == theirs[name]]
    if (HEAD in ours) == (HEAD in theirs):
        return both
    return [*both, (HEAD, EMBED) if HEAD in ours else (EMBED, HEAD)]


def all_rows(rows: int) -> list[range]:
    """Every row of a matrix, some at a time."""
    return [range(start, min(start + AT_ONCE, rows)) for start in range(0, rows, AT_ONCE)]


def sampled_rows(rows: int) -> list[range]:
    """Some rows of a matrix, spread from the first to the last, none of them twice."""
    length, places = SAMPLED
    starts = sorted({int(at) for at in np.linspace(0, max(rows - length, 0), places)})
    stops = [*starts[1:], rows]
    return [range(start, min(start + length, stop)) for start, stop in zip(starts, stops, strict=True)]


def _embedded(run: Run) -> torch.Tensor:
    """The reference's embedded text; of both tables only the rows in use are kept and compared."""
    import torch

    used, places = np.unique(run.windows.tokens, return_inverse=True)
    rows = []
    for decoder in run.pair:
        st.check_ids(run.windows.tokens, decoder.config.vocab_size)
        parts = [widened(decoder.source.rows(st.EMBED, i, i + 1)) for i in used.tolist()]
        rows.append(torch.from_numpy(np.concatenate(parts)))
    made = rounded(run.pair[1].source, st.EMBED, 0, rows[0], rows[1])
    run.weights.note((st.EMBED, st.EMBED), Matrix().add(rows[0], rows[1], made, labels=used))
    base = rows[0].to(run.pair[0].device)
    return st.embed(base, places.reshape(run.windows.tokens.shape), run.pair[0].dtype)


def _same_input(run: Run, index: int, start: torch.Tensor) -> tuple[BlockError, torch.Tensor, str]:
    """One block of both on `start`; returns its error, the input for those that follow, and who broke."""
    base, candidate, foretold = run.apply(index, [start, start, start])
    broken = run.broken([base, candidate], f"after block {index}")
    relative, cosine = hidden_error(base, candidate)
    updates = (update_error(start, base, made) for made in (candidate, foretold))
    error = BlockError(index, *(float(part.double().mean()) for part in (relative, cosine, *updates)))
    run.blocks.append(error)
    return error, base if index == 0 else start, broken
