"""One answer, token by token: nothing is read twice, and characters come whole."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dsconvert.chat.model import Floats, Model, Part, Stopped

AT_ONCE = 512  # tokens of a prompt that are read together
Ended = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Answer:
    """What the model answered, why it ended, and how long things took.

    It ended at a `stop` token, at the `length` asked for, with a full `context` or `interrupted`. Of
    `prompt_tokens` only `read_tokens` had to be read. `used` of `context` tokens are taken now.
    """

    text: str
    ended: Ended
    prompt_tokens: int
    read_tokens: int
    answer_tokens: int
    prompt_seconds: float
    answer_seconds: float
    used: int
    context: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The answer in the JSON form of events."""
        return {"event": "answer", **vars(self), "notes": list(self.notes)}


class Reader:
    """A model and what it has read, so that the next prompt is read from where it differs."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._seen: list[Hashable] = []

    def __len__(self) -> int:
        return len(self._seen)

    def prompt(self, parts: Sequence[Part], stopped: Stopped) -> tuple[Floats | None, int]:
        """Read a prompt; the logits after it (None when stopped), and how many tokens had to be read."""
        keys = [_keys(part) for part in parts]
        flat = [key for part in keys for key in part]
        common = next((i for i, (a, b) in enumerate(zip(self._seen, flat, strict=False)) if a != b), None)
        wanted = min(len(self._seen), len(flat) - 1) if common is None else min(common, len(flat) - 1)
        kept = self.model.forget(wanted)
        del self._seen[kept:]
        start, logits = 0, None
        for part, names in zip(parts, keys, strict=True):
            for at in range(max(0, kept - start), len(part), AT_ONCE):
                logits = self.add(part[at : at + AT_ONCE], names[at : at + AT_ONCE], stopped)
                if logits is None:
                    return None, len(self._seen) - kept
            start += len(part)
        return logits, len(flat) - kept

    def add(self, part: Part, names: Sequence[Hashable], stopped: Stopped) -> Floats | None:
        """Read what follows; the logits after it, None when stopped: then it is not read."""
        logits = self.model.read(part, len(self._seen), stopped)
        if logits is not None:
            self._seen += names
        return logits


def answer(
    reader: Reader,
    parts: Sequence[Part],
    draw: Callable[[Floats], int],
    limit: int | None,
    stopped: Stopped,
) -> Generator[str, None, Answer]:
    """Read a prompt and yield the answer's text as it comes, characters whole; at most `limit` tokens of it.

    Raises what the model's reading raises.
    """
    model, text = reader.model, reader.model.text
    began = time.perf_counter()
    logits, read = reader.prompt(parts, stopped)
    answering = time.perf_counter()
    whole = codecs.getincrementaldecoder("utf-8")("replace")
    said, count, ended = "", 0, "interrupted"
    while logits is not None:
        if stopped():
            break
        token = draw(logits)
        if token in text.stops:
            ended = "stop"
            break
        count += 1
        piece = whole.decode(text.piece(token))
        if piece:
            said += piece
            yield piece
        if count == limit:
            ended = "length"
            break
        if len(reader) >= model.context:
            ended = "context"
            break
        logits = reader.add([token], [token], stopped)
    end = time.perf_counter()
    return Answer(
        said, ended, sum(map(len, parts)), read, count, answering - began, end - answering,  # type: ignore[arg-type]
        len(reader), model.context,
    )  # fmt: skip


def _keys(part: Part) -> list[Hashable]:
    """What tells the positions of a part from others: the token, or of embeddings their values and place."""
    if isinstance(part, np.ndarray) and part.ndim == 2:
        own = hash(part.tobytes())
        return [(own, at) for at in range(len(part))]
    return [int(token) for token in part]
