"""`dsconvert verify`: the proof of any output against the checkpoint that it was made from."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands.given import refuse
from dsconvert.commands.proof_options import proof_options
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.commands.display import Display
    from dsconvert.proof.options import ProofOptions

COMPARED = ("text", "windows", "length", "stride", "effort")
JUDGED = ("max_kld", "max_ppl_ratio", "min_top1")


@command
@click.argument("output", type=click.Path(path_type=Path))
@proof_options
@click.option(
    "--kld-base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="llama.cpp's file of base log-probabilities: read in the checkpoint's stead, or written when new.",
)
@shared.mmproj_option
def verify(
    output: Path,
    against: ModelPath,
    options: ProofOptions,
    kld_base: Path | None,
    mmproj: Path | None,
    report: Path | None,
    add_bos: bool | None,
    display: Display,
) -> int:
    """Prove an output against its checkpoint: token ids, chat template, weights, blocks, perplexity, KL.

    OUTPUT is a GGUF file of any maker, a GPTQ, EXL2, compressed-tensors, MLX or 16-bit folder; of a
    projector the weights and the embeddings of a picture are compared. --mmproj does that beside a text
    file, and asks both a question about the picture. The figures are named and defined as in llama.cpp's
    perplexity tool. Exit code 0: passed, 2: could not be compared, 3: a check failed.

    \b
    Example:
      dsconvert verify sample-q4_k_m.gguf --against sample: --report proof.html
    """  # fmt: skip
    from converters.gguf.projector.verify import (
        check_files,
        check_pair,
        is_projector_file,
        open_pair,
        prove_projector,
    )
    from converters.outputs import open_output, open_reference
    from dsconvert import console
    from dsconvert.proof import result as reports
    from dsconvert.proof.prove import Companion, prove
    from dsconvert.report import page

    options = replace(options, kld_base=kld_base)
    inputs = (output, Path(str(against)), Path(options.text), kld_base, mmproj)
    reports.check_targets(report, display.json_file, [path for path in inputs if path is not None], kld_base)
    if mmproj is not None:
        check_files(output, mmproj)
    elif is_projector_file(output):
        check_projector()
        return display.events(prove_projector(open_reference(against), output))
    check_effect(options)
    reference, opened = open_reference(against, add_bos), open_output(output)
    companion = None
    if mmproj is not None:
        pair = open_pair(opened, mmproj, reference, options)
        companion = Companion(pair.said, partial(check_pair, pair))
    found = display.follow(prove(opened, reference, options, companion)).report
    # Shown before a page is saved: what took long to find is not lost with a full disk.
    passed = found.verdict.passed
    display.result(reports.as_dict(found), lambda: console.show_proof(found, display.quiet), passed=passed)
    if report is not None:
        reports.save_page(report, page.as_html(found))
    return console.PASSED if passed else console.FAILED


def check_projector() -> None:
    """Raises UsageError for options on text, logits and pages, of which a projector alone has none."""
    hint = "Leave it out; --json writes what is found. With its text file: verify TEXT.gguf --mmproj FILE"
    refuse(
        *COMPARED, *JUDGED, "add_bos", "device", "dtype", "engine", "report", "kld_base",
        where="on a projector alone", hint=hint,
    )  # fmt: skip


def check_effect(options: ProofOptions) -> None:
    """Raises UsageError for options that another one decides."""
    from dsconvert.proof.logprob_file import open_base

    base = options.kld_base
    if base is not None and os.path.exists(base):
        hint = "Leave it out, or name a new file, which is then written from the checkpoint"
        tokens = open_base(base).windows.tokens
        # The same value again does not contradict it.
        agreeing = {"windows": options.windows >= len(tokens), "length": options.length == tokens.shape[1]}
        decided = [name for name in COMPARED if not agreeing.get(name, False)]
        refuse(*decided, where=f"because {base} holds the text and the windows", hint=hint)
    elif base is not None:
        refuse("stride", where="with --kld-base, whose windows follow each other", hint="Leave it out")
    if options.engine is not None:
        refuse("effort", where="with --engine, which runs all of it", hint="Leave it out")
