"""How long a calibrated run will take: foretold from this machine's speed, then from the blocks that ran.

What a run does is mostly products of matrices, whose number is known beforehand: the linears on every token,
the sums of their inputs, the factors of these sums, the walk. The machine's speed at them is measured first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsconvert.decoder import linear_inputs
from dsconvert.decoder import torch_decoder as st

if TYPE_CHECKING:
    import torch

SIDE = 1024  # of the matrices that the speed is measured with, and tokens in a batch of theirs
TRIES = 3
LOOPS = 2e-8  # seconds for a weight in the loops beside a product of its errors, on one thread
TRIANGLE = 1.3  # of half a product's time: what half a symmetric product takes


@dataclass(frozen=True)
class Speed:
    """FLOP in a second: of products in the decoder's type, in float32, and of float64 Cholesky factors."""

    runs: float
    products: float
    factors: float


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
    """The calibration windows that a process sees, and how its walk goes: see `linear_inputs.walk`."""

    windows: int
    length: int
    fixed: bool


def measure_speed(decoder: st.Decoder) -> Speed:
    """Measure the device that the decoder runs on: a fraction of a second on a CPU."""
    import torch

    def square(dtype: torch.dtype) -> torch.Tensor:
        return torch.eye(SIDE, dtype=dtype, device=decoder.device) + 1 / SIDE

    def seconds(work: Callable[[], object]) -> float:
        took = []
        for _ in range(TRIES):
            started = time.perf_counter()
            work()
            if decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
            took.append(time.perf_counter() - started)
        return sorted(took)[TRIES // 2]

    own, single, double = square(decoder.dtype), square(torch.float32), square(torch.float64)
    products = 2 * SIDE**3 / seconds(lambda: single @ single)
    return Speed(
        runs=products if own.dtype == single.dtype else 2 * SIDE**3 / seconds(lambda: own @ own),
        products=products,
        factors=SIDE**3 / 3 / seconds(lambda: torch.linalg.cholesky_ex(double)),
    )


def foretell(
    decoder: st.Decoder, text: Text, passes: float, head: bool = False, finished: int = 0
) -> list[Seconds]:
    """What each block will take one process, and the head after them if it is solved.

    `passes` is how often a solve goes through the products of half of H and a linear's errors; the first
    `finished` blocks only run.
    """
    speed, shapes = measure_speed(decoder), decoder.source.shapes()
    found = []
    for index in range(decoder.config.layers):
        groups = [[shapes[name] for name in names] for names in linear_inputs.groups(decoder, index)]
        attention = 2.0 * text.windows * text.length**2 * decoder.config.hidden_size
        parts = [_group(decoder, group, text, speed, passes) for group in groups]
        block = _sum([Seconds(run=attention / speed.runs), *parts])
        found.append(block if index >= finished else Seconds(run=block.run))
    if head:
        found.append(_group(decoder, [shapes[decoder.head]], replace(text, fixed=True), speed, passes))
    return found


def _group(
    decoder: st.Decoder, shapes: Sequence[tuple[int, ...]], text: Text, speed: Speed, passes: float
) -> Seconds:
    """Linears [N, K] with the same inputs."""
    import torch

    tokens, inputs = text.windows * text.length, shapes[0][1]
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    again = 0.0
    if not text.fixed and len(shapes) > 1:  # of the linears before a last one, where its inputs are not kept
        given = max(outputs for outputs, _ in shapes)
        again = 1 - linear_inputs.room(decoder, text.windows, text.length, given) / text.windows
    walk = passes * weights * (inputs / speed.products + LOOPS / torch.get_num_threads())
    return Seconds(
        run=2.0 * weights * tokens * (1 + again) / speed.runs,
        sums=TRIANGLE * inputs**2 * tokens / speed.products,
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
    return f"about {duration(whole.total)} for {len(blocks)} blocks by this machine's speed ({parts})"


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
