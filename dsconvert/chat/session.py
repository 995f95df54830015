"""A conversation over several turns: its messages, what is drawn, and where its context ends."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsconvert.chat.answer import Answer, Reader, answer
from dsconvert.chat.model import Model, Part, Stopped
from dsconvert.chat.prompt import ASSISTANT, SYSTEM, USER, Message, fitting
from dsconvert.chat.sampling import Sampling, draw
from dsconvert.errors import UsageError

CONTINUED = 256  # tokens that a model without a template writes at once: it knows no end of a turn
ROOM = 256  # tokens that are kept free for an answer, or a quarter of a small context
CUT = "the answer was cut, because the context of {} tokens is full"


def never() -> bool:
    """Not stopped."""
    return False


class Session:
    """A conversation with a model; `system` stands before it, an answer has at most `limit` tokens.

    Raises UsageError for a system text and a model without a template to put it in.
    """

    def __init__(
        self, model: Model, sampling: Sampling, *, system: str = "", limit: int | None = None, seed: int = 0
    ) -> None:
        self.model = model
        self.messages: tuple[Message, ...] = ()
        self._sampling, self._limit = sampling, limit
        self._random = np.random.default_rng(seed)
        self._reader = Reader(model)
        self._embedding = 0.0  # seconds that this prompt's pictures took
        self._system = (Message(SYSTEM, system),) if system else ()
        if system and not model.text.template:
            raise UsageError(
                "--system has no effect on a model without a chat template",
                where=model.text.where,
                why="It continues a text",
                hint="Put it before the text",
            )
        if limit is None and not model.text.template:
            self._limit = CONTINUED

    def clear(self) -> None:
        """Forget the conversation; the system text stays."""
        self.messages = ()

    def ask(
        self, text: str, pictures: Sequence[Path] = (), stopped: Stopped = never
    ) -> Generator[str, None, Answer]:
        """Yield the answer to a message as it comes, and remember both; an answer stopped half way, too.

        Raises UsageError for a message that does not fit, and what the model's reading raises; then the
        conversation is as before.
        """
        asked = (*self.messages, Message(USER, text, tuple(pictures)))
        room = min(self._limit or ROOM, ROOM, self.model.context // 4)
        self._embedding = 0.0
        messages = (*self._system, *asked)
        prompt = fitting(self.model.text, self._embed, messages, self.model.context, room)
        pieces = answer(self._reader, prompt.parts, self._draw, self._limit, stopped)
        said = yield from (pieces if not self.model.text.template else stripped(pieces))
        if said.text or said.ended != "interrupted":
            self.messages = (*prompt.messages[len(self._system) :], Message(ASSISTANT, said.text))
        cut = (CUT.format(said.context),) if said.ended == "context" else ()
        seconds = said.prompt_seconds + self._embedding
        return replace(said, prompt_seconds=seconds, notes=(*prompt.notes, *cut))

    def _embed(self, prompt: str, pictures: Sequence[Path]) -> list[Part]:
        """As the model's; the towers' time is a part of the prompt's."""
        began = time.perf_counter()
        parts = self.model.embed(prompt, pictures)
        self._embedding += time.perf_counter() - began
        return parts

    def _draw(self, logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> int:
        return draw(logits, self._sampling, self._random)


def stripped(pieces: Generator[str, None, Answer]) -> Generator[str, None, Answer]:
    """An answer without the white space before it, which templates write or leave to the model."""
    begun = False
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            said: Answer = end.value
            return replace(said, text=said.text.lstrip())
        piece = piece if begun else piece.lstrip()
        if piece:
            begun = True
            yield piece
