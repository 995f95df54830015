"""`dsconvert inspect`: what a GGUF file holds, and whether two files belong together."""

from __future__ import annotations

from pathlib import Path

import click

from dsconvert.commands.run import run


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object a file.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(files: tuple[Path, ...], tensors: bool, as_json: bool, debug: bool) -> None:
    """Show what GGUF files hold: keys, types, sizes, the tokenizer's regex spec, the pairing id.

    A DeepSeek-VL projector is checked for what a runtime needs and does not ask for. Of two files it is
    said whether they are a pair. Exit code 3: something is missing, or the two are no pair.
    """

    def work() -> int:
        from converters.gguf.inspect import judge, summary
        from converters.gguf.parse import open_gguf
        from dsconvert import console

        opened = [open_gguf(path) for path in files]
        for file in opened:
            found = summary(file)
            (console.say_json(found) if as_json else console.show_summary(found, tensors))
        return console.render(judge(opened), as_json=as_json)

    run(work, as_json=as_json, debug=debug)
