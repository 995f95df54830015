"""What a proof over sparse attention needs besides: whether keys are left out of its windows at all.

An indexer chooses a query's keys by scores that lie near each other, so the least noise turns some of them,
and the divergence says more of that than of the weights (q8_0 of a random model that keeps 64 of 300 keys:
median .073; of the same that keeps all, .0024). There what the errors of the weights foretell is the limit.
"""

from __future__ import annotations

import math
from dataclasses import replace

from dsconvert.models.config import ModelConfig
from dsconvert.proof.options import ProofOptions
from dsconvert.proof.thresholds import Thresholds


def sparse_limits(
    limits: Thresholds, config: ModelConfig, length: int, asked: ProofOptions
) -> tuple[Thresholds, str]:
    """The limits over windows of `length` tokens, and what to say of them; "" of attention to all keys.

    A limit that was asked for stays.
    """
    latent = config.latent
    if latent is None or latent.indexer is None:
        return limits, ""
    top = latent.indexer.top
    if length <= top:
        said = f"windows of {length} tokens: the indexer, which keeps {top} keys, leaves none out of them"
        return limits, f"{said}; --length {2 * top} tries its choice too"
    said = f"windows of {length} tokens: the indexer keeps {top} keys of them, and noise turns its choice"
    mean, ratio = (math.inf if limit is None else limit for limit in (asked.max_kld, asked.max_ppl_ratio))
    free = replace(limits, max_kld=mean, max_ppl_ratio=ratio, median_kld=None, high_kld=None)
    return free, f"{said}; the divergence is held against what the errors of the weights foretell"
