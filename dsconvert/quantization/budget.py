"""How big an output may be whose types are chosen by what they cost, the choice, and what is told of it.

Every format brings the types that its parts may have, their bits, and the nats that these cost; a part may be
several tensors that a runtime wants alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsconvert.errors import UsageError
from dsconvert.events import Check, Event, Foretold, Step, TypesChosen
from dsconvert.quantization.allocate import Option, allocate, curve

POINTS = 24  # of the curve that is printed and kept
Nats = Mapping[str, Mapping[str, float]]  # what each type of each tensor costs
Curve = Sequence[tuple[int, float]]  # bits, or bytes, and nats: what other sizes would buy


@dataclass(frozen=True)
class Budget:
    """What was asked for: bits per weight, bytes of the output, or of a card's memory at a context.

    `types` are what a tensor may get, those that are usual where there are none, none below `floor`;
    `measurement` keeps the costs for other sizes. `chosen` are the types by name, the smallest until they are
    chosen.
    """

    bpw: float | None = None
    size: int | None = None
    vram: int | None = None
    context: int | None = None
    types: tuple[str, ...] = ()
    floor: str | None = None
    measurement: Path | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """It as a part of a file's name."""
        if self.bpw is not None:
            return f"{self.bpw:g}bpw"
        if self.size is not None:
            return _named(self.size, 1000)
        return f"{_named(self.vram or 0, 1024)}-card"

    @property
    def words(self) -> str:
        """It as messages and outputs say it."""
        if self.bpw is not None:
            return f"{self.bpw:g} bits per weight"
        if self.size is not None:
            return f"{self.size:,} bytes"
        return f"a card of {self.vram or 0:,} bytes with a context of {self.context or 'full length'}"


def _named(nbytes: int, unit: int) -> str:
    power = 3 if nbytes >= unit**3 else 2
    return f"{nbytes / unit**power:.4g}{ {2: 'MB', 3: 'GB'}[power] }"


@dataclass(frozen=True)
class Chosen:
    """The type of each part by name, the bits of all, the nats they are foretold to cost, and the curve."""

    types: dict[str, str]
    bits: int
    nats: float
    curve: Curve


def choose(parts: Mapping[str, Mapping[str, Option]], weights: int, bits: int, asked: str) -> Chosen:
    """The types of least cost within `bits`, of `parts` by name with the options that each has by type.

    `weights` is how many they hold. Raises UsageError, which names what was `asked`, for too few bits.
    """
    slots = [list(options.values()) for options in parts.values()]
    check_enough(sum(min(option.bits for option in slot) for slot in slots), bits, asked)
    found = allocate(slots, bits, weights)
    picked = {
        name: list(options)[at] for (name, options), at in zip(parts.items(), found.choice, strict=True)
    }
    return Chosen(picked, found.bits, found.error, curve(slots))


def check_enough(least: int, bits: int, asked: str) -> None:
    """Raises UsageError where what was `asked` leaves fewer `bits` than the smallest types take."""
    if least > bits:
        short = math.ceil((least - bits) / 8)
        raise UsageError(
            f"no choice of types is as small as {asked}",
            why=f"The smallest of each tensor takes {short:,} bytes more",
            hint="Ask for more, or for more types with --types, smaller ones",
        )


def thinned(corners: Curve) -> list[tuple[int, float]]:
    """POINTS of a curve's corners at the most, its ends among them, evenly spread by bits."""
    if len(corners) <= POINTS:
        return list(corners)
    bits = np.array([corner for corner, _ in corners])
    wanted = np.linspace(bits[0], bits[-1], POINTS)
    return [corners[i] for i in sorted({int(np.abs(bits - at).argmin()) for at in wanted})]


def told(event: TypesChosen, makers: str) -> Iterator[Event]:
    """What was chosen, what other sizes would give, and what rules would, which `makers` names."""
    yield event
    yield Step(f"what a size buys, and {makers} by the same measure:")
    rows = [(nbytes, cost, "") for nbytes, cost in event.curve]
    rows += [(nbytes, cost, name) for name, nbytes, cost in event.rules]
    for nbytes, cost, name in sorted([*rows, (event.nbytes, event.nats, "this file")]):
        yield Step(f"  {nbytes:>15,} bytes  foretold KL {cost:.3g}  {name}".rstrip())
    bits = f"{event.bits_per_weight:.3f} bits per weight"
    yield Step(f"{bits} for {event.asked}, foretold KL {event.nats:.3g}")


def beside_foretold(events: Iterable[Event], nats: float = 0.0) -> Iterator[Event]:
    """The events of a conversion, and after the mean KL divergence of its proof what was foretold of it.

    That is `nats`, or what a TypesChosen among the events says.
    """
    for event in events:
        yield event
        if isinstance(event, TypesChosen):
            nats = event.nats
        if isinstance(event, Check) and event.name == "mean KLD" and event.value is not None and nats > 0:
            yield Foretold(nats, event.value)
            yield Step(
                f"foretold KL {nats:.3g}, measured {event.value:.3g}, {event.value / nats:.2f} times it"
            )
