"""Writes to standard output and error, which may be closed, full or unread; untrusted text is escaped.

Everything that is printed goes through `write`, which escapes what a terminal would obey: names and texts
come from strangers' files. A stream that cannot be written is given up, and the work goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any, TextIO

_lost: list[TextIO] = []


def escaped(text: str) -> str:
    """The text with every invisible character escaped: controls, line ends, bidi marks."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def as_json(value: Any) -> str:
    """The value as one line of JSON, with every invisible character escaped as JSON does."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def open_streams() -> None:
    """See that the standard streams are there, else no file that is opened later may take their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
    for name in ("stderr", "stdout"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            _give_up(getattr(sys, name), "it is closed")


def write(stream: TextIO, text: str) -> None:
    """One line on a stream; nothing where the stream is lost."""
    if any(stream is lost for lost in _lost):
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = (escaped(text) + "\n").encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(line)
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        _give_up(stream, getattr(error, "strerror", None) or str(error))


def write_part(stream: TextIO, text: str) -> bool:
    """A piece of an answer on a stream, line ends and tabs in it: whole where the stream is a file or a pipe,
    without what a terminal would obey where it is one. Whether it could be written.
    """
    if any(stream is lost for lost in _lost):
        return False
    if stream.isatty():
        text = "".join(char if char in "\n\t" or not _obeyed(char) else ascii(char)[1:-1] for char in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:
        _give_up(stream, getattr(error, "strerror", None) or str(error))
        return False
    return True


def _obeyed(char: str) -> bool:
    """Whether a terminal takes a character for a command: the controls of ASCII and of Latin-1."""
    return char < " " or "\x7f" <= char < "\xa0"


def _give_up(stream: TextIO, why: str) -> None:
    """Write nothing more to a stream; that the output is lost is said where errors are."""
    _lost.append(stream)
    with contextlib.suppress(OSError, ValueError):  # so that what it holds back does no harm at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if stream is sys.stdout:
        write(sys.stderr, f"warning: standard output cannot be written ({why}): what is said there is lost")
