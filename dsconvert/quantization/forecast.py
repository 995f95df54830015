"""How long a calibrated run will take: foretold from this machine's speed, then from the blocks that ran.

What a run does is mostly products of matrices, whose number is known beforehand: the linears on every token,
the sums of their inputs, the factors of these sums, the walk. The machine's speed at them is measured first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st

if TYPE_CHECKING:
    import torch

SIDE = 512  # of the matrices that the speed is measured with
LONG = (
    60.0  # seconds of a run from which on it is measured with those of WIDE, which take a share of a second:
)
WIDE = 2048  # other work on the machine then slows them down as it will the run
TRIES = 3
LOOPS = 2e-8  # seconds for a weight in the loops beside a product of its errors, on one thread
TRIANGLE = 1.3  # of half a product's time: what half a symmetric product takes


@dataclass(frozen=True)
class Speed:
    """What is done in a second: FLOP of linears, of sums of inputs, of float32 products, of float64 Cholesky
    factors; weights in the loops beside a product.
    """

    runs: float
    sums: float
    products: float
    factors: float
    loops: float


@dataclass(frozen=True)
class Seconds:
    """What a block will take: its linears, the sums of their inputs, the solver."""

    run: float = 0.0
    sums: float = 0.0
    solve: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.run + self.sums + self.solve


@dataclass(frozen=True)
class Text:
    """The calibration windows that a process sees, and how its walk goes: see `block_walk.walk`."""

    windows: float
    length: int
    fixed: bool


def measure_speed(
    decoder: st.Decoder, side: int = SIDE, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Measure the device that the decoder runs on, by the `clock`, with matrices [side, side]."""
    import torch

    device, own = decoder.device, decoder.dtype

    def square(dtype: torch.dtype) -> torch.Tensor:
        return torch.eye(side, dtype=dtype, device=device) + 1 / side

    def speed(flop: float, work: Callable[[], object]) -> float:
        took = []
        for _ in range(TRIES):
            started = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append(clock() - started)
        return flop / sorted(took)[TRIES // 2]

    single, half, double = square(torch.float32), square(own), square(torch.float64)
    products = speed(2 * side**3, lambda: single @ single)
    runs = products if own == torch.float32 else speed(2 * side**3, lambda: half @ half)
    return Speed(
        runs=runs,
        sums=runs if linear_inputs.multiplies_halves(device.type, own) else products,
        products=products,
        factors=speed(side**3 / 3, lambda: torch.linalg.cholesky_ex(double)),
        loops=torch.get_num_threads() / LOOPS if device.type == "cpu" else math.inf,
    )


def foretell(
    decoder: st.Decoder, text: Text, passes: float, head: bool = False, finished: int = 0
) -> list[Seconds]:
    """What each block will take one process, and the head after them if it is solved.

    `passes` is how often a solve goes through the products of half of H and a linear's errors; the first
    `finished` blocks only run.
    """
    found = _foretold(decoder, text, passes, head, finished, measure_speed(decoder))
    if _sum(found).total > LONG:
        found = _foretold(decoder, text, passes, head, finished, measure_speed(decoder, WIDE))
    return found


def _foretold(
    decoder: st.Decoder, text: Text, passes: float, head: bool, finished: int, speed: Speed
) -> list[Seconds]:
    shapes, share = decoder.source.shapes(), _share(decoder, text)
    found = []
    for index in range(decoder.config.layers):
        attention = 2.0 * text.windows * text.length**2 * decoder.config.hidden_size
        seen = dict.fromkeys((name for names in decoder.experts[index] for name in names), share)
        parts = [
            group_seconds(decoder, [shapes[name] for name in names], seen.get(names[0], text), speed, passes)
            for names in block_walk.groups(decoder, index)
        ]
        block = _sum([Seconds(run=attention / speed.runs), *parts])
        found.append(block if index >= finished else Seconds(run=block.run))
    if head:
        found.append(group_seconds(decoder, [shapes[decoder.head]], replace(text, fixed=True), speed, passes))
    return found


def _share(decoder: st.Decoder, text: Text) -> Text:
    """The windows that an expert sees, all seeing as much."""
    experts = decoder.config.experts
    if experts is None:
        return text
    return replace(text, windows=text.windows * experts.used / experts.count)


def group_seconds(
    decoder: st.Decoder, shapes: Sequence[tuple[int, ...]], text: Text, speed: Speed, passes: float
) -> Seconds:
    """What linears [N, K] with the same inputs will take."""
    tokens, inputs = text.windows * text.length, shapes[0][1]
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    again = 0.0
    if not text.fixed and len(shapes) > 1:  # of the linears before a last one, where its inputs are not kept
        given = max(outputs for outputs, _ in shapes)
        fit = linear_inputs.room(decoder, int(text.windows) + 1, text.length, given)
        again = max(0.0, 1 - fit / text.windows)
    walk = passes * weights * (inputs / speed.products + 1 / speed.loops)
    return Seconds(
        run=2.0 * weights * tokens * (1 + again) / speed.runs,
        sums=TRIANGLE * inputs**2 * tokens / speed.sums,
        solve=inputs**3 / 3 / speed.factors + walk,
    )


def _sum(parts: Iterable[Seconds]) -> Seconds:
    parts = list(parts)
    return Seconds(sum(p.run for p in parts), sum(p.sums for p in parts), sum(p.solve for p in parts))


def told(blocks: Sequence[Seconds]) -> str:
    """A line on what is ahead, before anything of it is done."""
    whole = _sum(blocks)
    shares = ((whole.run, "their linears"), (whole.sums, "sums of inputs"), (whole.solve, "solving"))
    parts = ", ".join(f"{100 * part / whole.total:.0f} % {what}" for part, what in shares)
    count = f"{len(blocks)} blocks" if len(blocks) > 1 else "1 block"
    return f"about {duration(whole.total)} for {count} by this machine's speed ({parts})"


def left(blocks: Sequence[Seconds], took: Sequence[float]) -> float:
    """Seconds for the blocks after the first ones, which `took` so long."""
    done = sum(block.total for block in blocks[: len(took)])
    return sum(block.total for block in blocks[len(took) :]) * sum(took) / done


def duration(seconds: float) -> str:
    """A time as people say it: 4000 -> "1 h 7 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
