"""`dsconvert verify`: the proof of any output against the checkpoint that it was made from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from dsconvert.commands.calibration_options import bos_option
from dsconvert.commands.given import refuse
from dsconvert.commands.numbers import Number
from dsconvert.commands.run import run

Command = TypeVar("Command", bound=Callable[..., Any])


def proof_options(command: Command) -> Command:
    """The options that say on what, where and how strictly outputs are compared."""
    for option in reversed(PROOF_OPTIONS):
        command = option(command)
    return command


PROOF_OPTIONS = (
    click.option(
        "--against",
        required=True,
        metavar="MODEL_PATH",
        help="The 16-bit checkpoint: a folder, a hub id, sample:.",
    ),
    click.option(
        "--text",
        default="builtin",
        show_default=True,
        metavar="builtin|wikitext2|c4|FILE",
        help="Evaluation text.",
    ),
    click.option(
        "--windows", type=click.IntRange(1), default=8, show_default=True, help="Windows of text, at most."
    ),
    click.option(
        "--length",
        type=click.IntRange(0),
        default=0,
        help="Tokens in a window; default 2048, or 512 as llama.cpp takes with --kld-base and --engine.",
    ),
    click.option(
        "--stride",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        help="Tokens from one window to the next; each is scored on what the one before did not see.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Arithmetic; default float32 on a CPU, bfloat16 on CUDA.",
    ),
    click.option(
        "--max-kld", type=Number(), metavar="NATS", help="Largest mean KL divergence; default by type."
    ),
    click.option(
        "--max-ppl-ratio", type=Number(), metavar="RATIO", help="Largest PPL(Q)/PPL(base); default by type."
    ),
    click.option(
        "--min-top1", type=Number(), metavar="SHARE", help="Least share of equal top tokens; by default none."
    ),
    click.option(
        "--engine",
        type=click.Choice(["llama.cpp"]),
        help="Also run the file in this runtime: token ids, logits, perplexity (needs xllamacpp).",
    ),
    click.option(
        "--json",
        "json_file",
        metavar="FILE",
        help="Everything as JSON into FILE; - is standard output. Replaces an earlier one, no other file.",
    ),
    click.option(
        "--report",
        type=click.Path(path_type=Path),
        metavar="FILE.html",
        help="The report as a page. Replaces an earlier report, no other file.",
    ),
    bos_option,
    click.option("--quiet", is_flag=True, help="Only warnings and failures."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def read_by(asked: dict[str, Any], against: str, *outputs: Path) -> list[Path]:
    """The files and folders that a comparison reads, which no report takes the place of."""
    others = (asked.get("kld_base"), asked.get("mmproj"))
    return [*outputs, Path(against), Path(asked["text"]), *(path for path in others if path is not None)]


COMPARED = ("text", "windows", "length", "stride", "effort")
JUDGED = ("max_kld", "max_ppl_ratio", "min_top1")


def check_projector(json_file: str | None) -> None:
    """Raises UsageError for options on text, logits and reports, of which a projector alone has none."""
    none = (*COMPARED, *JUDGED, "add_bos", "device", "dtype", "engine", "report", "kld_base")
    hint = "Leave it out; --json - prints what is found. With its text file: verify TEXT.gguf --mmproj FILE"
    names = none if json_file in (None, "-") else (*none, "json_file")
    refuse(*names, where="of a projector alone", hint=hint)


def check_effect(asked: Mapping[str, Any]) -> None:
    """Raises UsageError for options that another one decides."""
    from dsconvert.proof.logprob_file import open_base

    base = asked["kld_base"]
    if base is not None and os.path.exists(base):
        hint = "Leave it out, or name a new file, which is then written from the checkpoint"
        tokens = open_base(base).windows.tokens
        # The same again is no contradiction.
        said = {"windows": asked["windows"] >= len(tokens), "length": asked["length"] == tokens.shape[1]}
        decided = [name for name in COMPARED if not said.get(name, False)]
        refuse(*decided, where=f"where {base} holds the text and the windows", hint=hint)
    elif base is not None:
        refuse("stride", where="with --kld-base, whose windows follow each other", hint="Leave it out")
    if asked["engine"] is not None:
        refuse("effort", where="with --engine, which runs all of it", hint="Leave it out")


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@proof_options
@click.option(
    "--kld-base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="llama.cpp's file of base log-probabilities: read in the checkpoint's stead, or written when new.",
)
@click.option(
    "--verify",
    "effort",
    type=click.Choice(["quick", "full"]),
    default="full",
    show_default=True,
    help="quick: what takes some 20 seconds, for big models a sample of blocks.",
)
@click.option(
    "--mmproj",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The text file's projector: prove it too, and both together on a question about a picture.",
)
def verify(output: Path, against: str, json_file: str | None, report: Path | None, **asked: Any) -> None:
    """Prove an output against its checkpoint: token ids, chat template, weights, blocks, perplexity, KL.

    OUTPUT is a GGUF file of any maker, a GPTQ or EXL2 folder or a 16-bit folder; of a projector the weights
    and the embeddings of a picture are compared. --mmproj does that beside a text file, and asks both a
    question about the picture. The figures are named and defined as in llama.cpp's perplexity tool. Exit
    code 0: passed, 2: could not be compared, 3: a check failed.
    """  # fmt: skip
    quiet, debug, add_bos = (asked.pop(name) for name in ("quiet", "debug", "add_bos"))
    machine = json_file == "-"

    def work() -> int:
        from functools import partial

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
        from dsconvert.proof.prove import Companion, ProofOptions, prove
        from dsconvert.report import page

        page_and_json = (report, None if machine or json_file is None else Path(json_file))
        reports.check_targets(*page_and_json, read_by(asked, against, output), asked["kld_base"])
        mmproj = asked.pop("mmproj")
        if mmproj is not None:
            check_files(output, mmproj)
        elif is_projector_file(output):
            check_projector(json_file)
            return console.render(
                prove_projector(open_reference(against), output), as_json=machine, quiet=quiet
            )
        check_effect(asked)
        reference, opened = open_reference(against, add_bos), open_output(output)
        companion = None
        if mmproj is not None:
            pair = open_pair(opened, mmproj, reference, asked["max_kld"])
            companion = Companion(pair.said, partial(check_pair, pair))
        found = console.follow(prove(opened, reference, ProofOptions(**asked), companion), quiet or machine)
        if machine:
            console.say_json(reports.as_dict(found.report))
        else:  # before it is saved: what took long to find is not lost with a full disk
            console.show_proof(found.report, quiet)
        if report is not None:
            reports.save_page(report, page.as_html(found.report))
        if json_file is not None and not machine:
            reports.save_json(Path(json_file), reports.as_json(found.report))
        return console.PASSED if found.report.verdict.passed else console.FAILED

    run(work, as_json=machine, debug=debug)
