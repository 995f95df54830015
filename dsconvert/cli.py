"""The command line: which commands there are. `dsconvert.commands` wires the packages together.

A command's module is imported when it is used, and imports what is heavy when it runs, so that
`dsconvert --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module

import click

from dsconvert import __version__

COMMANDS = (
    "gguf",
    "gptq",
    "compressed",
    "mlx",
    "exl2",
    "chat",
    "imatrix",
    "verify",
    "compare",
    "inspect",
    "memory",
    "tokenizer",
    "completion",
)  # modules of dsconvert.commands


class Commands(click.Group):
    """A group whose commands are the modules named in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"dsconvert.commands.{cmd_name}"), cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dsconvert")
def cli() -> None:
    """Convert and quantize DeepSeek and other Llama-layout models, with proof.

    \b
    Example:
      dsconvert gguf sample: --quant q4_k_m
      dsconvert verify sample-q4_k_m.gguf --against sample:
    """


def main() -> None:
    """The console script."""
    cli()


if __name__ == "__main__":
    main()
