"""What the inputs of linears say, factored once for all linears that have the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsconvert.quantization import error_feedback
from dsconvert.quantization.error_feedback import Factor

if TYPE_CHECKING:
    import torch

DAMP = 0.05


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a linear's inputs say: H [K, K] = 2/n X^T X, factored in the order `columns`, and its diagonal as
    the `importance` of an importance matrix. Without a factor `why` says why there is none.
    """

    H: torch.Tensor
    columns: torch.Tensor
    dead: torch.Tensor
    importance: npt.NDArray[np.float32]
    factor: Factor | None
    why: str | None


def measured(H: torch.Tensor, damp: float = DAMP, by_activity: bool = True) -> Inputs:
    """What H says, which is not changed; in the order of activity, the most active first, or as it is."""
    import torch

    diagonal = H.diagonal()
    columns, dead = torch.arange(len(H), device=H.device), diagonal == 0
    if by_activity:
        columns = diagonal.argsort(descending=True, stable=True)
    importance = (diagonal.double() / 2).float().cpu().numpy()
    factor, why = None, None
    if bool(dead.all()):
        why = "no input of this linear was ever active"
    else:
        factor = error_feedback.factorize(H, dead, columns, damp)
        why = None if factor else "the Hessian is not positive definite at any damping"
    return Inputs(H, columns, dead, importance, factor, why)


def untrusted(H: torch.Tensor, why: str) -> Inputs:
    """What is left of an H of too few inputs: what an importance matrix says, ones where none came."""
    diagonal = H.diagonal()
    importance = (diagonal.double() / 2).float().cpu().numpy()
    if not importance.any():
        importance = np.ones_like(importance)
    return Inputs(H, diagonal.argsort(descending=True, stable=True), diagonal == 0, importance, None, why)


def remembering(damp: float = DAMP, by_activity: bool = True) -> Callable[[torch.Tensor], Inputs]:
    """As `measured`, and the same again for the H that was asked for last."""
    seen: list[tuple[torch.Tensor, Inputs]] = []

    def inputs_of(H: torch.Tensor) -> Inputs:
        if not seen or seen[0][0] is not H:
            seen[:] = []  # before the next factor takes its memory
            seen.append((H, measured(H, damp, by_activity)))
        return seen[0][1]

    return inputs_of
