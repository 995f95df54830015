"""The event that ends a conversion's proof: what was made, of what, and what was found."""

from __future__ import annotations

from dataclasses import asdict

from dsconvert.events import Proven
from dsconvert.models.provenance import commit_of, origin
from dsconvert.proof.result import Report, finite
from dsconvert.proof.sources import Opened, Reference


def ended(opened: Opened, reference: Reference, report: Report) -> Proven:
    """The proof of an output against a checkpoint as an event."""
    folder, figures = reference.checkpoint.folder, report.comparison.figures
    organization, name = origin(folder, reference.checkpoint.config)
    return Proven(
        path=str(opened.path),
        kind=opened.kind,
        quant=opened.quant,
        nbytes=opened.nbytes,
        bits=opened.bits,
        passed=report.verdict.passed,
        model=name,
        base=f"{organization}/{name}" if organization else "",
        commit=commit_of(folder),
        folder=str(folder),
        figures=None if figures is None else finite(asdict(figures)),
        provenance=dict(report.provenance),
    )
