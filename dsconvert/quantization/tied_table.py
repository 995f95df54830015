"""A table that is embedding and head: what it is given as the one, with what it costs as the other."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Event
from dsconvert.quantization.costs import sensitivities_on_some
from dsconvert.quantization.run import Run

if TYPE_CHECKING:
    import torch

Sensitivities = Mapping[str, "torch.Tensor"]


def of_table(run: Run) -> Generator[Event, None, Sensitivities]:
    """The sensitivities of both, on some of a run's windows; all processes call it."""
    found: Sensitivities | None = None
    with run.ranks.together():
        if run.ranks.first:
            every = yield from sensitivities_on_some(run.decoder, run.calibration.tokens, seed=0)
            found = {name: every[name] for name in (st.HEAD, st.EMBED)}
    told = run.ranks.shared(found)
    assert told is not None  # an error of the first process has ended all
    return told


def looked_up_too(H: torch.Tensor, s: Sensitivities) -> torch.Tensor:
    """H [d, d] of the head with what its table costs as the embedding, `s` being the sensitivities of both.

    A row t that is R_t off costs 1/4 s_t R_t H R_t^T nats as the head's, s_t = E[p_t (1 - p_t)], and 1/2 p_t
    sum_d s_d R_td^2 where it is looked up, p_t of the times. With p_t = s_t / sum s, a token being looked up
    as often as it is predicted, both are 1/4 s_t R_t (H + 2 / sum s diag(s_d)) R_t^T.
    """
    return H + (2 / s[st.HEAD].sum().clamp(min=1e-30) * s[st.EMBED]).diag().to(H)
