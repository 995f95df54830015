"""The result of proving a tokenizer against a runtime's: the name to write, or a text that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 12  # ids in an error message


@dataclass(frozen=True)
class Resolution:
    """The value of `tokenizer.ggml.pre`, whether it is proven, on what evidence, and notes for the user."""

    name: str
    proven: bool
    evidence: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """The first text on which a runtime gives other ids, both ids, and how many texts there were."""

    text: str
    own: list[int]
    other: list[int]
    count: int
    total: int

    def __str__(self) -> str:
        own, other = (f"{x[:SHOWN]}{' ...' if len(x) > SHOWN else ''}" for x in (self.own, self.other))
        # An error's text keeps no two spaces in a row, and they may be what differs.
        text = repr(self.text[:60]).replace("  ", "\\x20\\x20")
        return f"on {text} the tokenizer gives {own}, the runtime {other}"


def first_difference(
    texts: Sequence[str], own: Sequence[list[int]], other: Sequence[list[int]]
) -> Difference | None:
    """The first text whose ids differ, or None."""
    wrong = [n for n in range(len(texts)) if own[n] != other[n]]
    if not wrong:
        return None
    n = wrong[0]
    return Difference(texts[n], own[n], other[n], len(wrong), len(texts))
