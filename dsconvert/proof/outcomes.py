"""Several proofs of one model side by side, as `dsconvert compare` shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsconvert.proof.prove import Proof
from dsconvert.proof.result import Outcome, as_dict


def outcome_of(proof: Proof) -> Outcome:
    """The row of an output in the table; a broken output has no figures."""
    opened, report = proof.opened, proof.report
    return Outcome(
        opened.path.name, opened.nbytes, opened.bits, report.comparison.figures, report.verdict.passed
    )


def comparison_object(title: str, proofs: Iterable[Proof]) -> dict[str, Any]:
    """The comparison for machines: the report of each output, with its name, path and size."""
    return {"title": title, "outputs": [_output_object(proof) for proof in proofs]}


def _output_object(proof: Proof) -> dict[str, Any]:
    opened = proof.opened
    return {
        "name": opened.path.name,
        "nbytes": opened.nbytes,
        "bits_per_weight": opened.bits,
        "path": str(opened.path),
        **as_dict(proof.report),
    }
