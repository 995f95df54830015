"""Quantizes a decoder block by block, on the states of the quantized model or the checkpoint's; resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dsconvert.checkpoints.safetensors_reader import Stored
from dsconvert.checkpoints.safetensors_writer import Piece, from_bytes, from_stored
from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.linear_inputs import Group
from dsconvert.errors import ConversionError
from dsconvert.events import Event, Step
from dsconvert.machine import give_back
from dsconvert.quantization import few_tokens, forecast
from dsconvert.quantization.forecast import Text
from dsconvert.quantization.ranks import ALONE, Ranks
from dsconvert.quantization.run_state import State

if TYPE_CHECKING:
    import torch

# A linear quantized: the output's tensors, a record of it, and the weights [N, K] that take its place in what
# the linears behind it are given, None where it stays as it is.
Solution = tuple[dict[str, Piece], dict[str, Any], "torch.Tensor | None"]
# Quantizes the linear of this name, given its weight [N, K] in float32 and the group with its Hessian [K, K].
Solve = Callable[[str, "torch.Tensor", Group], Generator[Event, None, Solution]]
# The weights [N, K] that a finished block's tensors stand for, of the linear of this name: to the bit what
# `Solve` gave for them.
Restore = Callable[[str, Mapping[str, Stored]], "torch.Tensor"]


def quantize_blocks(
    decoder: st.Decoder,
    tokens: st.IntArray,
    state: State,
    solve: Solve,
    restore: Restore | None,
    head: bool = False,
    ranks: Ranks = ALONE,
    against: str = "round-to-nearest",
    passes: float = 2.0,
    kept: Collection[str] = (),
) -> Generator[Event, None, None]:
    """Quantize every block that `state` does not hold yet and save it there; then the head, if asked.

    `tokens` int64 [n, length] are the calibration windows. The head counts as a block after the last; it is
    called lm_head.weight, also where the embedding serves for it. Without `restore` every block is given what
    the checkpoint's blocks return. `against` names what the losses are held against, `passes` is how much
    work a solve is (see forecast.foretell); linears in `kept` stay as they are. Of several `ranks` each takes
    a share of the windows and of a group's linears; the first saves. Raises what `solve` raises, with the
    linear's name, and QuantizationError where the inputs of a linear are not finite.
    """
    layers, finished = decoder.config.layers, 0
    with ranks.together():
        own = tokens[ranks.share(len(tokens))]
        finished = len(state.records()) if ranks.first else 0
    finished = ranks.shared(finished)
    if finished:
        yield Step(f"going on: {finished} of {layers + head} blocks are finished")
    if finished == layers + head:
        return
    with ranks.together():
        hidden = linear_inputs.embed(decoder, own)
        text = Text(len(own), tokens.shape[1], fixed=restore is None)
        ahead = forecast.foretell(decoder, text, passes, head, finished)[finished:]
    yield Step(forecast.told(ahead))
    took: list[float] = []
    for index in range(layers):
        started = time.monotonic()
        if index < finished:
            with ranks.together():
                _pass_finished(decoder, index, hidden, state, restore, kept)
        else:
            linears = yield from _quantize_block(
                decoder, index, hidden, state, solve, ranks, kept, sequential=restore is not None
            )
            took.append(time.monotonic() - started)
            left = forecast.left(ahead, took)
            yield from few_tokens.told(decoder.experts[index], f"block {index + 1}", linears, against)
            yield Step(summary(f"block {index + 1} of {layers}", linears, took[-1], against, left))
    if head:
        started = time.monotonic()
        linears = yield from _quantize_head(decoder, hidden, state, solve, ranks)
        if linears:
            yield Step(summary("head", linears, time.monotonic() - started, against))


def _pass_finished(
    decoder: st.Decoder,
    index: int,
    hidden: torch.Tensor,
    state: State,
    restore: Restore | None,
    kept: Collection[str],
) -> None:
    """Take the states through a block that is finished."""
    if restore is None:
        block = st.load_block(decoder, index)
    else:
        stored = state.tensors(index)
        block = st.load_block(decoder, index, lambda name: _own(decoder, restore(name, stored)))
        for name in (name for group in block_walk.groups(decoder, index) for name in group):
            if name in block.linears and name not in kept:  # else an expert's, which is read when it runs
                _put(decoder, block.linears[name], restore(name, stored))
    block_walk.advance(decoder, block, hidden)


def _quantize_block(
    decoder: st.Decoder,
    index: int,
    hidden: torch.Tensor,
    state: State,
    solve: Solve,
    ranks: Ranks,
    kept: Collection[str],
    sequential: bool,
) -> Generator[Event, None, list[dict[str, Any]]]:
    """Solve and save a block; its records.

    A `sequential` one has the solved weights in the place of its own as soon as they are known.
    """
    pieces: dict[str, Piece] = {}
    linears: list[dict[str, Any]] = []
    with ExitStack() as stack:
        with ranks.together():
            block = st.load_block(decoder, index)
            keep = stack.enter_context(state.spool(index)) if ranks.first else None
        walk = block_walk.walk(decoder, block, hidden, fixed=not sequential)
        for whole in measured(walk, ranks):
            group = replace(whole, linears={n: one for n, one in whole.linears.items() if n not in kept})
            solved = yield from _solve_group(decoder, group, solve, ranks)
            for name, owner, (_, record, weight) in solved:
                if weight is not None:
                    _put(decoder, group.linears[name], weight)
                if sequential:
                    ranks.send(group.linears[name].weight, owner)
                linears.append(record)
            with ranks.together():
                if keep is not None:
                    for _, _, (found, *_) in solved:
                        pieces |= {tensor: keep(piece) for tensor, piece in found.items()}
        with ranks.together():
            if ranks.first:
                state.save(index, pieces, {"linears": linears})
    return linears


def measured(groups: Iterator[Group], ranks: Ranks) -> Iterator[Group]:
    """Each group with the Hessian and the rows of all windows, where each of `ranks` has seen its share."""
    while True:
        with ranks.together():
            group = next(groups, None)
        if group is None:
            return
        yield _of_all(group, ranks)


def _of_all(group: Group, ranks: Ranks) -> Group:
    moment, rows = ranks.mean(group.moment, group.rows)
    return replace(group, moment=moment, rows=rows)


def _solve_group(
    decoder: st.Decoder, group: Group, solve: Solve, ranks: Ranks
) -> Generator[Event, None, list[tuple[str, int, Solution]]]:
    """The linears of a group with who solved them; weights are None where another process did."""
    own: dict[str, tuple[Solution, list[Event]]] = {}
    with ranks.together():
        for index, name in enumerate(group.names):
            if ranks.owner(index) == ranks.rank:
                give_back()
                own[name] = yield from _noted(_named(name, solve(name, st.read(decoder, name), group)))
    found: list[tuple[str, int, Solution]] = []
    for index, name in enumerate(group.names):
        owner = ranks.owner(index)
        if ranks.count == 1:
            found.append((name, owner, own[name][0]))
            continue
        pieces, record, events = ranks.shared(_told(*own[name]) if name in own else ({}, {}, []), owner)
        if name not in own:
            yield from events
        weight = own[name][0][2] if name in own else None
        found.append((name, owner, ({n: from_bytes(*piece) for n, piece in pieces.items()}, record, weight)))
    return found


def _told(solution: Solution, events: list[Event]) -> tuple[dict[str, Any], dict[str, Any], list[Event]]:
    """What the other processes receive of a solution: all but the weights, as it can be pickled."""
    pieces = {n: (piece.dtype, piece.shape, b"".join(piece.chunks())) for n, piece in solution[0].items()}
    return pieces, solution[1], events


def _quantize_head(
    decoder: st.Decoder, hidden: torch.Tensor, state: State, solve: Solve, ranks: Ranks
) -> Generator[Event, None, list[dict[str, Any]]]:
    """Solve and save the head; its record on the first process."""
    with ranks.together():
        norm = st.read(decoder, st.NORM).to(decoder.dtype)
        own = linear_inputs.measure_head(decoder, hidden, norm)
    group = _of_all(own, ranks)
    records: list[dict[str, Any]] = []
    with ranks.together():
        if ranks.first:
            solving = solve(st.HEAD, st.read(decoder, decoder.head), group)
            pieces, record, _ = yield from _named(st.HEAD, solving)
            state.save(decoder.config.layers, pieces, {"linears": [record]})
            records.append(record)
    return records


def _noted(
    solving: Generator[Event, None, Solution],
) -> Generator[Event, None, tuple[Solution, list[Event]]]:
    """What `solving` does, and what it said on the way."""
    said: list[Event] = []
    while True:
        try:
            event = next(solving)
        except StopIteration as stop:
            return stop.value, said
        said.append(event)
        yield event


def _named(name: str, solving: Generator[Event, None, Solution]) -> Generator[Event, None, Solution]:
    """What `solving` does; its errors say which linear they are about."""
    try:
        return (yield from solving)
    except ConversionError as error:
        raise type(error)(error.what, where=error.where or name, why=error.why, hint=error.hint) from None


def _put(decoder: st.Decoder, linear: torch.nn.Linear, weight: torch.Tensor) -> None:
    """Put a linear's weights in their place."""
    linear.weight.data = _own(decoder, weight)


