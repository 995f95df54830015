"""What a conversion of each type must reach to pass, and the verdict.

The limits separate a faithful conversion from a defect; they do not rate a type.
They were set from ggml's own quantizations of two models, the more fragile of which (SmolLM2-135M: mean KLD
.0011 at q8_0, .0054 at q6_k, .080 at q4_k, .35 at q4_0, where a 2-million-weight model has .00001, .0002,
.003, .004) has to pass with some room. A big model should stay far below them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from dsconvert.errors import UsageError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Thresholds:
    """Limits: mean KL divergence in nats, PPL(Q)/PPL(base), share of tokens with the same top token.

    `max_update` bounds a single block's error on the reference's input, see BlockError.update. The top token
    is judged where a limit is given only: where a model is undecided, as one of random weights is everywhere,
    the least noise turns it (a faithful q6_k of such a model keeps 83 %, q4_0 52 %, gptq4 32 %). Median and
    90 % quantile of the divergence are judged of models of experts, see routing.
    """

    max_kld: float
    max_ppl_ratio: float
    max_update: float = 0.7
    min_top1: float | None = None
    median_kld: float | None = None
    high_kld: float | None = None


LIMITS: dict[str, Thresholds] = {
    "f32": Thresholds(1e-6, 1.0001, 1e-4),
    "f16": Thresholds(1e-3, 1.005, 0.02),
    "bf16": Thresholds(1e-3, 1.005, 0.02),
    "q8_0": Thresholds(0.005, 1.01, 0.04),
    "q6_k": Thresholds(0.03, 1.03, 0.06),
    "q5": Thresholds(0.20, 1.25, 0.25),
    "q4": Thresholds(0.30, 1.40, 0.4),
    "q4_0": Thresholds(0.70, 1.80, 0.4),
    "q3": Thresholds(0.80, 2.00, 0.5),
    "q2": Thresholds(1.50, 3.00, 0.7),
    # Measured with an importance matrix, where one is needed, on the small sample: .007, .04 and .13.
    "iq4": Thresholds(0.30, 1.40, 0.4),
    "iq3": Thresholds(1.00, 2.20, 0.5),
    "iq2": Thresholds(2.00, 4.00, 0.8),
    # Ternary levels destroy a model that was not trained for them (.8, 6 times the perplexity; SmolLM2-135M
    # 12.1 nats). What the errors of the weights foretell is the bound.
    "tq1": Thresholds(math.inf, math.inf, 1.2),
    "tq2": Thresholds(math.inf, math.inf, 1.2),
    "mxfp4": Thresholds(0.70, 1.80, 0.4),
    "nvfp4": Thresholds(0.70, 1.80, 0.4),
    "gptq8": Thresholds(0.005, 1.01, 0.04),
    "gptq4": Thresholds(0.70, 1.80, 0.4),
    "gptq3": Thresholds(1.50, 3.00, 0.7),
    # Two bits in groups of 128 may leave nothing of a small model: SmolLM2-135M 13.4 nats, rounded to nearest
    # 14.8. As above.
    "gptq2": Thresholds(math.inf, math.inf, 1.0),
    # The same solver and grid as GPTQ's: of compressed-tensors.
    "w8a16": Thresholds(0.005, 1.01, 0.04),
    "w6a16": Thresholds(0.05, 1.05, 0.1),
    "w5a16": Thresholds(0.20, 1.25, 0.25),
    "w4a16": Thresholds(0.70, 1.80, 0.4),
    "w3a16": Thresholds(1.50, 3.00, 0.7),
    "w2a16": Thresholds(math.inf, math.inf, 1.0),
    "fp8": Thresholds(0.05, 1.05, 0.1),
    # MLX's grid, with embedding and head on it too.
    "mlx8": Thresholds(0.005, 1.01, 0.04),
    "mlx6": Thresholds(0.05, 1.05, 0.1),
    "mlx5": Thresholds(0.20, 1.25, 0.25),
    "mlx4": Thresholds(0.70, 1.80, 0.4),
    "mlx3": Thresholds(1.50, 3.00, 0.7),
    "mlx2": Thresholds(math.inf, math.inf, 1.0),
    "exl2_8": Thresholds(0.005, 1.01, 0.04),
    "exl2_6": Thresholds(0.05, 1.05, 0.1),
    "exl2_5": Thresholds(0.20, 1.25, 0.25),
    "exl2_4": Thresholds(0.70, 1.80, 0.4),
    "exl2_3": Thresholds(1.50, 3.00, 0.7),
    "exl2_2": Thresholds(math.inf, math.inf, 1.0),
}


@dataclass(frozen=True)
class EngineLimits:
    """How near a real runtime must come to what its own arithmetic predicts of the file.

    `ppl` bounds |PPL(engine)/PPL(predicted) - 1| beyond three standard errors. Rounding is chaotic: the last
    bit of a sum decides which way the next value goes, so two runs of the same arithmetic are as far apart as
    two roundings. `spread` bounds KL(predicted || engine) in multiples of what rounding itself does,
    KL(weights || predicted), and `least` nats are always allowed.
    """

    ppl: float = 0.003
    spread: float = 4.0
    least: float = 1e-5


ENGINE_LIMITS = EngineLimits()

# The least signal to noise in dB of a tensor stored in a type: about 7 dB below the least that was measured
# (q8_0 43.7, q6_k 34.7, q5_0 25.1, q4_0 19.1, q3_k 16.4, q2_k 10.5, bf16 55). Weights in the wrong place
# give -3 dB and zeroed ones 0 dB, whatever the type.
SNR_FLOOR: dict[str, float] = {
    "f32": 100.0,
    "f16": 40.0,
    "bf16": 45.0,
    "q8_0": 36.0,
    "q6_k": 28.0,
    "q5": 18.0,
    "q4": 12.0,
    "q3": 9.0,
    "q2": 4.0,
    # Less room for what only a grid holds: few columns with large weights alone cost it 4 to 7 dB (measured
    # on the sample and on random rows of five shapes: iq4 18.1, mxfp4 15.4, iq3_s 10.8, iq3_xxs 9.3,
    # iq2_s 4.3, iq2_xxs 2.1, tq 1.6).
    "iq4": 12.0,
    "mxfp4": 9.0,
    "nvfp4": 12.0,
    "iq3": 5.0,
    "iq2": 1.0,
    "tq1": 0.5,
    "tq2": 0.5,
    # GPTQ trades error of weights for error of outputs: measured 38.6, 15.6, 7.3 and 1.7 dB at the least.
    "gptq8": 30.0,
    "gptq4": 8.5,
    "gptq3": 3.5,
    "gptq2": 0.5,
    "w8a16": 30.0,
    "w6a16": 19.0,
    "w5a16": 13.5,
    "w4a16": 8.5,
    "w3a16": 3.5,
    "w2a16": 0.5,
    "mlx8": 30.0,
    "mlx6": 19.0,
    "mlx5": 13.5,
    "mlx4": 8.5,
    "mlx3": 3.5,
    "mlx2": 0.5,
    "fp8": 24.0,  # e4m3, a scale for 128 by 128: 31 and more
    # As GPTQ, by the average width of a tensor's codes; 5 and 6 bits between, 6 dB a bit.
    "exl2_8": 30.0,
    "exl2_6": 19.0,
    "exl2_5": 13.5,
    "exl2_4": 8.5,
    "exl2_3": 3.5,
    "exl2_2": 0.5,
}
ANY_FLOOR = 3.0
_BITS = re.compile(r"(q|iq|tq)\d|(mx|nv)fp4")


def thresholds_for(
    quant: str,
    *,
    max_kld: float | None = None,
    max_ppl_ratio: float | None = None,
    min_top1: float | None = None,
) -> Thresholds:
    """The limits of a type or mixture ("q4_k_m"), each replaced by the one given.

    Raises UsageError for an unknown type unless those of KL and perplexity are given.
    """
    given = {"max_kld": max_kld, "max_ppl_ratio": max_ppl_ratio, "min_top1": min_top1}
    changes = {name: value for name, value in given.items() if value is not None}
    base = _row(LIMITS, quant)
    if base is None:
        if max_kld is None or max_ppl_ratio is None:
            raise UsageError(
                f"there are no thresholds for {quant!r}",
                why=f"known: {', '.join(LIMITS)} and their mixtures",
                hint="Give --max-kld and --max-ppl-ratio",
            )
        return Thresholds(max_kld, max_ppl_ratio, min_top1=min_top1)
    return replace(base, **changes)


def widest(types: Iterable[tuple[str, int]]) -> str:
    """Of tensors' types and how many weights each has, the one of widest limits that has a twentieth of all.

    The last line behind the limits that go by plain rounding: what a file says of its type has no part in it.
    The commonest where none is known. Raises ValueError without types.
    """
    found = list(types)
    least = sum(count for _, count in found) / 20
    known = [(limits.max_kld, kind) for kind, n in found if n >= least and (limits := _row(LIMITS, kind))]
    return max(known)[1] if known else max(found, key=lambda one: one[1])[0]


def snr_floor(tensor_type: str) -> float:
    """The least signal to noise in dB that a tensor of this type must have."""
    floor = _row(SNR_FLOOR, tensor_type)
    return ANY_FLOOR if floor is None else floor


def _row(table: dict[str, Row], name: str) -> Row | None:
    """The row of `name`, or of its number of bits: q4_k_m -> q4, iq3_xs -> iq3."""
    name = name.lower()
    bits = _BITS.match(name)
    return table.get(name, table.get(bits[0] if bits else name))
