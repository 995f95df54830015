"""What each scheme of integers costs of each linear: nats, foretold by solving some of its outputs.

Outputs do not hang on one another, so some stand for all. They are solved with the inputs of one half of the
text and judged by those of the other: on its own text a solution always looks better than it is, the more so
the fewer bits. See dsconvert.quantization.costs for the unit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from converters.compressed.choice import Candidates
from converters.compressed.plan import Options
from converters.compressed.schemes import label_of
from dsconvert.decoder import linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import ConversionError
from dsconvert.events import Event, Step
from dsconvert.quantization.costs import (
    halves,
    kept_blocks,
    linear_nats,
    measure_blocks,
    record_of,
    sensitivities_on_some,
    some_outputs,
)
from dsconvert.quantization.error_feedback import Factorize, shared_factors
from dsconvert.quantization.few_tokens import told_of_costs, too_few
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import solve
from dsconvert.quantization.run import Run

if TYPE_CHECKING:
    import torch

OUTPUTS = 128  # of a linear's outputs as many are solved, evenly spread
LEAST_OUTPUTS = 16  # of each expert's, which together have as many, or more
WINDOWS = 32  # of the calibration windows as many are measured on
Nats = dict[str, float]  # by label


def measure(begun: Run, options: Options, choices: Candidates) -> Generator[Event, None, dict[str, Nats]]:
    """The nats of every linear in each of its schemes; what the run's state knows is not measured again.

    Raises QuantizationError that names a linear whose inputs, weights or gradients are not finite.
    """
    decoder, state, tokens = begun.decoder, begun.state, begun.calibration.tokens[:WINDOWS]
    layers, factorize = decoder.config.layers, shared_factors()
    known = kept_blocks(state, layers + (st.HEAD in choices), parsed)
    if len(known) == layers + (st.HEAD in choices):
        return {name: nats for found in known for name, nats in found.items()}
    yield Step(f"measuring what schemes cost on {len(tokens)} windows")
    s = yield from sensitivities_on_some(decoder, tokens, options.run.calibration.seed)
    hidden = linear_inputs.embed(decoder, tokens)
    judged = halves(tokens)[-1].size

    few: list[str] = []
    experts = decoder.config.experts.count if decoder.config.experts else 1

    def cost_of(place: int, group: linear_inputs.Group, unseen: linear_inputs.Group) -> dict[str, Nats]:
        found: dict[str, Nats] = {}
        if group.moment.ndim == 3:  # keys by the queries: here a linear by what it is given
            return found
        reason = too_few(group)
        few.extend(group.names if reason else ())
        outputs = max(LEAST_OUTPUTS, OUTPUTS // experts) if group.routed else OUTPUTS
        for name in (name for name in group.names if name in choices):
            W = st.read(decoder, decoder.head if name == st.HEAD else name)
            H, own = (group.moment, unseen.moment), choices[name].values()
            if name not in s or not unseen.rows:  # nothing of this text hangs on it
                found[name] = {label_of(one): 0.0 for one in own}
                continue
            try:
                nats = linear_costs(W, *H, s[name].to(W.device), own, options, factorize, outputs, reason)
            except ConversionError as error:
                raise type(error)(error.what, where=name, why=error.why, hint=error.hint) from None
            share = unseen.rows / judged  # of the tokens, for an expert
            found[name] = {label: share * cost for label, cost in nats.items()}
        return found

    def keep(index: int, found: Mapping[str, Nats]) -> None:
        state.keep(record_of(index), found)

    nats = yield from measure_blocks(decoder, hidden, cost_of, known, keep, unseen=True)
    yield from told_of_costs(few)
    if st.HEAD in choices:
        norm = st.read(decoder, st.NORM).to(decoder.dtype)
        groups = [linear_inputs.measure_head(decoder, part, norm) for part in halves(hidden)]
        nats |= (found := cost_of(0, groups[0], groups[-1]))
        keep(layers, found)
    return nats


def linear_costs(
    W: torch.Tensor,
    H: torch.Tensor,
    unseen: torch.Tensor,
    s: torch.Tensor,
    schemes: Iterable[Scheme],
    options: Options,
    factorize: Factorize,
    outputs: int = OUTPUTS,
    few: str | None = None,
) -> Nats:
    """The nats of a linear W [N, K] by label, given its sensitivities [N].

    Some of its outputs, `outputs` or more, are solved with the Hessian `H` [K, K] and judged by an `unseen`
    one, of other text. `few` says why H is worth little, as the solver takes it.
    """
    at, weight = some_outputs(s, outputs)
    rows = W[at].contiguous()

    def left(scheme: Scheme) -> torch.Tensor:
        return rows - solve(rows, H, options.solver(scheme), factorize, few).dequantized()

    return {label_of(one): linear_nats(left(one), unseen, weight, None) for one in schemes}


def parsed(found: Mapping[str, Any]) -> dict[str, Nats]:
    """The record of a block; raises whatever a changed one makes it raise."""
    return {
        str(name): {str(label): float(cost) for label, cost in nats.items()} for name, nats in found.items()
    }
