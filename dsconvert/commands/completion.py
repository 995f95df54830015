"""`dsconvert completion`: what a shell reads to complete commands, options and their values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.commands.display import Display

PROGRAM = "dsconvert"
SHELLS = ("bash", "zsh", "fish")


@command
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str, display: Display) -> int:
    """Print the script that completes dsconvert's commands and options in a shell.

    A bash reads it from its start-up file, a zsh from a folder of its fpath, as a file named _dsconvert, a
    fish from ~/.config/fish/completions/dsconvert.fish.

    \b
    Example:
      eval "$(dsconvert completion bash)"
    """
    from click.shell_completion import get_completion_class

    from dsconvert import console
    from dsconvert.cli import cli

    found = get_completion_class(shell)
    assert found is not None  # click has these three
    script = found(cli, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source().strip()

    def show() -> None:
        for line in script.splitlines():
            console.say(line)

    display.result({"shell": shell, "script": script}, show)
    return console.PASSED
