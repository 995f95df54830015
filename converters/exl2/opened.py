"""An EXL2 folder opened for the proof: its weights, its tokenizer, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.exl2.reader import HEAD_LINEAR, Layout, open_model, per_weight, width_of
from dsconvert.checkpoints.quantized import QuantizedSource
from dsconvert.events import Check
from dsconvert.proof.output_folder import check_companions, is_ours
from dsconvert.proof.sources import Opened, Reference
from dsconvert.quantization.opened import opened_folder

# Which width's thresholds hold from how many bits per weight on.
LIMITS = ((7.5, 8), (5.8, 6), (4.8, 5), (3.8, 4), (2.8, 3), (0.0, 2))
WITHIN = 0.01  # bits per weight that a folder may lie beside what was asked for


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """An EXL2 folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    bits, head = per_weight(model), model.linears.get(HEAD_LINEAR)
    quant = f"exl2-{bits:.2f}bpw-h{width_of(head.settings.groups) if head else 16}"
    limits = f"exl2_{next(width for least, width in LIMITS if bits >= least)}"
    groups = {f"{name}.weight": one.settings.groups for name, one in model.linears.items()}
    return opened_folder(
        path, model, "EXL2", quant, limits, f"{len(groups)} linears quantized",
        stored=frozenset((name, shape, groups.get(name, ())) for name, shape in model.shapes().items()),
        own=lambda reference: check_own(model, reference),
    )  # fmt: skip


def check_own(model: QuantizedSource[Layout], reference: Reference) -> list[Check]:
    """The bits per weight, where they are stated, and the files that dsconvert copies."""
    settings = model.checkpoint.stated.get("quantization_config")
    asked = settings.get("bits") if isinstance(settings, dict) else None
    checks = []
    if isinstance(asked, int | float) and not isinstance(asked, bool):
        checks.append(check_rate(model, asked))
    if is_ours(model.checkpoint.stated):
        checks.append(check_companions(reference.folder, model.folder))
    return checks


def check_rate(model: QuantizedSource[Layout], asked: float) -> Check:
    """The folder takes the bits per weight that were asked for, as near as one linear's settings allow."""
    sizes = [one.outputs * one.inputs for name, one in model.linears.items() if name != HEAD_LINEAR]
    within = max(WITHIN, max(sizes, default=0) / max(1, sum(sizes)))
    bits = per_weight(model)
    detail = f"{bits:.3f} bits per weight in the blocks, {asked:g} asked for"
    return Check("bits per weight", -within <= bits - asked <= WITHIN, detail, bits)
