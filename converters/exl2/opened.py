"""An EXL2 folder opened for the proof: its weights, its tokenizer, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.exl2.pack import PARTS
from converters.exl2.reader import HEAD_LINEAR, EXL2Model, open_model
from dsconvert.events import Check
from dsconvert.models.language_model import language_model
from dsconvert.proof.output_folder import check_companions, is_ours
from dsconvert.proof.sources import Opened, Reference, folder_text, stored_sizes

WITHIN = 0.01  # bits per weight that a folder may lie beside what was asked for


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """An EXL2 folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    config = model.checkpoint.config
    source, decoder = language_model(model, config, path / "config.json", partial=True)
    head = model.linears.get(HEAD_LINEAR)
    quant = f"exl2-{model.bits:.2f}bpw-h{head.width if head else 16}"
    sizes = stored_sizes(model, model.checkpoint, model.linears, PARTS)
    text = folder_text(path, config.vocab_size)
    shapes = model.shapes()
    groups = {f"{name}.weight": linear.groups for name, linear in model.linears.items()}
    return Opened(
        path, "EXL2", quant, model.limits, source, decoder, text, sizes, model.checkpoint.nbytes,
        frozenset((name, shape, groups.get(name, ())) for name, shape in shapes.items()),
        f"{len(groups)} linears quantized, {len(shapes) - len(groups)} tensors in 16 bits",
        own=lambda reference: check_own(model, reference),
    )  # fmt: skip


def check_own(model: EXL2Model, reference: Reference) -> list[Check]:
    """The bits per weight, where they are stated, and the files that dsconvert copies."""
    settings = model.checkpoint.stated.get("quantization_config")
    asked = settings.get("bits") if isinstance(settings, dict) else None
    checks = []
    if isinstance(asked, int | float) and not isinstance(asked, bool):
        checks.append(check_rate(model, asked))
    if is_ours(model.checkpoint.stated):
        checks.append(check_companions(reference.folder, model.folder))
    return checks


def check_rate(model: EXL2Model, asked: float) -> Check:
    """The folder takes the bits per weight that were asked for, as near as one linear's settings allow."""
    sizes = [one.outputs * one.inputs for name, one in model.linears.items() if name != HEAD_LINEAR]
    within = max(WITHIN, max(sizes, default=0) / max(1, sum(sizes)))
    detail = f"{model.bits:.3f} bits per weight in the blocks, {asked:g} asked for"
    return Check("bits per weight", -within <= model.bits - asked <= WITHIN, detail, model.bits)
