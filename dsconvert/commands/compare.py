"""`dsconvert compare`: several outputs of one model in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands.proof_options import proof_options
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.commands.display import Display
    from dsconvert.proof.options import ProofOptions


@command
@click.argument("outputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@proof_options
def compare(
    outputs: tuple[Path, ...],
    against: ModelPath,
    options: ProofOptions,
    report: Path | None,
    add_bos: bool | None,
    display: Display,
) -> int:
    """Compare several outputs of one model: size, bits per weight, perplexity, KL divergence, top token.

    Each is verified as `dsconvert verify` does. --report draws size against KL divergence. Exit code 3: one
    failed.

    \b
    Example:
      dsconvert compare sample-q4_k_m.gguf sample-q8_0.gguf --against sample: --report sizes.html
    """  # fmt: skip
    from converters.outputs import open_output, open_reference
    from dsconvert import console
    from dsconvert.proof import result as reports
    from dsconvert.proof.outcomes import comparison_object, outcome_of
    from dsconvert.proof.prove import prove
    from dsconvert.report import page

    inputs = (*outputs, Path(str(against)), Path(options.text))
    reports.check_targets(report, display.json_file, inputs)
    reference = open_reference(against, add_bos)
    proofs = []
    for path in outputs:
        display.text(f"{path}:")
        proofs.append(display.follow(prove(open_output(path), reference, options)))
    outcomes = [outcome_of(proof) for proof in proofs]
    title = f"Outputs of {reference.title}"
    passed = all(outcome.passed for outcome in outcomes)
    rows = [reports.outcome_row(outcome) for outcome in outcomes]
    display.result(
        comparison_object(title, proofs),
        lambda: console.table(rows, reports.OUTCOME_COLUMNS, reports.OUTCOME_FIGURES),
        passed=passed,
    )
    if report is not None:
        reports.save_page(report, page.comparison_page(title, outcomes))
    return console.PASSED if passed else console.FAILED
