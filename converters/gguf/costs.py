"""What each tensor of a model would cost in each type: nats of KL divergence, foretold without solving.

Of linears see dsconvert.quantization.costs. A row of the embedding is looked up and not
multiplied: 1/2 sum_t p_t sum_d s_d R_td^2, p the tokens' frequencies. A table that is both pays both.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.gguf import kernels
from converters.gguf.importance import Floats
from converters.gguf.qtypes import QType
from converters.gguf.rounding import dequantize
from dsconvert.decoder import linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Event
from dsconvert.quantization.costs import (
    after_feedback,
    linear_nats,
    measure_blocks,
    sensitivities_on_some,
    some_outputs,
)

if TYPE_CHECKING:
    import torch

OUTPUTS = 256  # of a linear's outputs as many are rounded, evenly spread
ROWS = 4096  # of the embedding's and the head's rows, the tokens' commonest first
WINDOWS = 32  # of the calibration windows as many are measured on
DAMP = 0.05  # of error feedback
Nats = dict[str, float]
Candidates = Mapping[str, Sequence[QType]]  # by a tensor's own name


@dataclass(frozen=True, eq=False)
class Costs:
    """Nats by a tensor's own name and type; `importance` by name of what an importance matrix has none for.

    That is float32 [d], the columns of the head by what it is given, and those of an embedding of its own by
    the states' sensitivities. A table that is both has none.
    """

    nats: dict[str, Nats]
    importance: dict[str, Floats]


def measure(
    decoder: st.Decoder, tokens: st.IntArray, types: Candidates, *, feedback: bool, seed: int = 0
) -> Generator[Event, None, Costs]:
    """What every tensor of `types` costs in each of its types, on calibration windows [n, length].

    `feedback` says that error feedback will choose the codes of linears. Raises QuantizationError that names
    a linear whose inputs or gradients are not finite.
    """
    tokens = tokens[:WINDOWS]
    s = yield from sensitivities_on_some(decoder, tokens, seed)
    hidden = linear_inputs.embed(decoder, tokens)

    def cost_of(place: int, group: linear_inputs.Group, same: linear_inputs.Group) -> dict[str, Nats]:
        L = after_feedback(group.moment, DAMP) if feedback else None
        found: dict[str, Nats] = {}
        for name in (name for name in group.names if name in types):
            W = st.read(decoder, name)
            nats = linear_costs(W, group.moment, s[name].to(W.device), types[name], L)
            share = group.rows / tokens.size  # of the tokens, for an expert
            found[name] = {kind: share * cost for kind, cost in nats.items()}
        return found

    nats = yield from measure_blocks(decoder, hidden, cost_of)
    ends = _ends(decoder, hidden, tokens, s, types, feedback)
    return Costs(nats | ends.nats, ends.importance)


def linear_costs(
    W: torch.Tensor, H: torch.Tensor, s: torch.Tensor, types: Sequence[QType], L: torch.Tensor | None = None
) -> Nats:
    """The nats of a linear W [N, K] by type, given its Hessian [K, K] and sensitivities [N].

    Rounded with the importance that a matrix of the same inputs has; with `L` [K], after error feedback.
    """
    at, weight = some_outputs(s, OUTPUTS)
    rows, importance = W[at].contiguous(), _column_weights(H)
    return {kind.name: linear_nats(_left(rows, kind, importance), H, weight, L) for kind in types}


def _column_weights(H: torch.Tensor) -> Floats:
    """The importance of the columns of what is given these inputs: the mean of their squares."""
    found: Floats = (H.diagonal() / 2).cpu().numpy().astype(np.float32)
    return found


def _left(rows: torch.Tensor, qtype: QType, importance: Floats | None) -> torch.Tensor:
    """What rounding to a type leaves of rows [n, K]."""
    import torch

    values = np.ascontiguousarray(rows.cpu().numpy())
    blocks = np.empty((len(values), qtype.nbytes(values.shape[1])), np.uint8)
    kernels.quantize(qtype, values, blocks, importance if kernels.takes_importance(qtype) else None)
    return torch.from_numpy(values - dequantize(blocks, qtype)).to(rows.device)


@dataclass(frozen=True, eq=False)
class _Sampled:
    """Rows of a table, and how many rows each stands for: the commonest for themselves, of the rest some."""

    rows: npt.NDArray[np.int64]
    common: int

    def weights(self, of_all: torch.Tensor) -> torch.Tensor:
        """What the rows weigh, so that the sum is that of `of_all` [vocab]; the rest share theirs."""
        import torch

        rows = torch.from_numpy(self.rows)
        found = of_all.double().cpu()[rows]
        rest = of_all.double().sum().cpu() - found[: self.common].sum()
        found[self.common :] *= rest / found[self.common :].sum().clamp(min=1e-30)
        return found.to(of_all.dtype).to(of_all.device)


def sampled(counts: npt.NDArray[np.int64]) -> _Sampled:
    """At most ROWS rows of a table of as many tokens: half of them the commonest, the rest evenly spread."""
    order = np.argsort(-counts, kind="stable")
    if len(counts) <= ROWS:
        return _Sampled(order, len(order))
    common, rest = order[: ROWS // 2], np.sort(order[ROWS // 2 :])
    some = rest[np.linspace(0, len(rest) - 1, ROWS // 2).astype(np.int64)]
    return _Sampled(np.concatenate((common, some)), ROWS // 2)


def _ends(
    decoder: st.Decoder,
    hidden: torch.Tensor,
    tokens: st.IntArray,
    s: Mapping[str, torch.Tensor],
    types: Candidates,
    feedback: bool,
) -> Costs:
    """The costs of embedding and head; of one table both."""
    norm = st.read(decoder, st.NORM).to(decoder.dtype)
    H = linear_inputs.measure_head(decoder, hidden, norm).moment
    counts = np.bincount(tokens.ravel(), minlength=decoder.config.vocab_size)
    rows = sampled(counts)
    tied = decoder.head == st.EMBED
    L = after_feedback(H, DAMP) if feedback and not tied else None
    importance: dict[str, Floats] = {}
    if not tied:
        importance = {st.EMBED: s[st.EMBED].cpu().numpy(), decoder.head: _column_weights(H)}
    nats: dict[str, Nats] = {}
    for name in dict.fromkeys((st.EMBED, decoder.head)):
        if name not in types:
            continue
        W = _rows_of(decoder, name, rows.rows)
        for qtype in types[name]:
            R = _left(W, qtype, importance.get(name))
            cost = 0.0
            if name == st.EMBED:
                p = _frequencies(counts).to(R.device)
                cost += _looked_up_nats(R, rows.weights(p), s[st.EMBED].to(R.device))
            if name == decoder.head:
                cost += linear_nats(R, H, rows.weights(s[st.HEAD].to(R.device)), L)
            nats.setdefault(name, {})[qtype.name] = cost
    return Costs(nats, importance)


def _frequencies(counts: npt.NDArray[np.int64]) -> torch.Tensor:
    """How often each token comes: by the calibration text, each once more, for it does not know all."""
    import torch

    return torch.from_numpy((counts + 1) / (counts + 1).sum()).float()


def _looked_up_nats(R: torch.Tensor, p: torch.Tensor, s: torch.Tensor) -> float:
    return float((R.square() @ s).double() @ p.double()) / 2


def _rows_of(decoder: st.Decoder, name: str, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """Some rows of a table, read in slices."""
    import torch

    found = torch.empty((len(rows), decoder.config.hidden_size))
    for part in st.slices(decoder.config.vocab_size, decoder.config.hidden_size):
        inside = (rows >= part.start) & (rows < part.stop)
        if inside.any():
            piece = st.read(decoder, name, part).cpu()
            found[torch.from_numpy(inside)] = piece[torch.from_numpy(rows[inside] - part.start)]
    return found.to(decoder.device)
