"""What a conversation needs of a model: how it takes text, and the logits after what it has read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Part = Sequence[int] | Floats  # token ids, or embeddings [n, d] in their place
Stopped = Callable[[], bool]  # asked now and then: whether the user wants no more


@dataclass(frozen=True)
class ChatText:
    """How a model takes and gives text.

    `template` is its chat template ("" for none), `names` has the texts of bos_token and eos_token. BOS,
    whose id is `bos`, stands before a text where `add_bos` says so. A generation ends at any of `stops`.
    `encode` gives the ids of a text, special tokens in it parsed and nothing added; `piece` the bytes of one
    token, none for a special one. `marker` stands in a prompt where a picture goes ("": none are taken).
    """

    where: Path
    template: str = field(repr=False)
    names: Mapping[str, str]
    bos: int | None
    add_bos: bool
    stops: frozenset[int]
    encode: Callable[[str], list[int]] = field(repr=False)
    piece: Callable[[int], bytes] = field(repr=False)
    marker: str = ""


class Model(Protocol):
    """A loaded model with one sequence, which keeps what it has read."""

    @property
    def text(self) -> ChatText:
        """How it takes and gives text."""

    @property
    def context(self) -> int:
        """The most tokens that the sequence may have."""

    def embed(self, prompt: str, pictures: Sequence[Path]) -> list[Part]:
        """A prompt in which `text.marker` stands for each of the pictures, as parts; BOS as it comes.

        Raises UsageError where there are no pictures to be had, ConversionError for one that cannot be read.
        """

    def read(self, part: Part, at: int, stopped: Stopped) -> Floats | None:
        """Read a part at positions `at`...; the logits [vocab] after its last, None where `stopped` said so.

        What was read at positions before `at` counts, anything after is gone. Raises ConversionError.
        """

    def forget(self, length: int) -> int:
        """Keep the first `length` positions; how many are really kept, which may be fewer."""


def once(text: ChatText, parts: Sequence[Part]) -> list[Part]:
    """A prompt's parts with BOS before them exactly once, where the model or its template asks for it."""
    first = list(parts[0]) if parts and not isinstance(parts[0], np.ndarray) else []
    rest = list(parts[1:] if first else parts)
    if text.bos is None:
        return list(parts)
    while first[:1] == [text.bos] and (first[1:2] == [text.bos]):
        first = first[1:]
    if text.add_bos and first[:1] != [text.bos]:
        first = [text.bos, *first]
    return [first, *rest] if first else rest
