"""The checks of a comparison by its limits: figures, blocks and tensors; and the verdict over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsconvert.events import Check
from dsconvert.proof.figures import BlockError, Figures, Foretold, TensorError
from dsconvert.proof.nearest_rows import most_loss, most_lost
from dsconvert.proof.routing import judge_routing
from dsconvert.proof.row_faults import told
from dsconvert.proof.thresholds import Thresholds, snr_floor

if TYPE_CHECKING:
    from dsconvert.proof.compare import Comparison


# By how much an output's mean KL divergence, and the error of a block's states, may exceed what the errors of
# its weights foretell; what share of the divergence may lie between the two models; what is always allowed.
MOST_KLD, MOST_APART, LEAST_KLD = 1.2, 0.03, 1e-5
MOST_ERROR, LEAST_ERROR = 1.2, 1e-3


@dataclass(frozen=True)
class Verdict:
    """Whether every check held, and the sentence of each that did not."""

    passed: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]


def judge(comparison: Comparison, limits: Thresholds) -> Verdict:
    """Hold a comparison against the limits: figures, every tensor, config; a broken model fails."""
    checks = judge_config(comparison.config)
    checks += judge_tensors(comparison.tensors)
    checks += judge_blocks(comparison.blocks, limits)
    checks += judge_routing(comparison.routed)
    if comparison.broken:
        checks.append(Check("finite", False, comparison.broken))
    if comparison.figures is not None:
        checks += judge_figures(comparison.figures, limits)
        checks += judge_foretold(comparison.figures, comparison.foretold)
    return verdict(checks)


def judge_config(found: tuple[str, ...]) -> list[Check]:
    """One check for each of the config's differences, or one that says that there are none."""
    equal = Check("config", True, "sizes, RoPE, norm and context are those of the checkpoint's config")
    return [Check("config", False, text) for text in found] or [equal]


def judge_foretold(figures: Figures, foretold: Foretold | None) -> list[Check]:
    """The check that the divergence is what the errors of the weights foretell, where that was run."""
    if foretold is None:
        return []
    kld, due, apart = figures.kld.value, foretold.kld.value, foretold.apart.value
    held = kld <= MOST_KLD * due + LEAST_KLD and apart <= MOST_APART * kld + LEAST_KLD
    times = kld / due if due else 1.0
    detail = (
        f"KL divergence {times:.4g} times what the errors of the weights foretell, {due:.3g}, "
        f"limit {MOST_KLD:g}; {apart:.3g} between the two models, limit {MOST_APART:.0%} of it"
    )
    return [Check("foretold KLD", held, detail, times)]


def judge_figures(figures: Figures, limits: Thresholds) -> list[Check]:
    """The checks of the whole model's output."""
    ratio, top = figures.ppl_ratio.value, figures.same_top.value
    margin = 3 * figures.ppl_ratio.error  # of a hundred predictions 1.012 may be 1.00 of more
    said = f"PPL(Q)/PPL(base) {ratio:.5g}, {_limit(limits.max_ppl_ratio)}"
    if margin and math.isfinite(limits.max_ppl_ratio):
        said += f" and three standard errors, {margin:.2g}"
    divergences = (
        ("mean", figures.kld.value, limits.max_kld),
        ("median", figures.kld_median, limits.median_kld),
        ("90 %", figures.kld_percentiles["90"], limits.high_kld),
    )
    checks = [
        *(
            Check(f"{name} KLD", kld <= limit, f"{name} KLD {kld:.3g}, {_limit(limit)}", kld)
            for name, kld, limit in divergences
            if limit is not None
        ),
        Check("PPL ratio", ratio <= limits.max_ppl_ratio + margin, said, ratio),
    ]
    if limits.min_top1 is not None:
        detail = f"same top token for {top:.2%} of tokens, limit {limits.min_top1:.2%}"
        checks.append(Check("same top p", top >= limits.min_top1, detail, top))
    return checks


def _limit(value: float) -> str:
    return f"limit {value:g}" if math.isfinite(value) else "no limit of its own"


def judge_blocks(blocks: tuple[BlockError, ...], limits: Thresholds) -> list[Check]:
    """One check per block whose error is too large or not foretold by its weights, or one for all of them."""
    judged = [block for block in blocks if block.update is not None or block.foretold is not None]
    wrong = [
        Check(f"block {block.index}", False, f"block {block.index}: {fault}", block.error)
        for block in judged
        if (fault := _block_fault(block, limits))
    ]
    if wrong or not judged:
        return wrong
    count = "1 block" if len(judged) == 1 else f"{len(judged)} blocks"
    worst = max(judged, key=lambda block: block.error)
    detail = f"{count}; largest error of {_of_what(worst)} {worst.error:.3g} (block {worst.index})"
    if worst.update is not None:
        detail += f", limit {limits.max_update:g}"
    if ratios := {block.index: block.error / block.foretold for block in judged if block.foretold}:
        most = max(ratios, key=lambda index: ratios[index])
        detail += f"; at most {ratios[most]:.2f} times as large as the errors of the weights foretell"
        detail += f" (block {most}), limit {MOST_ERROR:g}"
    return [Check("blocks", True, detail, worst.error)]


