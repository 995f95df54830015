"""`dsconvert inspect`: what a GGUF file holds, and whether two files belong together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.commands.display import Display


@command
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
def inspect(files: tuple[Path, ...], tensors: bool, display: Display) -> int:
    """Show what GGUF files hold: keys, types, sizes, the tokenizer's regex spec, the pairing id.

    A DeepSeek-VL projector is checked for what a runtime needs and does not ask for. Two files are checked
    for being a pair. Exit code 3: something is missing, or the two are not a pair.

    \b
    Example:
      dsconvert inspect sample-q4_k_m.gguf --tensors
    """
    from converters.gguf.inspect import judge, summary
    from converters.gguf.parse import open_gguf
    from dsconvert import console

    opened = [open_gguf(path) for path in files]
    for file in opened:
        found = summary(file)
        display.result(found, partial(console.show_summary, found, tensors))
    return display.events(judge(opened))
