"""The options on how big a file may be whose types are chosen by cost: a command takes them as one Budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsconvert.commands.given import given, refuse
from dsconvert.commands.numbers import Number, memory, names, size
from dsconvert.commands.shared_options import apply, measurement_option
from dsconvert.errors import UsageError

if TYPE_CHECKING:
    from dsconvert.quantization.budget import Budget

Command = TypeVar("Command", bound=Callable[..., Any])
SIZES = ("bpw", "size", "vram")


def budget_options(
    *instead: str, named: str, counted: str, usual: str
) -> Callable[[Command], Callable[..., Any]]:
    """Add the options to a command, which receives them as `budget`, None where no size is given.

    They take the place of the parameters `instead`, which texts call `named`; bits per weight are `counted`,
    and `usual` are the types where none are asked for. Raises UsageError for options that have no effect
    beside the others.
    """
    options = (
        click.option(
            "-b",
            "--bpw",
            type=Number(1, 32),
            metavar="BITS",
            help=f"Instead of {named}: the type of each tensor by what it costs on --calib text, with so "
            f"many bits per weight {counted}.",
        ),
        click.option(
            "--size",
            callback=size,
            metavar="SIZE",
            help="The same, in files of at most this size (4.0GB, 500M).",
        ),
        click.option(
            "--vram",
            callback=memory,
            metavar="SIZE",
            help="The same, for a card of this memory (8GB) with a --context.",
        ),
        click.option(
            "--context",
            type=click.IntRange(1),
            metavar="N",
            help="Tokens that fit beside the weights with --vram.  [default: the model's own]",
        ),
        click.option(
            "--types",
            callback=names,
            metavar="NAME,...",
            help=f"Types to choose from.  [default: {usual}]",
        ),
        click.option("--floor", metavar="TYPE", help="No type of fewer bits than this one."),
        measurement_option,
    )

    def add(command: Command) -> Callable[..., Any]:
        @wraps(command)
        def with_budget(
            *,
            bpw: float | None,
            size: int | None,
            vram: int | None,
            context: int | None,
            types: tuple[str, ...],
            floor: str | None,
            measurement: Path | None,
            **others: Any,
        ) -> Any:
            check(bpw, size, vram, instead)
            budget: Budget | None = None
            if any(value is not None for value in (bpw, size, vram)):
                from dsconvert.quantization.budget import Budget  # not loaded for others

                budget = Budget(bpw, size, vram, context, types, floor and floor.lower(), measurement)
            return command(budget=budget, **others)

        return apply(with_budget, options)

    return add


def check(bpw: float | None, size: int | None, vram: int | None, instead: tuple[str, ...]) -> None:
    """Raises UsageError for two sizes, and for options that do not go with one or with none."""
    sizes = given(*SIZES)
    if len(sizes) > 1:
        raise UsageError(f"{' and '.join(sizes)} are two sizes of one file", hint="Give one of them")
    if not sizes:
        where = "without --bpw, --size or --vram"
        refuse(
            "context", "types", "floor", "measurement", where=where, hint="Give one of these, or leave it out"
        )
        return
    refuse(*instead, where=f"beside {sizes[0]}", hint="The types are chosen by what they cost")
    if vram is None:
        refuse("context", where="without --vram", hint="The weights alone are counted")
