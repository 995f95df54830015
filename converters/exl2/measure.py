"""What every setting of every linear would cost: bits in the file, and nats of KL divergence.

GPTQ's loss is a weighted sum of the squared rounding errors of the inputs, whatever the feedback did before
(error_feedback.row_losses), and rounding errors on one grid are alike wherever the weights lie. So one plain
rounding per width and group size, of some of the outputs, on scales chosen as the solver chooses them,
foretells the loss of every mixture; weighed by the outputs' sensitivities (dsconvert.decoder.sensitivity) it
is a share of the mean KL divergence.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.exl2.grid import MULTIPLIERS, find_grid, from_codes, to_codes
from converters.exl2.settings import Group, Setting, bits_of, groups_for, settings_for
from converters.exl2.solver import Problem, prepare
from dsconvert.checkpoints.output_files import write_file
from dsconvert.decoder import linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import CheckpointError, ConversionError
from dsconvert.events import Event
from dsconvert.models.tensor_table import SOLVE_ORDER
from dsconvert.quantization import error_feedback
from dsconvert.quantization.costs import (
    kept_blocks,
    measure_blocks,
    record_of,
    sensitivities_on_some,
    some_outputs,
)
from dsconvert.quantization.run_state import State
from dsconvert.reading import RECORD, read_object

if TYPE_CHECKING:
    import torch

OUTPUTS = 128  # of a linear's outputs as many are rounded, evenly spread
TRIED = MULTIPLIERS[::4]
WINDOWS = 16  # of the calibration windows as many are measured on
REMAKE = "Leave --measurement out, or name a new file, and it is made anew"
Key = tuple[int, int]  # bits, group size


@dataclass(frozen=True)
class Option:
    """A setting of one linear: its name, the bits it takes, the nats that it is expected to cost."""

    setting: str
    bits: int
    error: float


Measured = dict[str, list[Option]]


def measure(
    decoder: st.Decoder, tokens: st.IntArray, state: State, damp: float, seed: int, kinds: Mapping[str, bool]
) -> Generator[Event, None, Measured]:
    """The options of every linear of the blocks, by tensor name; blocks that `state` knows are not redone.

    `tokens` int64 [n, length] are the calibration windows, of which the first are used; `kinds` says of each
    linear whether it has a bias. Raises QuantizationError that names a linear.
    """
    layers = decoder.config.layers
    tokens = tokens[:WINDOWS]
    known = kept_blocks(state, layers, parsed)
    if len(known) == layers:
        return {name: options for found in known for name, options in found.items()}
    weights = yield from sensitivities_on_some(decoder, tokens, seed)

    def cost_of(place: int, group: linear_inputs.Group, same: linear_inputs.Group) -> Measured:
        options: Measured = {}
        for name in group.names:
            W = st.read(decoder, name)
            s, role = weights[name].to(W.device), SOLVE_ORDER[place]
            options[name] = measure_linear(name, W, group.moment, s, role, damp, kinds[name])
        return options

    def keep(index: int, options: Mapping[str, list[Option]]) -> None:
        state.keep(record_of(index), as_dict(options))

    return (yield from measure_blocks(decoder, linear_inputs.embed(decoder, tokens), cost_of, known, keep))


def measure_linear(
    name: str, W: torch.Tensor, H: torch.Tensor, s: torch.Tensor, role: str, damp: float, bias: bool = False
) -> list[Option]:
    """Every candidate of a linear W [N, K] with the nats it costs, given its Hessian and sensitivities [N].

    The error is 1/4 sum_i L_i sum_n s_n r_in^2, r being what rounding leaves of W and L the inputs' weights
    in the loss: H is twice the inputs' second moment, and a shift d of outputs moves the prediction by
    1/2 sum_n s_n d_n^2.
    """
    import torch

    outputs, inputs = W.shape
    try:
        problem = prepare(W, H, damp)
    except ConversionError as error:
        raise type(error)(error.what, where=name, why=error.why, hint=error.hint) from None
    chosen = settings_for(role, inputs)
    keys = {
        (bits, size) for setting in chosen for bits, size in zip(setting.bits, setting.sizes, strict=True)
    }
    L = error_feedback.row_losses(problem.factor) if problem.factor else torch.ones(inputs, device=W.device)
    sums = {key: _summed(problem, L, s, key) for key in sorted(keys)}
    options = []
    for setting in chosen:
        groups = groups_for(inputs, setting)
        options.append(
            Option(setting.text, bits_of(inputs, outputs, groups, bias), _error(sums, setting, groups))
        )
    return options


def _summed(problem: Problem, L: torch.Tensor, s: torch.Tensor, key: Key) -> list[float]:
    """Nats that the first i rows cost at this width and group size, for i = 0 ... K."""
    import torch

    (bits, size), cost = key, problem.cost
    at, weight = some_outputs(s, OUTPUTS)
    W = problem.Wt[:, at].contiguous()
    rows = []
    for start in range(0, len(W), size):
        part = W[start : start + size]
        scale = find_grid(part, bits, cost[start : start + size], TRIED).scale
        miss = part - from_codes(to_codes(part, scale, bits), scale, bits)
        rows.append(miss.square_() @ weight)
    shares = torch.cat(rows).double() * L.double() / 4
    return [0.0, *shares.cumsum(0).tolist()]


def _error(sums: Mapping[Key, list[float]], setting: Setting, groups: Iterable[Group]) -> float:
    sizes = dict(zip(setting.bits, setting.sizes, strict=True))
    total, row = 0.0, 0
    for bits, rows in groups:
        cost = sums[bits, sizes[bits]]
        total += cost[row + rows] - cost[row]
        row += rows
    return total


def as_dict(measured: Mapping[str, list[Option]]) -> dict[str, Any]:
    """The measurement as JSON has it: per linear a list of [setting, bits, error]."""
    return {name: [[o.setting, o.bits, o.error] for o in options] for name, options in measured.items()}


def as_file(measured: Measured, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The measurement as its file has it, with the shapes of the linears that it is of."""
    return {"shapes": {name: list(shape) for name, shape in shapes.items()}, "linears": as_dict(measured)}


