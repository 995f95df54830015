"""The table of a model's peak memory by type, runtime, batch and length, and what of it fits a card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsconvert.errors import UsageError
from dsconvert.memory.model import Made, Sized
from dsconvert.memory.peak import Card, Peak, longest, peak, share_out
from dsconvert.memory.runtimes import RUNTIMES, Runtime, cache_bits


@dataclass(frozen=True)
class Question:
    """What the table is asked: batches, lengths, how many cards, the cache's type, which types and runtimes.

    `vram` is what a card has, in bytes. No types or runtimes: all, but those that run without a card.
    """

    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    cards: int = 1
    cache: str | None = None
    types: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    vram: int | None = None


@dataclass(frozen=True)
class Row:
    """A type in a runtime at a batch: the peak of each length, and the longest that fits a card of `vram`."""

    made: Made
    runtime: Runtime
    batch: int
    peaks: tuple[Peak, ...]
    longest: int | None


def rows(sized: Sized, asked: Question) -> Iterator[Row]:
    """Every row of the table, type after type; raises UsageError where nothing is left to show."""
    chosen = list(_chosen(sized, asked))
    if not chosen:
        known = ", ".join(dict.fromkeys(made.type for made in sized.types))
        raise UsageError(
            "no type is left to show",
            where=sized.name,
            why=f"Its types are {known}; runtimes are {', '.join(RUNTIMES)}",
            hint="Check --types, --runtime and --cache against each other",
        )
    for made, runtime, bits in chosen:
        cards = share_out(made.weights, asked.cards, runtime.embedding)
        for batch in asked.batches:
            peaks = tuple(
                peak(sized.decoder, cards, runtime, bits, batch, length) for length in asked.lengths
            )
            yield Row(made, runtime, batch, peaks, _longest(sized, cards, runtime, bits, batch, asked.vram))


def _chosen(sized: Sized, asked: Question) -> Iterator[tuple[Made, Runtime, float]]:
    for name in asked.runtimes:
        if name not in RUNTIMES:
            raise UsageError(f"runtime {name[:40]!r} is unknown", hint=f"Known: {', '.join(RUNTIMES)}")
    for made in sized.types:
        for name in made.runtimes:
            runtime = RUNTIMES[name]
            bits = cache_bits(runtime, asked.cache)
            wanted = name in asked.runtimes if asked.runtimes else runtime.on_card
            if bits is not None and wanted and (not asked.types or made.type in asked.types):
                yield made, runtime, bits


def _longest(
    sized: Sized, cards: Sequence[Card], runtime: Runtime, bits: float, batch: int, vram: int | None
) -> int | None:
    return None if vram is None else longest(sized.decoder, cards, runtime, bits, batch, vram)


def best(sized: Sized, asked: Question, found: Sequence[Row]) -> Row | None:
    """Of the rows of the smallest batch, the one with most bits in its blocks that holds the longest length.

    Of equals the one that needs no conversion. Where none holds it, the one that holds most tokens; None
    where no row holds any, or no `vram` was asked for. What is counted in part alone is not judged.
    """
    wanted = min(max(asked.lengths), sized.decoder.context)
    judged = [row for row in found if not row.runtime.bare]
    fitting = [row for row in judged if row.batch == min(asked.batches) and row.longest]
    whole = [row for row in fitting if (row.longest or 0) >= wanted]
    return max(whole, key=_worth, default=max(fitting, key=lambda row: row.longest or 0, default=None))


def _worth(row: Row) -> tuple[float, bool, int]:
    """Bytes of the blocks to three digits, for norms have other types here and there; then what decides."""
    return float(f"{sum(row.made.weights.blocks):.3g}"), not row.made.command, -row.peaks[-1].total


def as_dict(
    sized: Sized, asked: Question, found: Sequence[Row], measured: Sequence[Any] = ()
) -> dict[str, Any]:
    """The table as plain data, sizes in bytes."""
    named = best(sized, asked, found) if asked.vram is not None else None
    return {
        "event": "memory",
        "model": sized.name,
        "parameters": sized.parameters,
        "gpus": asked.cards,
        "cache": asked.cache,
        "vram": asked.vram,
        "rows": [row_dict(sized, asked, row) for row in found],
        "measured": list(measured),
        "best": row_dict(sized, asked, named) if named is not None else None,
    }


def row_dict(sized: Sized, asked: Question, row: Row) -> dict[str, Any]:
    """A row as plain data."""
    return {
        "type": row.made.type,
        "runtime": row.runtime.name,
        "weights": row.made.weights.total,
        "bits_per_weight": round(8 * row.made.weights.total / sized.parameters, 4),
        "batch": row.batch,
        "peaks": [
            {"length": length, "bytes": one.total, "weights": one.weights, "cache": one.cache,
             "activations": one.moment, "runtime": one.fixed}
            for length, one in zip(asked.lengths, row.peaks, strict=True)
        ],
        "longest": row.longest,
        "command": row.made.command,
    }  # fmt: skip
