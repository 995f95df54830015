"""What a proof of a model of experts needs besides: tokens that go to other experts than the reference's.

Where two scores are near each other the least noise turns the choice, and the token's divergence is of its
own kind: few tokens bear most of a mean (q8_0 of random models of DeepSeek-V3's layout: mean .013, median
.0018, 90 % quantile .039). So the median is judged by what a dense model's mean must keep, and mean and
quantile by more.
"""

from __future__ import annotations

from dataclasses import replace

from dsconvert.events import Check
from dsconvert.proof.thresholds import Thresholds

MEAN, HIGH = 4.0, 10.0  # times a dense model's mean: the limits of the mean and of the 90 % quantile


def routed_limits(limits: Thresholds, asked: float | None) -> Thresholds:
    """The limits of a model of experts; `asked` is the mean divergence that the user allows, if any."""
    dense = limits.max_kld
    mean = MEAN * dense if asked is None else asked
    return replace(limits, max_kld=mean, median_kld=min(dense, mean), high_kld=HIGH * dense)


def judge_routing(routed: tuple[tuple[int, int], ...]) -> list[Check]:
    """A line on how many tokens went to other experts than the reference's; none for a dense model.

    `routed` are by layer the tokens, and those of them that did. It is no fault, and always passes.
    """
    if not routed:
        return []
    tokens, turned = (sum(part[i] for part in routed) for i in (0, 1))
    worst = max(other / count for count, other in routed)
    layers = "1 layer" if len(routed) == 1 else f"{len(routed)} layers"
    detail = f"{turned / tokens:.2%} of tokens went to other experts in {layers}, in one {worst:.2%}"
    return [Check("experts", True, detail, turned / tokens)]