def save(path: Path, measured: Measured, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a measurement, for other bit rates to use; raises OutputError, also when one is there now."""
    write_file(path, (json.dumps(as_file(measured, shapes)) + "\n").encode(), replace=False)


def digest(measured: Measured) -> str:
    """SHA-256 of a measurement: what --resume knows it by."""
    return hashlib.sha256(json.dumps(as_dict(measured), sort_keys=True).encode()).hexdigest()


def load(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Measured:
    """Read a measurement made for linears of these shapes [outputs, inputs]; raises CheckpointError."""
    found = read_object(path, RECORD, hint=REMAKE)
    try:
        measured = parsed(found["linears"])
        stated = {name: tuple(shape) for name, shape in found["shapes"].items()}
    except Exception as error:  # of any kind: the file may be anyone's
        raise CheckpointError(
            "is not a readable measurement",
            where=path,
            why=f"{type(error).__name__}: {str(error)[:120]}",
            hint=REMAKE,
        ) from None
    if stated != {name: tuple(shape) for name, shape in shapes.items()} or measured.keys() != shapes.keys():
        raise CheckpointError(
            "is of another model",
            where=path,
            why="its linears are not this model's, or of other shapes",
            hint=REMAKE,
        )
    return measured


def parsed(found: Any) -> Measured:
    """A measurement of its JSON; raises whatever one that is none makes it raise."""
    measured = {name: [Option(str(s), int(b), float(e)) for s, b, e in rows] for name, rows in found.items()}
    if not all(measured.values()) or not all(
        math.isfinite(o.error) and o.error >= 0 and o.bits > 0 for rows in measured.values() for o in rows
    ):
        raise ValueError("an error or a number of bits makes no sense")
    return measured
