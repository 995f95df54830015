"""The figures of a comparison: what is computed for each token, each block and each tensor, and their means.

Names and definitions are those of llama.cpp's perplexity tool (tools/perplexity, --kl-divergence), where
"base" is the reference and Q the candidate. Three differences: everything after the logits is done in
float64; KL counts the whole vocabulary, where llama.cpp stores the base in 16 bits per log-probability and
leaves out what is below exp(-16); and an uncertainty is given from two values on, not from eleven.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Doubles = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
PERCENTILES = (90.0, 95.0, 99.0, 99.9)
TOP = 5


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class TokenFigures:
    """One value per scored token, in order: arrays of equal length.

    `target` is the token that follows in the text; `window` and `position` say where its prediction was
    made. `nll_base`, `nll` are -ln p(target) in nats; `kld` is KL(base || Q) in nats; `top_base` and `top`
    the likeliest tokens; `overlap` the share of the base's five likeliest tokens that are among Q's.
    """

    window: IntArray
    position: IntArray
    target: IntArray
    nll_base: Doubles
    nll: Doubles
    kld: Doubles
    top_base: IntArray
    top: IntArray
    overlap: Doubles

    @property
    def p_diff(self) -> Doubles:
        """p_Q(target) - p_base(target)."""
        return np.exp(-self.nll) - np.exp(-self.nll_base)


@dataclass(frozen=True)
class Figures:
    """What a comparison comes to, over `tokens` scored tokens; KL in nats, shares from 0 to 1."""

    tokens: int
    ppl: Estimate
    ppl_base: Estimate
    ppl_ratio: Estimate
    kld: Estimate
    kld_median: float
    kld_percentiles: dict[str, float]
    kld_max: float
    p_diff: Estimate
    p_diff_rms: Estimate
    same_top: Estimate
    top5_overlap: float
    bits_per_byte: float | None = None
    bits_per_byte_base: float | None = None


@dataclass(frozen=True)
class Foretold:
    """Of the model of `foretold`, means over the scored tokens in nats: KL(base || it), and KL(it || Q)."""

    kld: Estimate
    apart: Estimate


@dataclass(frozen=True)
class BlockError:
    """How far the candidate's hidden states are from the reference's after block `index`.

    `relative` is the mean over tokens of |q - base| / |base|, `cosine` the mean over tokens of their cosine.
    A mean of ratios, since a few tokens carry activations a thousand times larger than the others'.
    `update` is set where both blocks ran on the same input x: the mean over tokens of
    |q - base| / |base - x|, the error of what the block adds. `foretold` is what the errors of the weights
    foretell of `update` where that is set, else of `relative`.
    """

    index: int
    relative: float
    cosine: float
    update: float | None = None
    foretold: float | None = None

    @property
    def error(self) -> float:
        """`update` where it is set, else `relative`."""
        return self.relative if self.update is None else self.update


@dataclass(frozen=True)
class RowFault:
    """What is wrong and where: "row 3 (head 0)" or "column 5", in the Hugging Face layout; in words."""

    where: str
    why: str


@dataclass(frozen=True)
class TensorError:
    """The error of a tensor's values: `snr` = 10 log10(sum base^2 / sum (q - base)^2) dB, inf if equal.

    `rows` of it were compared each on its own, with `faults`. `lost` is the dB that plain rounding to the
    same type has more, of the rows that were held against it; None where none was.
    `loss` is the error of a linear's outputs on the reference's inputs by that of plain rounding, where the
    two differ and the linear was run. `fed`: it lost some, and its codes are by error feedback.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    snr: float
    rows: int = 0
    faults: tuple[RowFault, ...] = ()
    lost: float | None = None
    loss: float | None = None
    fed: bool = False


def token_figures(
    base: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor, *, floor: float | None = None
) -> dict[str, Any]:
    """Logits [tokens, vocab] of both and the tokens that follow: the measured columns of TokenFigures.

    With `floor`, `base` holds log-probabilities, and those at or below it are left out of KL.
    """
    log_base = base.double() if floor is not None else base.double().log_softmax(-1)
    return log_figures(log_base, candidate.double().log_softmax(-1), targets, floor=floor)


