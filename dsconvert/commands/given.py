"""Options that were given on the command line, and the refusal of those that say nothing there."""

from __future__ import annotations

import click

from dsconvert.errors import UsageError


def given(*names: str) -> tuple[str, ...]:
    """Which of the parameters `names` of the running command were given, each as its option is written."""
    context = click.get_current_context()
    typed = [
        option
        for option in context.command.params
        if option.name in names
        and context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
    ]
    return tuple(max(option.opts, key=len) for option in typed)


def refuse(*names: str, where: str, hint: str) -> None:
    """Raises UsageError when one of the parameters `names` was given `where` it says nothing."""
    found = given(*names)
    if found:
        verb = "say" if len(found) > 1 else "says"
        raise UsageError(f"{', '.join(found)} {verb} nothing {where}", hint=hint)
