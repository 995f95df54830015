"""What each tensor of a model would cost in each type: nats of KL divergence, foretold without solving.

Of linears see dsconvert.quantization.costs; a stack of experts costs what all of them do, each by the tokens
that come to it. A row of the embedding is looked up and not multiplied: 1/2 sum_t p_t sum_d s_d R_td^2, p the
tokens' frequencies. A table that is both pays both
(see dsconvert.quantization.tied_table).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
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
from dsconvert.models.architectures import find_architecture
from dsconvert.models.stored_rows import by_source
from dsconvert.models.tensor_table import HEADS_TURNED, Spec, plan
from dsconvert.quantization.costs import (
    after_feedback,
    linear_nats,
    measure_blocks,
    sensitivities_on_some,
    some_outputs,
)
from dsconvert.quantization.few_tokens import told_of_costs, too_few
from dsconvert.quantization.tied_table import looked_up_too

if TYPE_CHECKING:
    import torch

OUTPUTS = 256  # of a tensor's outputs as many are rounded, evenly spread
LEAST_OUTPUTS = 32  # of each expert's
ROWS = 4096  # of the embedding's and the head's rows, the tokens' commonest first
WINDOWS = 32  # of the calibration windows as many are measured on
DAMP = 0.05  # of error feedback
Nats = dict[str, float]
Candidates = Mapping[str, Sequence[QType]]  # by GGUF name


@dataclass(frozen=True, eq=False)
class Costs:
    """Nats by tensor and type; `importance` by tensor of what an importance matrix has none for.

    That is float32 [d], the columns of the head by what it is given, and those of an embedding by the states'
    sensitivities; of a table that is both by both.
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
    table = find_architecture(decoder.config.architecture).table
    specs = [spec for spec in plan(table, decoder.config, decoder.shapes) if spec.gguf in types]
    measuring = _Measuring(decoder, by_source(specs), types, s, tokens.size, feedback)
    found = yield from measure_blocks(decoder, hidden, measuring.cost_of)
    yield from told_of_costs(measuring.few)
    inner = (spec for spec in specs if spec.layer is not None)
    nats = {spec.gguf: {kind.name: math.fsum(found[part][kind.name] for part in _parts(spec))
                        for kind in types[spec.gguf]} for spec in inner}  # fmt: skip
    ends = _ends(decoder, hidden, tokens, s, {spec.hf: spec.gguf for spec in specs}, types, feedback)
    return Costs(nats | ends.nats, ends.importance)


def _parts(spec: Spec) -> list[str]:
    """What the costs of a tensor's matrices go by: a tensor stacks those of experts."""
    return [f"{spec.gguf}/{number}" for number in range(spec.many)]