def log_figures(
    log_base: torch.Tensor, log_q: torch.Tensor, targets: torch.Tensor, *, floor: float | None = None
) -> dict[str, Any]:
    """As `token_figures`, of log-probabilities in float64."""
    terms = log_base.exp() * (log_base - log_q)
    kld = (terms if floor is None else terms.where(log_base > floor, 0.0)).sum(-1)
    index = targets[:, None]
    count = min(TOP, log_base.shape[1])
    five_base, five = log_base.topk(count).indices, log_q.topk(count).indices
    same = (five_base[:, :, None] == five[:, None, :]).any(-1)
    columns = {
        "nll_base": -log_base.gather(1, index)[:, 0],
        "nll": -log_q.gather(1, index)[:, 0],
        "kld": kld.clamp(min=0.0) if floor is None else kld,  # rounding can give -1e-17; a NaN stays one
        "top_base": log_base.argmax(-1),
        "top": log_q.argmax(-1),
        "overlap": same.double().mean(-1),
    }
    return {name: column.cpu().numpy() for name, column in columns.items()}


def joined(parts: list[dict[str, Any]]) -> TokenFigures:
    """The columns of every part, end to end."""
    names = [f.name for f in fields(TokenFigures)]
    return TokenFigures(**{name: np.concatenate([part[name] for part in parts]) for name in names})


def summary(tokens: TokenFigures, token_bytes: IntArray | None = None) -> Figures:
    """The means over all scored tokens; bits per byte need `token_bytes` [vocab], each token's length."""
    nll, base, kld = tokens.nll, tokens.nll_base, tokens.kld
    log_ratio = mean(nll - base)
    rms = mean(tokens.p_diff**2)
    root = math.sqrt(rms.value)
    length = None if token_bytes is None else float(token_bytes[tokens.target].sum())
    median, *percentiles, largest = np.percentile(kld, (50.0, *PERCENTILES, 100.0))
    return Figures(
        tokens=len(kld),
        ppl=exponential(mean(nll)),
        ppl_base=exponential(mean(base)),
        # The paired difference: the text's own spread cancels, as with llama.cpp's covariance term.
        ppl_ratio=exponential(log_ratio),
        kld=mean(kld),
        kld_median=float(median),
        kld_percentiles={f"{p:g}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
        kld_max=float(largest),
        p_diff=mean(tokens.p_diff),
        p_diff_rms=Estimate(root, rms.error / (2 * root) if root else 0.0),
        same_top=mean((tokens.top == tokens.top_base).astype(np.float64)),
        top5_overlap=float(tokens.overlap.mean()),
        bits_per_byte=float(nll.sum() / math.log(2) / length) if length else None,
        bits_per_byte_base=float(base.sum() / math.log(2) / length) if length else None,
    )


def mean(values: Doubles) -> Estimate:
    """The mean and its standard error, sqrt((<x^2> - <x>^2) / (n - 1))."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > 1 else 0.0)


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate, its error propagated to first order; inf where it overflows."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value, value * estimate.error)


def hidden_error(base: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token of hidden states [..., d]: |q - base| / |base|, and the cosine; float32, 0 and 1 if equal."""
    import torch

    b, q = base.float(), candidate.float()
    size = torch.linalg.vector_norm(b, dim=-1)
    error = torch.linalg.vector_norm(q - b, dim=-1)
    tiny = torch.finfo(torch.float32).tiny
    cosine = (b * q).sum(-1) / (size * torch.linalg.vector_norm(q, dim=-1)).clamp(min=tiny)
    return error / size.clamp(min=tiny), torch.where(error == 0, 1.0, cosine)


def update_error(start: torch.Tensor, base: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Per token of hidden states [..., d] that came from the same `start`: |q - base| / |base - start|."""
    import torch

    size = torch.linalg.vector_norm(base.float() - start.float(), dim=-1)
    error = torch.linalg.vector_norm(candidate.float() - base.float(), dim=-1)
    result: torch.Tensor = error / size.clamp(min=torch.finfo(torch.float32).tiny)
    return result


def decibel(signal: float, noise: float) -> float:
    """Signal to noise of two energies: inf without noise, -inf without signal, nan when not finite."""
    if not math.isfinite(signal + noise):
        return math.nan
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
