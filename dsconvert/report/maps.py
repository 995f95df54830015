"""Maps of a model as inline SVG: a cell for each tensor, by its name and its layer, with a legend."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from dsconvert.report.drawing import LINE, RIGHT, TOP, WIDTH, svg, text, text_width

Value = TypeVar("Value")
NAMES = 170  # where the cells begin
ROW, MOST_SIDE, SWATCH = 20, 52.0, 12
READABLE = 40  # of a cell, from where on its value is written into it
KEYS = 60  # of the bar that shows the scale
# Ends and middle of the scale of errors; between few and many bits. Both can be seen on light and dark.
ERRORS = ((43, 108, 176), (233, 196, 106), (178, 34, 24))
BITS = ((253, 224, 95), (94, 201, 98), (33, 145, 140), (59, 82, 139), (94, 30, 120))


@dataclass(frozen=True)
class Scale:
    """A scale of errors over `values`, in ascending order: 0 stands for the greatest, 1 for the least."""

    values: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where a value lies, half by its distance from both ends and half by its rank."""
        least, most = self.values[0], self.values[-1]
        if least == most:
            return 0.0
        above = len(self.values) - bisect_right(self.values, value)
        below = bisect_left(self.values, value)
        return ((most - value) / (most - least) + above / max(above + below, 1)) / 2


def error_map(cells: Mapping[str, Mapping[int, float]], columns: int, unit: str) -> str:
    """The signal to noise of each tensor: the scale goes from the least that is there to the most.

    It goes half by value and half by rank, so that tensors of one type differ beside those of another.
    Cells without any error (infinite values) are empty; those that are not finite are framed.
    """
    finite = [v for row in cells.values() for v in row.values() if math.isfinite(v)]
    scale = Scale(tuple(sorted(finite)))

    def cell(value: float) -> tuple[str, str]:
        if math.isfinite(value):
            return colour(ERRORS, scale.share(value)), f"{value:.1f} {unit}"
        return ("equal", "no error") if value > 0 else ("broken", "not finite")

    parts, bottom = _grid(cells, columns, cell)
    if finite:
        parts += _legend(bottom, scale, unit)
    return svg(parts, bottom + (44 if finite else 0), "error by tensor and layer")


def type_map(types: Mapping[str, Mapping[int, str]], columns: int) -> str:
    """The type of each tensor; colours go by bits, and the legend counts the tensors of each type."""
    counts = Counter(kind for row in types.values() for kind in row.values())
    order = sorted(counts, key=lambda kind: (bits_of(kind), kind))
    colours = {kind: colour(BITS, i / max(len(order) - 1, 1)) for i, kind in enumerate(order)}

    def cell(value: str) -> tuple[str, str]:
        return colours[value], value

    parts, bottom = _grid(types, columns, cell)
    x, y = float(NAMES), bottom + 12
    for kind in order:
        words = f"{kind} ({counts[kind]})"
        if x + SWATCH + 6 + text_width(words) > WIDTH - RIGHT and x > NAMES:
            x, y = float(NAMES), y + LINE + 5
        look = f'class="cell" fill="{colours[kind]}" width="{SWATCH}" height="{SWATCH}"'
        parts.append(f'<rect {look} x="{x:.1f}" y="{y - SWATCH + 2:.1f}"/>')
        parts.append(text(x + SWATCH + 5, y, words, "start"))
        x += SWATCH + 18 + text_width(words)
    return svg(parts, y + 10, "type by tensor and layer")


def colour(stops: Sequence[tuple[int, int, int]], share: float) -> str:
    """The colour at a share of the way through `stops`, which are equally far apart."""
    at = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(at), len(stops) - 2)
    mixed = (round(a + (b - a) * (at - i)) for a, b in zip(stops[i], stops[i + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def brightness(filled: str) -> float:
    """How bright a colour is to the eye, from 0 to 255."""
    red, green, blue = (int(filled[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def bits_of(kind: str) -> int:
    """The bits of a value that the name of a type states, 0 where it states none: q4_k, f16, exl2_3."""
    found = re.search(r"\d+", kind.removeprefix("exl2_"))
    return int(found[0]) if found else 0


def _grid(
    rows: Mapping[str, Mapping[int, Value]], columns: int, cell: Callable[[Value], tuple[str, str]]
) -> tuple[list[str], float]:
    """A named row of cells for each of `rows`, the layers' numbers below, and where that ends.

    `cell` gives a value's colour, or the class of a cell without one, and its words, whose first stands in a
    cell that is wide enough.
    """
    side = min(MOST_SIDE, (WIDTH - NAMES - RIGHT) / max(columns, 1))
    parts = []
    for r, (name, row) in enumerate(rows.items()):
        y = TOP + r * ROW
        parts.append(text(NAMES - 8, y + 13, name, "end"))
        for column, value in row.items():
            filled, words = cell(value)
            coloured = filled.startswith("#")
            look = f'class="cell" fill="{filled}"' if coloured else f'class="{filled}"'
            tip = escape(f"{name}, layer {column}: {words}")
            x, width = NAMES + column * side, max(side - 1, 0.6)
            parts.append(
                f'<rect {look} x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 2}">'
                f"<title>{tip}</title></rect>"
            )
            if side >= READABLE and coloured:
                style = "value" if brightness(filled) > 110 else "value pale"
                parts.append(text(x + width / 2, y + 13, words.split()[0], "middle", style))
    bottom = TOP + ROW * len(rows) + LINE
    step = max(1, -(-columns // 16))
    parts += [text(NAMES + (i + 0.5) * side, bottom - 1, str(i), "middle") for i in range(0, columns, step)]
    parts.append(text(NAMES - 8, bottom - 1, "layer", "end"))
    return parts, bottom + 6


def _legend(top: float, scale: Scale, unit: str) -> list[str]:
    """The colours from the least error, on the left, to the most, with the values of some places below."""
    width = WIDTH - NAMES - RIGHT
    parts = [
        f'<rect fill="{colour(ERRORS, (i + 0.5) / KEYS)}" x="{NAMES + i * width / KEYS:.1f}" y="{top + 4:g}" '
        f'width="{width / KEYS + 0.3:.1f}" height="10"/>'
        for i in range(KEYS)
    ]
    parts.append(text(NAMES - 8, top + 13, f"signal to noise, {unit}", "end"))
    digits = 1 if scale.values[-1] - scale.values[0] >= 1 else 2
    shown: list[float] = []  # where the numbers stand, which keep apart
    for value in (scale.values[-1], scale.values[0], *scale.values[:: max(1, len(scale.values) // 64)]):
        share = scale.share(value)
        if all(abs(share - other) > 0.1 for other in shown):
            anchor = "start" if share == 0 else "end" if share == 1 else "middle"
            parts.append(text(NAMES + share * width, top + 28, f"{value:.{digits}f}", anchor))
            shown.append(share)
    return parts