@dataclass(frozen=True, eq=False)
class _Measuring:
    """Tells what tensors of a block cost from what their matrices are given.

    `specs` by a matrix's name are the tensors made of it, `s` the sensitivities. `latent` is what latent
    attention's matrices were given, until the queries are known too; `few` names the matrices of experts to
    which few tokens came, `all_tokens` is how many there are.
    """

    decoder: st.Decoder
    specs: Mapping[str, Sequence[Spec]]
    types: Candidates
    s: Mapping[str, torch.Tensor]
    all_tokens: int
    feedback: bool
    latent: dict[str, torch.Tensor] = field(default_factory=dict)
    few: list[str] = field(default_factory=list)

    def cost_of(self, place: int, group: linear_inputs.Group, same: linear_inputs.Group) -> dict[str, Nats]:
        """The nats of a group's tensors, of stacks by the number of the matrix.

        An expert counts by the share of the tokens that come to it; of few of them, and of none, no error
        feedback is foretold, for none is made.
        """
        if group.moment.ndim == 3:
            return self._keys(group)
        found: dict[str, Nats] = {}
        few = too_few(group) is not None
        L = after_feedback(group.moment, DAMP) if self.feedback and not few else None
        self.few.extend(group.names if few else ())
        for name in (name for name in group.names if name in self.specs):
            W, s = st.read(self.decoder, name), self.s[name]
            for spec in self.specs[name]:
                kinds, many = self.types[spec.gguf], spec.many
                if spec.row.transform is HEADS_TURNED:
                    self.latent[name] = group.moment
                    continue
                rows = _rows_taken(spec)
                outputs = max(LEAST_OUTPUTS, OUTPUTS // many)
                nats = linear_costs(W[rows], group.moment, s[rows].to(W.device), kinds, L, outputs)
                share = group.rows / self.all_tokens
                found[f"{spec.gguf}/{spec.names.index(name)}"] = {k: share * c for k, c in nats.items()}
        return found

    def _keys(self, group: linear_inputs.Group) -> dict[str, Nats]:
        """The nats of the keys' matrices of all heads, whose rows a runtime gives the queries."""
        (name,) = group.names
        own = [spec for spec in self.specs.get(name, ()) if spec.row.transform is HEADS_TURNED]
        if not own:
            return {}
        (spec,), W = own, st.read(self.decoder, name)
        rows = _rows_taken(spec)
        W, s = W[rows].reshape(spec.units, -1, W.shape[1]), self.s[name][rows].to(W.device)
        moments = (self.latent.pop(name), group.moment)
        nats = keys_costs(W, *moments, s.reshape(spec.units, -1), self.types[spec.gguf], self.feedback)
        return {f"{spec.gguf}/0": nats}


def _rows_taken(spec: Spec) -> slice | torch.Tensor:
    """The rows of a matrix that are in a tensor: of each head some, of most tensors all."""
    import torch

    if spec.row.part is None:
        return slice(None)
    return torch.arange(spec.source[0]).reshape(spec.units, -1)[:, slice(*spec.part)].reshape(-1)


def keys_costs(
    W: torch.Tensor,
    H: torch.Tensor,
    queries: torch.Tensor,
    s: torch.Tensor,
    types: Sequence[QType],
    feedback: bool,
) -> Nats:
    """The nats by type of latent attention's keys W [heads, N, K], rounded as files have them, [heads, K, N].

    As any linear's, by the moment `H` [K, K] of the latent vectors and the sensitivities `s` [heads, N].
    Their rounding goes by the moments of the `queries` [heads, N, N] that a runtime multiplies them by: so
    does error feedback, which leaves the share of that cost that it leaves of the queries' products.
    """
    nats = {kind.name: 0.0 for kind in types}
    for own, of_queries, weight in zip(W, queries, s, strict=True):
        turned = own.T.contiguous()
        L = after_feedback(of_queries, DAMP) if feedback else None
        for kind in types:
            left = _left(turned, kind, _column_weights(of_queries))
            nats[kind.name] += linear_nats(left.T, H, weight, None) * _share_left(left, of_queries, H, L)
    return nats


def _share_left(left: torch.Tensor, queries: torch.Tensor, H: torch.Tensor, L: torch.Tensor | None) -> float:
    """What error feedback leaves of the products of errors [K, N] with queries, each by its latent value."""
    if L is None:
        return 1.0
    by = H.diagonal().to(left.device)
    plain = linear_nats(left, queries, by, None)
    return linear_nats(left, queries, by, L) / plain if plain > 0 else 1.0


def linear_costs(
    W: torch.Tensor,
    H: torch.Tensor,
    s: torch.Tensor,
    types: Sequence[QType],
    L: torch.Tensor | None = None,
    outputs: int = OUTPUTS,
) -> Nats:
    """The nats of a linear W [N, K] by type, given its Hessian [K, K] and sensitivities [N].

    Rounded with the importance that a matrix of the same inputs has; with `L` [K], after error feedback. Of
    the outputs some stand for all, `outputs` or more.
    """
    at, weight = some_outputs(s, outputs)
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
    stored: Mapping[str, str],
    types: Candidates,
    feedback: bool,
) -> Costs:
    """The costs of embedding and head, `stored` by these names; of one table both."""
    norm = st.read(decoder, st.NORM).to(decoder.dtype)
    H = linear_inputs.measure_head(decoder, hidden, norm).moment
    counts = np.bincount(tokens.ravel(), minlength=decoder.config.vocab_size)
    rows = sampled(counts)
    if decoder.head == st.EMBED:
        H = looked_up_too(H, s)
    L = after_feedback(H, DAMP) if feedback else None
    found = Costs({}, {})
    for name in dict.fromkeys((st.EMBED, decoder.head)):
        if name not in stored:
            continue
        gguf = stored[name]
        importance = _column_weights(H) if name == decoder.head else s[st.EMBED].cpu().numpy()
        found.importance[gguf] = importance
        W = _rows_of(decoder, name, rows.rows)
        for qtype in types[gguf]:
            R = _left(W, qtype, importance)
            if name == decoder.head:
                cost = linear_nats(R, H, rows.weights(s[st.HEAD].to(R.device)), L)
            else:
                p = _frequencies(counts).to(R.device)
                cost = _looked_up_nats(R, rows.weights(p), s[st.EMBED].to(R.device))
            found.nats.setdefault(gguf, {})[qtype.name] = cost
    return found


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
