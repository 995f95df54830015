"""`dsconvert inspect`: what a GGUF file holds."""

from __future__ import annotations

from pathlib import Path

import click

from dsconvert.commands.running import run


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object a file.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(files: tuple[Path, ...], tensors: bool, as_json: bool, debug: bool) -> None:
    """Show what GGUF files hold: keys, types, sizes, the tokenizer's regex spec, the pairing id."""

    def work() -> int:
        from converters.gguf.inspect import summary
        from converters.gguf.parse import open_gguf
        from dsconvert import console

        for path in files:
            found = summary(open_gguf(path))
            (console.say_json(found) if as_json else console.show_summary(found, tensors))
        return console.PASSED

    run(work, as_json=as_json, debug=debug)
