"""The options on calibration text, which every command that calibrates takes as one CalibrationRequest."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsconvert.commands.given import refuse
from dsconvert.commands.shared_options import apply, seed_option

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest

Command = TypeVar("Command", bound=Callable[..., Any])
NAMES = ("calib", "calib_chat", "calib_column", "calib_samples", "calib_len", "seed", "offline")


def calibration_options(
    text: str | None, length: int, purpose: str = "."
) -> Callable[[Command], Callable[..., Any]]:
    """Add the options to a command, which receives them as `calibration`.

    `text` is the default text; without one, `calibration` is None unless the user names a text. `purpose`
    ends the help of --calib. Raises UsageError for options that have no effect beside the others.
    """
    options = (
        click.option(
            "--calib",
            default=text,
            show_default=text is not None,
            metavar="c4|wikitext2|builtin|FILE|DIR",
            help="Calibration text" + purpose,
        ),
        click.option(
            "--calib-samples",
            type=click.IntRange(1),
            default=128,
            show_default=True,
            help="Calibration windows.",
        ),
        click.option(
            "--calib-len",
            type=click.IntRange(2),
            default=length,
            show_default=True,
            help="Tokens in a calibration window.",
        ),
        click.option(
            "--calib-chat",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Conversations (JSON lines, parquet), written with the model's chat template, instead of "
            "--calib.",
        ),
        click.option(
            "--calib-column",
            default="",
            metavar="NAME",
            help="Column of a file of rows that holds the text, or the conversation.",
        ),
        seed_option,
        click.option("--offline", is_flag=True, help="Use cached texts or the built-in one, and no network."),
    )

    def add(command: Command) -> Callable[..., Any]:
        @wraps(command)
        def with_request(
            *,
            calib: str | None,
            calib_chat: Path | None,
            calib_column: str,
            calib_samples: int,
            calib_len: int,
            seed: int,
            offline: bool,
            **others: Any,
        ) -> Any:
            check_text(calib, calib_chat)
            request: CalibrationRequest | None = None
            if calib is not None or calib_chat is not None:
                from dsconvert.calibration.request import CalibrationRequest  # not loaded for others

                request = CalibrationRequest(
                    text=calib or "",
                    samples=calib_samples,
                    length=calib_len,
                    seed=seed,
                    chat=calib_chat,
                    offline=offline,
                    column=calib_column,
                )
            return command(calibration=request, **others)

        return apply(with_request, options)

    return add


def check_text(text: str | None, chat: Path | None) -> None:
    """Raises UsageError for --calib beside --calib-chat, and for options on a text where neither is given."""
    if chat is not None:
        refuse("calib", where="beside --calib-chat", hint="Give one of them")
    elif text is None:
        refuse(*NAMES, where="without a calibration text", hint="Give --calib c4, or --calib-chat FILE")
