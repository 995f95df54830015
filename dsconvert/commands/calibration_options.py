"""The options on calibration text, which every command that calibrates takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsconvert.commands.given import refuse

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.quantization.plan import RunOptions

Command = TypeVar("Command", bound=Callable[..., Any])
NAMES = ("calib", "calib_chat", "calib_column", "calib_samples", "calib_len", "seed", "offline")
RUN_NAMES = ("add_bos", "out", "resume", "force", "device", "verify")


def calibration_options(text: str | None, length: int) -> Callable[[Command], Command]:
    """Add the options to a command; without a default `text` it calibrates only when asked to."""
    options = (
        click.option(
            "--calib",
            default=text,
            show_default=text is not None,
            metavar="c4|wikitext2|builtin|FILE|DIR",
            help="Calibration text."
            if text
            else "Measure an importance matrix on this text on the way, instead of --imatrix.",
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
        click.option("--seed", type=int, default=0, show_default=True, help="Which windows are drawn."),
        click.option(
            "--offline", is_flag=True, help="Take cached texts or the built-in one; ask no network."
        ),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


bos_option = click.option(
    "--add-bos/--no-add-bos",
    default=None,
    help="Put BOS before a text, or not, whatever the tokenizer's files say.",
)


def check_calibration(asked: Mapping[str, Any]) -> None:
    """Raises UsageError where --calib is given beside --calib-chat, which takes its place."""
    if asked["calib_chat"] is not None:
        refuse("calib", where="beside --calib-chat", hint="Give one of them")


def wanted_of(asked: dict[str, Any]) -> CalibrationRequest | None:
    """Take the options out of `asked` and give what they mean: None without a text.

    Raises UsageError where an option says how to draw from a text that is not there.
    """
    from dsconvert.calibration.request import CalibrationRequest

    check_calibration(asked)
    text, chat, column, samples, length, seed, offline = (asked.pop(name) for name in NAMES)
    if text is None and chat is None:
        refuse(*NAMES, where="without a calibration text", hint="Give --calib c4, or --calib-chat FILE")
        return None
    return CalibrationRequest(text or "", samples, length, seed, None, chat, offline, column)


def run_options_of(model: str, asked: dict[str, Any]) -> RunOptions:
    """Take what every calibrated conversion is asked for out of `asked`; raises what `wanted_of` raises."""
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.quantization.plan import RunOptions

    wanted = wanted_of(asked) or CalibrationRequest()
    return RunOptions(model, wanted, *(asked.pop(name) for name in RUN_NAMES))
