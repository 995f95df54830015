"""What each scheme of integers costs of each linear: nats, foretold by plain rounding of some outputs.

On scales chosen as the solver chooses them, weighed by what errors cost after its feedback; see
dsconvert.quantization.costs.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

from converters.compressed.choice import Candidates
from converters.compressed.plan import Options
from converters.compressed.schemes import label_of
from dsconvert.decoder import linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import ConversionError
from dsconvert.events import Event, Step
from dsconvert.quantization.costs import (
    Fed,
    after_feedback,
    kept_blocks,
    linear_nats,
    measure_blocks,
    record_of,
    sensitivities_on_some,
    some_outputs,
)
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import round_to_nearest
from dsconvert.quantization.run import Run

if TYPE_CHECKING:
    import torch

OUTPUTS = 256  # of a linear's outputs as many are rounded, evenly spread
WINDOWS = 32  # of the calibration windows as many are measured on
Nats = dict[str, float]  # by label


def measure(begun: Run, options: Options, choices: Candidates) -> Generator[Event, None, dict[str, Nats]]:
    """The nats of every linear in each of its schemes; what the run's state knows is not measured again.

    Raises QuantizationError that names a linear whose inputs, weights or gradients are not finite.
    """
    decoder, state, tokens = begun.decoder, begun.state, begun.calibration.tokens[:WINDOWS]
    layers = decoder.config.layers
    known = kept_blocks(state, layers + (st.HEAD in choices), parsed)
    if len(known) == layers + (st.HEAD in choices):
        return {name: nats for found in known for name, nats in found.items()}
    yield Step(f"measuring what schemes cost on {len(tokens)} windows")
    s = yield from sensitivities_on_some(decoder, tokens, options.run.calibration.seed)
    hidden = linear_inputs.embed(decoder, tokens)

    def cost_of(place: int, group: linear_inputs.Group) -> dict[str, Nats]:
        fed, found = after_feedback(group.moment, options.damp, options.act_order), dict[str, Nats]()
        for name in (name for name in group.names if name in choices):
            W = st.read(decoder, decoder.head if name == st.HEAD else name)
            weights, own = s[name].to(W.device), choices[name].values()
            try:
                nats = linear_costs(W, group.moment, weights, own, options, fed)
            except ConversionError as error:
                raise type(error)(error.what, where=name, why=error.why, hint=error.hint) from None
            share = group.rows / tokens.size  # of the tokens, for an expert
            found[name] = {label: share * cost for label, cost in nats.items()}
        return found

    def keep(index: int, found: Mapping[str, Nats]) -> None:
        state.keep(record_of(index), found)

    nats = yield from measure_blocks(decoder, hidden, cost_of, known, keep)
    if st.HEAD in choices:
        norm = st.read(decoder, st.NORM).to(decoder.dtype)
        nats |= (found := cost_of(0, linear_inputs.measure_head(decoder, hidden, norm)))
        keep(layers, found)
    return nats


def linear_costs(
    W: torch.Tensor,
    H: torch.Tensor,
    s: torch.Tensor,
    schemes: Any,
    options: Options,
    fed: Fed | None,
) -> Nats:
    """The nats of a linear W [N, K] by label, given its Hessian [K, K] and sensitivities [N]."""
    at, weight = some_outputs(s, OUTPUTS)
    rows = W[at].masked_fill(H.diagonal() == 0, 0)
    pivots, loss = (None, None) if fed is None else (fed.pivots, fed.loss)

    def left(scheme: Scheme) -> torch.Tensor:
        return rows - round_to_nearest(rows, options.solver(scheme), pivots).dequantized()

    return {label_of(one): linear_nats(left(one), H, weight, loss) for one in schemes}


def parsed(found: Mapping[str, Any]) -> dict[str, Nats]:
    """The record of a block; raises whatever a changed one makes it raise."""
    return {
        str(name): {str(label): float(cost) for label, cost in nats.items()} for name, nats in found.items()
    }
