"""`dsconvert tokenizer`: show, encode, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands.given import refuse
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.commands.display import Display


@command
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--encode", "texts", multiple=True, metavar="TEXT", help="Show the ids of a text; may be repeated."
)
@click.option(
    "--compare",
    "other",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Another tokenizer, which should make the same ids.",
)
@click.option(
    "--lines",
    "lines_file",
    cls=shared.Renamed,
    former=("--text",),
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compare on the lines of this file, too.",
)
@click.option(
    "--strings",
    type=click.IntRange(0),
    default=20000,
    show_default=True,
    help="Random strings over all of Unicode to compare on.",
)
@shared.seed_option
def tokenizer(
    file: Path,
    texts: tuple[str, ...],
    other: Path | None,
    lines_file: Path | None,
    strings: int,
    seed: int,
    display: Display,
) -> int:
    """Show the tokenizer of a GGUF file or a model folder: kind, regex steps; encode; compare.

    With --compare the exit code is 3 when any text gets other ids; the differences are shown by class.

    \b
    Example:
      dsconvert tokenizer sample-q4_k_m.gguf --encode "Hello  world"
    """  # fmt: skip
    from converters.outputs import open_tokenizer
    from dsconvert import console
    from tokenizer_tools.show import compared, described, encoded

    if other is None:
        refuse("lines_file", "strings", "seed", where="without --compare", hint="Give --compare OTHER")
    opened = open_tokenizer(file)
    found: dict[str, Any] = {"file": str(file), **described(opened)}
    found["encoded"] = [encoded(opened, text) for text in texts]
    different = 0
    if other is not None:
        found["comparison"] = compared(opened, open_tokenizer(other), lines_file, strings, seed)
        different = found["comparison"]["different"]
    display.result(found, lambda: console.show_tokenizer(found), passed=not different)
    return console.FAILED if different else console.PASSED
