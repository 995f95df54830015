"""What a linear's weight errors do to its outputs, by the reference's own inputs, against plain rounding.

Error feedback and importance give up some of the weights' signal to noise for smaller errors where the inputs
are large: of the outputs a faithful matrix loses no more than plain rounding does, whatever its type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dsconvert.models.weights import Floats, WeightSource
from dsconvert.proof.figures import TensorError

Observer = Callable[[Any], None]
Errors = tuple[Any, Any]  # of the candidate's rows, and of plain rounding's
AT_FIRST = 1 << 20  # values of a matrix that are rounded at first
AT_ONCE = 1 << 24  # values that are rounded together then
LEAST_ROWS = 64
ENOUGH = 512  # tokens: the ratio of two losses does not change with more


def rounded(
    source: WeightSource, name: str, start: int, base: Any, candidate: Any, every: bool = False
) -> Floats | None:
    """What plain rounding makes of the rows of `base`, those from `start` on, in the type of a tensor.

    `base` and `candidate` are of numpy or of torch. Returns the first rows, or all rows where the first are
    the candidate's or `every` one is asked for: a matrix that is not rounded plainly is judged by some rows
    as well as by all, and rounding it may cost what making it did. None where nothing rounds to the type.
    """
    rows = base.reshape(-1, base.shape[-1])
    count = max(LEAST_ROWS, AT_FIRST // rows.shape[1])
    found = source.nearest(name, start, _host(rows[:count]))
    if found is None or len(rows) <= count:
        return found
    if not every and not np.array_equal(found, _host(candidate.reshape(rows.shape)[:count])):
        return found
    made = np.empty(rows.shape, np.float32)
    made[:count] = found
    step = max(LEAST_ROWS, AT_ONCE // rows.shape[1])
    for first in range(count, len(rows), step):
        others = source.nearest(name, start + first, _host(rows[first : first + step]))
        if others is None:
            return None
        made[first : first + step] = others
    return made


def errors_of(base: Any, candidate: Any, made: Floats) -> Errors:
    """The errors of the rows of `base` that were rounded: the candidate's, and those of plain rounding."""
    base, candidate = base[: len(made)], candidate[: len(made)]
    if isinstance(base, np.ndarray):
        return candidate - base, made - base
    return candidate.float() - base.float(), base.new_tensor(made).float() - base.float()


def _host(values: Any) -> Floats:
    """An array of numpy or torch as one of numpy."""
    found: Floats = values if isinstance(values, np.ndarray) else values.cpu().numpy()
    return found


@dataclass
class Losses:
    """Sums of |(Q - W) x|^2 and |(N - W) x|^2 over inputs x, of the rounded rows of each linear, by name.

    `observers` are those of the block at hand.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)
    observers: dict[str, Observer] = field(default_factory=dict)

    def watch(self, name: str, errors: Callable[[], Iterator[Errors]]) -> None:
        """Count the inputs [..., K] that the linear `name` will be given, up to ENOUGH of them.

        `errors` gives those of its rounded rows, some at a time, as often as there are inputs.
        """
        seen = 0

        def count(x: Any) -> None:
            nonlocal seen
            total = self.sums.setdefault(name, [0.0, 0.0])  # of a linear that is run: the head is not
            inputs = x.reshape(-1, x.shape[-1])[: ENOUGH - seen]
            inputs = inputs if isinstance(inputs, np.ndarray) else inputs.float()
            seen += len(inputs)
            for both in errors() if len(inputs) else ():
                for i, error in enumerate(both):
                    total[i] += float(np.square(_host(inputs @ error.T), dtype=np.float64).sum())

        self.observers[name] = count

    def ratio(self, name: str) -> float | None:
        """The candidate's loss by that of plain rounding; None of a linear that was given no input."""
        loss, plain = self.sums.get(name, (0.0, 0.0))
        if not loss and not plain:
            return None
        return loss / plain if plain else math.inf

    def noted(self, tensors: Sequence[TensorError]) -> tuple[TensorError, ...]:
        """The tensors with their ratios."""
        return tuple(replace(tensor, loss=self.ratio(tensor.name)) for tensor in tensors)
