"""Write the manual pages of dsconvert and its commands into this folder, from the help of click.

    python man/pages.py

They are installed as share/man/man1 with the package, where `man dsconvert-gguf` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from inspect import cleandoc
from pathlib import Path

import click

import dsconvert
from dsconvert.cli import COMMANDS, cli

FOLDER = Path(__file__).parent
EXIT_CODES = {
    "0": "Done, and proven where there is something to prove.",
    "2": "Stopped: the message says what, where, why, and what helps.",
    "3": "A check of the proof failed.",
}


def escaped(text: str) -> str:
    """Text as roff takes it: no line is read as a request, and hyphens can be copied."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", plain, flags=re.MULTILINE)


def paragraphs(help_text: str) -> Iterable[str]:
    """The parts of a command's help; what stands behind \\b keeps its lines."""
    for part in re.split(r"\n\s*\n", cleandoc(help_text)):
        kept = part.startswith("\b")
        text = escaped(part.removeprefix("\b").strip("\n") if kept else " ".join(part.split()))
        yield f".PP\n.nf\n{text}\n.fi" if kept else f".PP\n{text}"


def options(command: click.Command, context: click.Context) -> Iterable[str]:
    """Each option with its values and what it does."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            yield f".TP\n\\fB{escaped(record[0])}\\fR\n{escaped(' '.join(record[1].split()))}"


def page(name: str) -> str:
    """The manual page of a command, or of dsconvert itself, whose name is ""."""
    root = click.Context(cli, info_name="dsconvert", **cli.context_settings)
    command: click.Command | None = cli.get_command(root, name) if name else cli
    assert command is not None, name
    context = click.Context(command, info_name=name, parent=root) if name else root
    title = f"dsconvert-{name}" if name else "dsconvert"
    usage = " ".join(command.collect_usage_pieces(context))
    first, *rest = paragraphs(command.help or "")
    others = [f"dsconvert-{other}" for other in COMMANDS if other != name]
    related = ["dsconvert", *others] if name else others
    parts = [
        f'.TH {title.upper()} 1 "" "dsconvert {dsconvert.__version__}" "dsconvert"',
        f".SH NAME\n{escaped(title)} \\- {escaped(command.get_short_help_str(200).rstrip('.'))}",
        f".SH SYNOPSIS\n\\fB{escaped(context.command_path)}\\fR {escaped(usage)}",
        ".SH DESCRIPTION",
        first,
        *rest,
        ".SH OPTIONS",
        *options(command, context),
        ".SH EXIT STATUS",
        *(f".TP\n\\fB{code}\\fR\n{meaning}" for code, meaning in EXIT_CODES.items()),
        ".SH SEE ALSO",
        ",\n".join(f"\\fB{escaped(other)}\\fR(1)" for other in related),
    ]
    return "\n".join(parts) + "\n"


def path_of(name: str) -> Path:
    """Where a command's page lies."""
    return FOLDER / (f"dsconvert-{name}.1" if name else "dsconvert.1")


def write() -> None:
    """Write all pages, and remove those of commands that are gone."""
    names = ("", *COMMANDS)
    for path in {*FOLDER.glob("*.1")} - {path_of(name) for name in names}:
        path.unlink()
    for name in names:
        path_of(name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    write()
