"""How every command runs: errors become one paragraph, and the exit code says what happened."""

from __future__ import annotations

import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert.checkpoints.output_plan import PART, left
from dsconvert.commands.display import STANDARD_OUTPUT, Display
from dsconvert.commands.remote import remote_models
from dsconvert.commands.shared_options import DISPLAY_OPTIONS
from dsconvert.errors import ConversionError
from dsconvert.events import LOG

TYPED = "dsconvert.typed"  # where a context keeps it

if TYPE_CHECKING:
    from types import FrameType

    from dsconvert.events import Event
    from dsconvert.quantization.ranks import Ranks


class Typed(click.Command):
    """A command that remembers what was typed behind its name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[TYPED] = tuple(args)
        return super().parse_args(ctx, args)


def command(function: Callable[..., int]) -> click.Command:
    """A command of a function that takes options and returns the exit code.

    Adds --json, --quiet and --debug; the first two reach the function as `display`, a Display.
    """

    @wraps(function)
    def running(json_file: Path | None, quiet: bool, debug: bool, **options: Any) -> None:
        on_output = json_file == Path(STANDARD_OUTPUT)
        display = Display(on_output, None if on_output else json_file, quiet)

        def work() -> int:
            try:
                display.check(options.get("out"))
            except ConversionError as error:
                if debug:
                    raise
                return replace(display, json_file=None).fail(error)  # into no file that is not ours to write
            with remote_models(display):
                code = function(display=display, **options)
            display.save()
            return code

        run(work, display, debug=debug)

    made = click.command(cls=Typed)(running)
    for option in DISPLAY_OPTIONS:
        made = option(made)
    return made


def run(work: Callable[[], int], display: Display, *, debug: bool) -> None:
    """Run a command's work and leave with its exit code; errors become one paragraph and exit code 2."""
    from dsconvert import console
    from dsconvert.quantization.ranks import leave
    from dsconvert.streams import open_streams

    left.clear()
    open_streams()
    if debug:
        sys.excepthook = console.show_traceback
        _show_log(console.note)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks for it
            signal.signal(number, _terminate)
    try:
        code = work()
    except ConversionError as error:
        if debug:
            raise
        code = display.fail(error)
    except KeyboardInterrupt as error:
        traceback.clear_frames(error.__traceback__)  # ends what was under way, so that it can tidy up
        code = display.fail(_interrupted())
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a library's panic is not an Exception
        if debug:
            raise
        code = display.fail(_unexpected(error))
    leave(code)


def on_each_rank(work: Callable[[Ranks], Iterator[Event]], show: Callable[[Iterator[Event]], int]) -> int:
    """Run `work` on every process that torchrun has started; the first one shows what happens."""
    from dsconvert.console import PASSED, STOPPED
    from dsconvert.quantization.ranks import ALONE, Gone, ToldElsewhere, joined

    ranks = ALONE
    try:
        with joined() as ranks:
            if ranks.first:
                return show(work(ranks))
            for _ in work(ranks):
                pass
    except (ToldElsewhere, Gone, KeyboardInterrupt):
        if ranks.first:
            raise
        return STOPPED
    return PASSED


def _show_log(show: Callable[[str], None]) -> None:
    """Show how long the phases of the work take, and first what Python and click took."""
    handler = logging.Handler()
    handler.emit = lambda record: show(record.getMessage())  # type: ignore[method-assign]
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.DEBUG)
    LOG.debug("%-24s           %6.3f s of processor", "start", time.process_time())


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _interrupted() -> ConversionError:
    """The error of an interruption, which names the unfinished files."""
    if not left:
        return ConversionError("interrupted", why="No unfinished file was left")
    kept = [path for path in left if path.suffix != PART]
    return ConversionError(
        "interrupted",
        why=f"Left unfinished: {', '.join(map(str, left))}",
        hint="Give the same command with --resume to go on, or with --force to begin anew" if kept else "",
    )


def _unexpected(error: BaseException) -> ConversionError:
    from dsconvert.errors import short
    from dsconvert.libraries import of_import

    if isinstance(error, ModuleNotFoundError) and (known := of_import(error)):
        return known
    if isinstance(error, MemoryError):
        return ConversionError(
            "there is not enough memory",
            why=short(error) if str(error) else "",
            hint="Give the process more (`ulimit -v`), end others, or ask for less at a time",
        )
    return ConversionError(
        f"stopped by an unexpected {type(error).__name__}: {short(error)}",
        why="This is a fault of dsconvert",
        hint="Run the same command with --debug and report what it prints",
    )