def _block_fault(block: BlockError, limits: Thresholds) -> str:
    error, foretold = block.error, block.foretold
    said = f"error of {_of_what(block)} {error:.3g}"
    if block.update is not None and not error <= limits.max_update:
        return f"{said}, limit {limits.max_update:g}"
    if foretold is not None and not error <= MOST_ERROR * foretold + LEAST_ERROR:
        return f"{said}, the errors of the weights foretell {foretold:.3g}, limit {MOST_ERROR:g} times"
    return ""


def _of_what(block: BlockError) -> str:
    return "the states after it" if block.update is None else "its output"


def judge_tensors(tensors: tuple[TensorError, ...]) -> list[Check]:
    """One check per tensor that lost too much or with a wrong row, or one that says that none is.

    None without tensors. The rows of a tensor that is wrong in most of them are not listed one by one.
    """
    if not tensors:
        return []
    bad = [t for t in tensors if _lost_too_much(t) or _worse_than_rounded(t) or _below_floor(t)]
    wrong = [t for t in tensors if t.faults and not (t in bad and 2 * len(t.faults) > t.rows)]
    if not bad and not wrong:
        return [_sound(tensors)]
    rows_wrong = [Check("weights", False, f"{t.name}: {told(t.faults)}", float(len(t.faults))) for t in wrong]
    return rows_wrong + [
        Check("weights", False, f"{t.name}: signal to noise {_decibel(t.snr)}, {_due(t)}", t.snr)
        for t in sorted(bad, key=lambda t: (not math.isnan(t.snr), t.snr))
    ]


def _lost_too_much(tensor: TensorError) -> bool:
    return tensor.lost is not None and not tensor.lost <= _most_lost(tensor)


def _most_lost(tensor: TensorError) -> float:
    """The dB that it may lose: more where its outputs, for which weights are given up, are none the worse.

    Importance alone loses 3.6 dB of weights that lie on the levels of a grid themselves, as those of a model
    that was made of a 4-bit file.
    """
    return most_lost(tensor.type, tensor.fed or (tensor.loss is not None and tensor.loss <= 1))


def _worse_than_rounded(tensor: TensorError) -> bool:
    return tensor.loss is not None and not tensor.loss <= most_loss(tensor.type, tensor.fed)


def _below_floor(tensor: TensorError) -> bool:
    """A NaN is below every floor, plain rounding below none."""
    return tensor.lost != 0 and not tensor.snr >= snr_floor(tensor.type)


def _due(tensor: TensorError) -> str:
    if _below_floor(tensor):
        return f"{tensor.type} should reach {snr_floor(tensor.type):g} dB"
    if not _lost_too_much(tensor):
        more = f"its outputs' error is {tensor.loss:.2f} times that of rounding to {tensor.type} to nearest"
        return f"{more}, limit {most_loss(tensor.type, tensor.fed):g}"
    limit = f"limit {_most_lost(tensor):g} dB"
    return f"{tensor.lost:.1f} dB less than rounding to {tensor.type} to nearest, {limit}"


def _sound(tensors: tuple[TensorError, ...]) -> Check:
    """The check that passes, with the tensor that is nearest to its limit."""
    rows = f"{sum(t.rows for t in tensors):,} rows each on its own"
    measured = [t for t in tensors if t.lost is not None]
    worst = min(tensors, key=lambda t: t.snr - snr_floor(t.type))
    nearest = f"nearest to it: {worst.name}, {_decibel(worst.snr)} ({worst.type})"
    detail = f"{len(tensors)} tensors above their type's floor, {rows}; {nearest}"
    if measured:
        most = max(measured, key=lambda t: (t.lost or 0.0) - _most_lost(t))
        detail += (
            f"; against rounding to nearest they lose {most.lost:.2f} dB at most ({most.name}, limit "
            f"{_most_lost(most):g})"
        )
    ran = [t for t in tensors if t.loss is not None]
    if ran:
        most = max(ran, key=lambda t: (t.loss or 0.0) / most_loss(t.type, t.fed))
        detail += (
            f"; their outputs' error is {most.loss:.2f} times the rounded ones' at most ({most.name}, limit "
            f"{most_loss(most.type, most.fed):g})"
        )
    return Check("weights", True, detail, worst.snr)


def _decibel(value: float) -> str:
    return "not a number (non-finite values)" if math.isnan(value) else f"{value:.1f} dB"


def verdict(checks: list[Check]) -> Verdict:
    """Passed when every check held, and there was at least one."""
    reasons = tuple(check.detail for check in checks if not check.passed)
    return Verdict(bool(checks) and not reasons, reasons, tuple(checks))
