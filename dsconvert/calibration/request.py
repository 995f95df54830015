"""Draws calibration windows from the text that an option names, with a report and warnings."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from dsconvert.calibration.record import Calibration, held_against, sample, warnings
from dsconvert.calibration.sampling import SampleRequest
from dsconvert.errors import UsageError
from dsconvert.events import Event, Step, Warn
from dsconvert.texts.conversations import Message
from dsconvert.texts.encode_long import Encode, IntArray
from dsconvert.texts.sets import NAMES, chats, load_text


@dataclass(frozen=True)
class CalibrationRequest:
    """Which text, how much of it: `samples` windows of `length` tokens; `bos` begins documents if given.

    `chat` is a file of conversations, taken in the text's stead; `column` the one of its rows, or of the
    text's, that is taken.
    """

    text: str = "c4"
    samples: int = 128
    length: int = 2048
    seed: int = 0
    bos: int | None = None
    chat: Path | None = None
    offline: bool = False
    column: str = ""

    @property
    def files(self) -> list[Path]:
        """The files and folders that are read."""
        return files_of(self.text, self.chat)


def files_of(text: str | None, chat: Path | None) -> list[Path]:
    """The file or folder that a calibration text is read from, by its option, and that of conversations."""
    named = [Path(text)] if text and text not in NAMES else []
    return named + ([] if chat is None else [chat])


def calibrate(
    wanted: CalibrationRequest,
    encode: Encode,
    context: int,
    evaluation: IntArray,
    render: Callable[[list[Message]], str] | None = None,
) -> Generator[Event, None, Calibration]:
    """Draw the windows wanted, none longer than `context`, and report on them.

    `evaluation` are the windows that the result will be judged on, int64 [n, length]: the report says how
    much of the calibration text stands there too. `render` writes a conversation with the chat template.
    Yields what is going on and what the user should know; raises what `load_text` and `sample` raise.
    """
    bos = wanted.bos
    if wanted.chat is not None and render is not None:
        text, bos = chats(wanted.chat, render, wanted.column), None  # a template writes its own
        yield from map(Warn, text.notes)
    else:
        text = yield from load_text(wanted.text, "calibration", offline=wanted.offline, column=wanted.column)
    length = min(wanted.length, context)
    if length < wanted.length:
        yield Warn(f"the model takes {context} tokens at once: calibration windows are as long")
    yield Step(f"drawing {wanted.samples} windows of {length} tokens from {text.name}")
    drawn = sample(text, encode, SampleRequest(wanted.samples, length, wanted.seed, bos))
    drawn = held_against(drawn, evaluation, "builtin")
    yield from warnings(drawn.report)
    return drawn


def check_chat(path: Path | None) -> None:
    """See that a file of conversations is there before any work; raises UsageError."""
    if path is not None and not os.path.isfile(path):  # which never raises, as Path.is_file does
        raise UsageError("is not a file", where=path, hint="Give a JSON lines file of conversations")
