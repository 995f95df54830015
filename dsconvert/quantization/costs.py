"""What rounding a linear costs, foretold without solving, in nats of KL divergence of the next token.

A linear's outputs y = W x change by d = R x when rounding leaves R of W, and the prediction then moves by
1/2 sum_n s_n E[d_n^2] nats, s the outputs' sensitivities (dsconvert.decoder.sensitivity). With H = 2 E[x x^T]
that is 1/4 sum_n s_n R_n H R_n^T, or, where error feedback follows, 1/4 sum_i L_i sum_n s_n R_ni^2, L what an
input's rounding error costs after it (error_feedback.row_losses).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dsconvert.decoder import block_walk
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.linear_inputs import Group
from dsconvert.decoder.sensitivity import sensitivities
from dsconvert.events import Event, Step
from dsconvert.quantization import error_feedback, forecast
from dsconvert.quantization.forecast import Text
from dsconvert.quantization.run_state import State

if TYPE_CHECKING:
    import torch

SENSITIVITY_TOKENS = 4096
PASSES = 8.0  # see forecast.foretell: a linear is rounded to some ten types
Cost = TypeVar("Cost")
Windows = TypeVar("Windows", "torch.Tensor", "st.IntArray")


def sensitivities_on_some(
    decoder: st.Decoder, tokens: st.IntArray, seed: int
) -> Generator[Event, None, dict[str, torch.Tensor]]:
    """The outputs' sensitivities by tensor name, on the first of the windows [n, length]."""
    return (yield from sensitivities(decoder, tokens[: max(1, SENSITIVITY_TOKENS // tokens.shape[1])], seed))


def measure_blocks(
    decoder: st.Decoder,
    hidden: torch.Tensor,
    cost_of: Callable[[int, Group, Group], Mapping[str, Cost]],
    known: Sequence[Mapping[str, Cost]] = (),
    keep: Callable[[int, Mapping[str, Cost]], None] = lambda index, found: None,
    unseen: bool = False,
) -> Generator[Event, None, dict[str, Cost]]:
    """What linears cost, by tensor name; takes the states [n, length, d] through all blocks, in place.

    `cost_of` is given the place of each group of linears in the block and the group itself, twice: with
    `unseen` as the first half of the windows has it, to solve with, and as the second, to judge by. `known`
    are the costs of the first blocks, which are not measured again, and `keep` is given those of each that
    is. Raises QuantizationError that names a linear whose inputs are not finite.
    """
    layers, found = decoder.config.layers, dict[str, Cost]()
    parts = halves(hidden) if unseen else [hidden]
    windows, length = hidden.shape[:2]
    text = Text(windows, length, fixed=True)
    ahead, took = forecast.foretell(decoder, text, PASSES, finished=len(known))[len(known) :], list[float]()
    if ahead:
        yield Step(f"measuring takes {forecast.told(ahead)}")
    for index in range(layers):
        started = time.monotonic()
        block = st.load_block(decoder, index)
        if index < len(known):
            found |= known[index]
            block_walk.advance(decoder, block, hidden)
            continue
        own: dict[str, Cost] = {}
        walks = (block_walk.walk(decoder, block, part, fixed=True) for part in parts)
        for place, groups in enumerate(zip(*walks, strict=True)):  # so that each walk comes to its end
            own |= cost_of(place, groups[0], groups[-1])
        keep(index, own)
        found |= own
        took.append(time.monotonic() - started)
        rest = f", about {forecast.duration(forecast.left(ahead, took))} left" * (index + 1 < layers)
        yield Step(f"measured block {index + 1} of {layers}{rest}")
    return found


def halves(windows: Windows) -> list[Windows]:
    """The windows [n, ...] in two parts, views of them; one is a part by itself."""
    half = len(windows) // 2
    return [windows[:half], windows[half:]] if half else [windows]


def kept_blocks(
    state: State, layers: int, parsed: Callable[[dict[str, Any]], dict[str, Cost]]
) -> list[dict[str, Cost]]:
    """The costs that `state` knows, block after block; raises OutputError for a record that was changed."""
    found = []
    for index in range(layers):
        kept = state.kept(record_of(index))
        if kept is None:
            break
        try:
            found.append(parsed(kept))
        except Exception as error:  # of any kind: the record may be anyone's by now
            raise state.changed(record_of(index), error) from None
    return found


def record_of(index: int) -> str:
    """What a run's state calls the costs of a block."""
    return f"measured-{index:05d}"


def some_outputs(s: torch.Tensor, count: int) -> tuple[slice, torch.Tensor]:
    """Which outputs stand for all, `count` or more, and their weights, which sum up as `s` [N] does."""
    at = slice(None, None, max(1, len(s) // count))
    weights = s[at]
    return at, weights * (s.sum() / weights.sum().clamp(min=1e-30))


def after_feedback(H: torch.Tensor, damp: float) -> torch.Tensor | None:
    """What a squared rounding error of each input [K] adds to the loss where error feedback makes up for it.

    None where H [K, K] cannot be factored: nothing is fed back then.
    """
    import torch

    columns = torch.argsort(H.diagonal(), descending=True, stable=True)
    dead = H.diagonal() == 0
    factor = error_feedback.factorize(H, dead, columns, damp) if bool((~dead).any()) else None
    if factor is None:
        return None
    loss = torch.empty_like(factor.D)
    loss[columns] = error_feedback.row_losses(factor)
    return loss


def linear_nats(R: torch.Tensor, H: torch.Tensor, s: torch.Tensor, loss: torch.Tensor | None) -> float:
    """The nats of what rounding leaves, R [n, K], of outputs of sensitivities `s` [n]; see above.

    `loss` [K] is that of error feedback, None where there is none.
    """
    losses = (R @ H).mul_(R).sum(1) if loss is None else R.square() @ loss
    return float(losses.double() @ s.double()) / 4
