"""`dsconvert compare`: several outputs of one model in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert.commands.run import run
from dsconvert.commands.verify import proof_options, read_by
from dsconvert.errors import ConversionError

if TYPE_CHECKING:
    from dsconvert.proof.prove import Proof
    from dsconvert.proof.result import Outcome


@click.command()
@click.argument("outputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@proof_options
def compare(
    outputs: tuple[Path, ...], against: str, json_file: str | None, report: Path | None, **asked: Any
) -> None:
    """Compare several outputs of one model: size, bits per weight, perplexity, KL divergence, top token.

    Each is verified as `dsconvert verify` does. --report draws size against KL divergence. Exit code 3: one
    failed.
    """  # fmt: skip
    quiet, debug, add_bos = (asked.pop(name) for name in ("quiet", "debug", "add_bos"))
    machine = json_file == "-"

    def work() -> int:
        from converters.outputs import open_output, open_reference
        from dsconvert import console
        from dsconvert.proof import result as reports
        from dsconvert.proof.prove import ProofOptions, prove
        from dsconvert.report import page

        page_and_json = (report, None if machine or json_file is None else Path(json_file))
        reports.check_targets(*page_and_json, read_by(asked, against, *outputs))
        reference = open_reference(against, add_bos)
        proofs = []
        for path in outputs:
            if not (quiet or machine):
                console.say(f"{path}:")
            proofs.append(
                console.follow(prove(open_output(path), reference, ProofOptions(**asked)), quiet or machine)
            )
        outcomes = [outcome(proof) for proof in proofs]
        title = f"Outputs of {reference.title}"
        found = {"title": title, "outputs": [row | {"path": str(p.opened.path)} | reports.as_dict(p.report)
                 for row, p in zip(map(as_row, outcomes), proofs, strict=True)]}  # fmt: skip
        if machine:
            console.say_json(found)
        else:
            rows = [reports.outcome_row(row) for row in outcomes]
            console.table(
                rows, reports.OUTCOME_COLUMNS, frozenset(range(1, len(reports.OUTCOME_COLUMNS) - 1))
            )
        if report is not None:
            reports.save_page(report, page.comparison_page(title, outcomes))
        if json_file is not None and not machine:
            reports.save_json(Path(json_file), json.dumps(found, indent=1, allow_nan=False) + "\n")
        return console.PASSED if all(row.passed for row in outcomes) else console.FAILED

    run(work, as_json=machine, debug=debug)


def as_row(outcome: Outcome) -> dict[str, Any]:
    """What the table adds to a report, for machines."""
    return {"name": outcome.name, "nbytes": outcome.nbytes, "bits_per_weight": outcome.bits}


def outcome(proof: Proof) -> Outcome:
    """The row of an output; raises ConversionError when it broke and has no figures."""
    from dsconvert.proof.result import Outcome

    found, opened = proof.report.comparison, proof.opened
    if found.figures is None:
        raise ConversionError("has no figures to compare", where=opened.path, why=found.broken)
    passed = proof.report.verdict.passed
    return Outcome(opened.path.name, opened.nbytes, opened.bits, found.figures, passed)
