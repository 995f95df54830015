"""The formula: peak memory of a card is weights, cache, the largest moment of the run, and the program's own.

docs/memory.md derives it and holds it against published and measured figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from dsconvert.errors import UsageError
from dsconvert.memory.model import Decoder, Weights, decoder_of
from dsconvert.memory.runtimes import Runtime
from dsconvert.models.config import ModelConfig


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of the card that takes most, by what they are for."""

    weights: int
    cache: int
    moment: int
    fixed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.moment + self.fixed


@dataclass(frozen=True)
class Card:
    """What a card holds: bytes of weights, how many blocks, and whether the head is one of its parts."""

    weights: int
    blocks: int
    head: bool


def share_out(weights: Weights, cards: int, embedding: bool = True) -> tuple[Card, ...]:
    """A model in `cards` runs of whole parts, in order, so that the largest is as small as can be.

    Parts are the embedding with what is beside the decoder, every block, and the head; a head that is the
    embedding is held a second time where a card has the one and not the other, or the embedding is on none.
    Raises UsageError for more cards than parts.
    """
    first = (weights.embedding if embedding else 0) + weights.beside
    last = weights.head
    if weights.tied and (cards > 1 or not embedding):
        last += weights.embedding
    parts = [first, *weights.blocks, last]
    if not 1 <= cards <= len(parts):
        raise UsageError(f"{cards} cards cannot share a model of {len(weights.blocks)} blocks")
    low, high = max(parts), sum(parts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(parts, middle)) <= cards else (middle + 1, high)
    end, found = 0, []
    for run in _runs(parts, low):
        start, end = end, end + len(run)
        blocks = min(end, len(parts) - 1) - max(start, 1)
        found.append(Card(sum(run), max(blocks, 0), end == len(parts)))
    return tuple(found)


def _runs(parts: Sequence[int], limit: int) -> list[list[int]]:
    """The parts in order, in runs that are each as long as `limit` lets them be."""
    runs: list[list[int]] = [[]]
    for part in parts:
        if runs[-1] and sum(runs[-1]) + part > limit:
            runs.append([])
        runs[-1].append(part)
    return runs


def peak(
    decoder: Decoder,
    cards: Sequence[Card],
    runtime: Runtime,
    bits: float,
    batch: int,
    length: int,
) -> Peak:
    """The peak of the card that takes most, for `batch` sequences of `length` tokens.

    `bits` is what a cached value takes.
    """
    return max(
        (_on_card(decoder, card, runtime, bits, batch, length) for card in cards), key=lambda one: one.total
    )


def _on_card(decoder: Decoder, card: Card, runtime: Runtime, bits: float, batch: int, length: int) -> Peak:
    tokens = batch * length
    running = min(tokens, runtime.at_once or tokens)
    latent = decoder.latent if runtime.latent else 0
    cache = ceil(card.blocks * ((latent or decoder.cached) + decoder.indexed) * tokens * bits / 8)
    # Attention in the latent vectors themselves makes queries and outputs of their width for every head.
    fresh = 2 * decoder.heads * latent or decoder.cached
    pairs = running * length
    moments = [0]
    if card.blocks:
        moments += [
            running * runtime.keys * fresh + runtime.scores * decoder.heads * pairs,
            running * runtime.inner * decoder.inner,
        ]
    if card.head:
        moments.append((running if runtime.every_logit else batch) * runtime.logits * decoder.vocab)
    moment = max(moments) + runtime.states * decoder.hidden * running + runtime.mask * pairs
    return Peak(card.weights, cache, moment, runtime.fixed)


def longest(
    decoder: Decoder, cards: Sequence[Card], runtime: Runtime, bits: float, batch: int, memory: int
) -> int:
    """How many tokens each of `batch` sequences may have within `memory` bytes a card, 0 for none.

    At the most as many as the model was made for.
    """
    low, high = 0, decoder.context
    while low < high:
        middle = (low + high + 1) // 2
        fits = peak(decoder, cards, runtime, bits, batch, middle).total <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def left_on_card(config: ModelConfig, runtime: Runtime, memory: int, context: int) -> int:
    """What weights may take on a card of `memory` bytes that also holds one sequence of `context` tokens.

    Raises UsageError where the context alone is too much.
    """
    beside = peak(decoder_of(config), [Card(0, config.layers, head=True)], runtime, 16, 1, context).total
    if beside >= memory:
        raise UsageError(
            f"a context of {context} tokens does not fit the card",
            why=f"Its cache and what runs take {beside:,} bytes of {memory:,}",
            hint="Give a smaller --context, or a larger --vram",
        )
    return memory - beside