def _own(decoder: st.Decoder, weight: torch.Tensor) -> torch.Tensor:
    """Weights as the decoder runs them, in torch's own alignment: equal weights give equal products."""
    import torch

    own = torch.empty(weight.shape, dtype=decoder.dtype, device=decoder.device)
    return own.copy_(weight)


def collected(state: State) -> tuple[dict[str, Piece], dict[str, str]]:
    """The tensors of all blocks in `state`, and why a linear is rounded to nearest, by name, where one is."""
    pieces: dict[str, Piece] = {}
    fell_back: dict[str, str] = {}
    for index, record in enumerate(state.records()):
        pieces |= {name: from_stored(tensor) for name, tensor in state.tensors(index).items()}
        try:
            fell_back |= {str(one["name"]): one["fell_back"] for one in record["linears"] if one["fell_back"]}
        except Exception as error:  # of any kind: the record may be anyone's by now
            raise state.changed(f"block-{index:05d}", error) from None
    return pieces, fell_back


def running(decoder: st.Decoder, nbytes: Mapping[str, int]) -> dict[str, int]:
    """How many bytes of the output's linears there are up to each of them, in the order of the walk."""
    blocks = range(decoder.config.layers)
    order = [name for index in blocks for group in block_walk.groups(decoder, index) for name in group]
    names = dict.fromkeys([*(name for name in order if name in nbytes), *nbytes])
    return dict(zip(names, accumulate(nbytes[name] for name in names), strict=True))


def summary(what: str, linears: list[dict[str, Any]], seconds: float, against: str, left: float = 0.0) -> str:
    """One line on a block or the head: its share of the loss that `against` names, the seconds left."""
    loss, plain = (sum(linear[key] for linear in linears) for key in ("loss", "rtn_loss"))
    share = f"{loss / plain:.0%} of {against}'s loss" if plain else "no loss"
    rest = f", about {forecast.duration(left)} left" if left else ""
    return f"{what}: {share}, {seconds:.1f} s{rest}"
