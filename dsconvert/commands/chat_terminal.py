"""A conversation in a terminal: lines are read, answers streamed, Ctrl-C stops an answer."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsconvert import console
from dsconvert.errors import ConversionError, UsageError
from dsconvert.streams import write_part

if TYPE_CHECKING:
    from types import FrameType

    from dsconvert.chat.answer import Answer
    from dsconvert.chat.model import Stopped
    from dsconvert.chat.session import Session
    from dsconvert.commands.display import Display

PROMPT, MORE, QUOTES = ">>> ", "... ", '"""'
HELP = """\
/image FILE  put a picture before the next message
/clear       forget the conversation
/exit        leave, as Ctrl-D does
\"\"\"          begins and ends a message of several lines
Ctrl-C       stops an answer; a second time, or here, it leaves"""


class Leave(Exception):
    """The user wants to leave."""


class Interrupt:
    """What Ctrl-C does: stops an answer; a second time, and where none is given, it raises Leave."""

    def __init__(self) -> None:
        self.answering = self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.answering or self.asked:
            raise Leave
        self.asked = True

    def stopped(self) -> bool:
        """Whether the answer shall end."""
        return self.asked

    @contextmanager
    def during_answer(self) -> Iterator[None]:
        """While an answer is given."""
        self.answering, self.asked = True, False
        try:
            yield
        finally:
            self.answering = False


def talk(session: Session, display: Display, title: str, pictures: tuple[Path, ...]) -> None:
    """Read messages and stream answers until the user leaves; `pictures` stand before the first message."""
    interrupt = Interrupt()
    before = signal.signal(signal.SIGINT, interrupt)
    editing()
    try:
        if not display.quiet:
            console.note(f"{title}; /help shows the commands, Ctrl-D leaves")
        while True:
            line = read_message()
            if line.startswith("/"):
                pictures = obey(line, session, pictures)
            elif line.strip() and turn(session, display, line, pictures, interrupt):
                pictures = ()
    except Leave:
        write_part(sys.stderr, "\n")
    finally:
        signal.signal(signal.SIGINT, before)


def turn(
    session: Session, display: Display, line: str, pictures: tuple[Path, ...], interrupt: Interrupt
) -> bool:
    """One question and its answer; False where it could not be answered, of which the user is told."""
    try:
        with interrupt.during_answer():
            said = stream(session, line, pictures, interrupt.stopped)
    except ConversionError as error:
        console.fail(error)
        return False
    show_notes(said, display)
    display.result(said.as_dict(), lambda: None)
    return True


def stream(
    session: Session, text: str, pictures: tuple[Path, ...], stopped: Stopped, *, shown: bool = True
) -> Answer:
    """Write an answer to standard output as it comes, with a line end after it; returns it.

    It ends where nobody reads it any more.
    """
    read = True
    pieces, last = session.ask(text, pictures, lambda: not read or stopped()), ""
    try:
        while True:
            last = next(pieces)
            read = not shown or write_part(sys.stdout, last)
    except StopIteration as end:
        said: Answer = end.value
        return said
    finally:
        if shown and last and not last.endswith("\n"):
            write_part(sys.stdout, "\n")


def show_notes(said: Answer, display: Display) -> None:
    """Warnings, and a line of figures, on standard error."""
    for note in said.notes:
        console.note(f"warning: {note}")
    if not display.quiet:
        console.note(statistics(said))


def statistics(said: Answer) -> str:
    """The line of figures after an answer."""
    new = "" if said.read_tokens == said.prompt_tokens else f" ({said.read_tokens} new)"
    prompt = f"prompt {said.prompt_tokens} tokens{new}, {rate(said.read_tokens, said.prompt_seconds)}"
    answer = f"answer {said.answer_tokens} tokens, {rate(said.answer_tokens, said.answer_seconds)}"
    ended = {"length": ", cut at --max-tokens", "interrupted": ", interrupted"}.get(said.ended, "")
    return f"[{prompt}; {answer}{ended}; context {said.used} of {said.context}]"


def rate(tokens: int, seconds: float) -> str:
    """Tokens a second, three digits."""
    found = tokens / seconds if seconds > 0 else 0.0
    return f"{found:.0f} tokens/s" if found >= 100 else f"{found:.3g} tokens/s"


def obey(line: str, session: Session, pictures: tuple[Path, ...]) -> tuple[Path, ...]:
    """Do what a line with a command says; returns the pictures that wait for the next message."""
    command, _, rest = line.strip().partition(" ")
    match command:
        case "/exit" | "/quit" | "/bye":
            raise Leave
        case "/clear":
            session.clear()
            console.note("the conversation is forgotten")
            return ()
        case "/image" if rest.strip():
            path = Path(rest.strip().strip("'\"")).expanduser()
            if path.is_file():
                return (*pictures, path)
            console.fail(UsageError("there is no such file", where=path))
        case "/help" | "/?":
            for part in HELP.splitlines():
                console.note(part)
        case _:
            console.note(f"{command} is no command; /help shows those that there are")
    return pictures


def editing() -> None:
    """Line editing and history at the prompt, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def read_message() -> str:
    """The next message; raises Leave at the end of input."""
    line = read_line(PROMPT)
    if not line.lstrip().startswith(QUOTES):
        return line
    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read_line(MORE))
    return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(QUOTES)]).strip("\n")


def read_line(prompt: str) -> str:
    """A line, without its end. The prompt goes to standard error where standard output is no terminal."""
    try:
        if sys.stdout.isatty():
            return input(prompt)
        write_part(sys.stderr, prompt)
        return input()
    except EOFError:
        raise Leave from None
    except UnicodeDecodeError as error:
        console.fail(UsageError("the line is not UTF-8", why=str(error)[:100]))
        return ""
