"""Quantizes a decoder block by block, each on what the quantized ones before it give; resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

from dsconvert import capture
from dsconvert import streaming as st
from dsconvert.errors import ConversionError
from dsconvert.events import Event, Step
from dsconvert.resume import State
from dsconvert.safetensors_header import Stored
from dsconvert.safetensors_writer import Piece

if TYPE_CHECKING:
    import torch

# A linear quantized: the output's tensors, a record of it, and the weights [N, K] that they stand for.
Solution = tuple[dict[str, Piece], dict[str, Any], "torch.Tensor"]
# Quantizes the linear of this name, given its weight [N, K] in float32 and its Hessian [K, K].
Solve = Callable[[str, "torch.Tensor", "torch.Tensor"], Generator[Event, None, Solution]]
# The weights [N, K] that a finished block's tensors stand for, of the linear of this name: to the bit what
# `Solve` gave for them.
Restore = Callable[[str, Mapping[str, Stored]], "torch.Tensor"]


def quantize_blocks(
    decoder: st.Decoder,
    tokens: st.IntArray,
    state: State,
    solve: Solve,
    restore: Restore,
    head: bool = False,
) -> Generator[Event, None, None]:
    """Quantize every block that `state` does not hold yet and save it there; then the head, if asked.

    `tokens` int64 [n, length] are the calibration windows. The head counts as a block after the last; it is
    called lm_head.weight, also where the embedding serves for it. Raises what `solve` raises, with the
    linear's name, and QuantizationError where the inputs of a linear are not finite.
    """
    records, layers = state.records(), decoder.config.layers
    if records:
        yield Step(f"going on: {len(records)} of {layers + head} blocks are finished")
    if len(records) == layers + head:
        return
    hidden = capture.embed(decoder, tokens)
    for index in range(layers):
        block = st.load_block(decoder, index)
        if index < len(records):
            stored = state.tensors(index)
            for name in (name for group in capture.groups(decoder, index) for name in group):
                _put(decoder, block, name, restore(name, stored))
            capture.advance(decoder, block, hidden)
            continue
        started = time.monotonic()
        pieces: dict[str, Piece] = {}
        linears: list[dict[str, Any]] = []
        for group in capture.walk(decoder, block, hidden):
            for name in group.names:
                found, record, weight = yield from _named(
                    name, solve(name, st.read(decoder, name), group.moment)
                )
                _put(decoder, block, name, weight)
                pieces |= found
                linears.append(record)
        state.save(index, pieces, {"linears": linears})
        yield Step(summary(f"block {index + 1} of {layers}", linears, time.monotonic() - started))
    if head:
        yield from _quantize_head(decoder, hidden, state, solve)


def _quantize_head(
    decoder: st.Decoder, hidden: torch.Tensor, state: State, solve: Solve
) -> Generator[Event, None, None]:
    started = time.monotonic()
    norm, weight = st.read(decoder, st.NORM).to(decoder.dtype), st.read(decoder, decoder.head)
    moment = capture.measure_head(decoder, hidden, norm).moment
    pieces, record, _ = yield from _named(st.HEAD, solve(st.HEAD, weight, moment))
    state.save(decoder.config.layers, pieces, {"linears": [record]})
    yield Step(summary("head", [record], time.monotonic() - started))


def _named(name: str, solving: Generator[Event, None, Solution]) -> Generator[Event, None, Solution]:
    """What `solving` does; its errors say which linear they are about."""
    try:
        return (yield from solving)
    except ConversionError as error:
        raise type(error)(error.what, where=error.where or name, why=error.why, hint=error.hint) from None


def _put(decoder: st.Decoder, block: st.Block, name: str, weight: torch.Tensor) -> None:
    """Put a linear's weights in their place, in torch's own alignment: equal weights give equal products."""
    import torch

    own = torch.empty(weight.shape, dtype=decoder.dtype, device=decoder.device)
    block.linears[name].weight.data = own.copy_(weight)


def summary(what: str, linears: list[dict[str, Any]], seconds: float) -> str:
    """One line on a block or the head: what is left of round-to-nearest's loss."""
    loss, plain = (sum(linear[key] for linear in linears) for key in ("loss", "rtn_loss"))
    share = f"{loss / plain:.0%} of round-to-nearest's loss" if plain else "no loss"
    return f"{what}: {share}, {seconds:.1f} s"
