"""Options on the command line that have no effect beside others, and their refusal."""

from __future__ import annotations

import click

from dsconvert.errors import UsageError


def given(*names: str) -> tuple[str, ...]:
    """Those of the parameters `names` of the running command that its user typed, by their long option."""
    context = click.get_current_context()
    typed = [
        option
        for option in context.command.params
        if option.name in names
        and context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
    ]
    return tuple(next(name for name in option.opts if name.startswith("--")) for option in typed)


def refuse(*names: str, where: str, hint: str) -> None:
    """Raises UsageError when one of the parameters `names` was given `where` it has no effect."""
    options = given(*names)
    if options:
        verb = "have" if len(options) > 1 else "has"
        raise UsageError(f"{', '.join(options)} {verb} no effect {where}", hint=hint)
