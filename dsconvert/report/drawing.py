"""The parts of inline SVG that charts are made of: no scripts, no outside files.

Colours of lines and text come from the page's CSS by class, so that a chart follows its light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
LINE = 13  # from one line of text to the next
NARROW, WIDE = "fijlrt.,:;'|()[]!I1- ", "mwMW%@"


@dataclass(frozen=True)
class Frame:
    """The place that points are drawn in, by shares of its width and height."""

    height: int = 220

    def x(self, share: float) -> float:
        """Where a share of the width lies."""
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, share: float) -> float:
        """Where a share of the height lies, from below."""
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str, ticks: Sequence[tuple[float, str]]) -> list[str]:
        """Both axes' labels, and a line for each named share of the height."""
        parts = []
        for share, name in ticks:
            y = self.y(share)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(text(LEFT - 6, y + 4, name, "end"))
        parts.append(text((LEFT + WIDTH - RIGHT) / 2, self.height - 3, x_label, "middle"))
        turned = f'transform="translate(12 {(TOP + self.height - BOTTOM) / 2:g}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
        return parts

    def x_ticks(self, ticks: Sequence[tuple[float, str]]) -> list[str]:
        """The names of shares of the width, below it."""
        return [text(self.x(share), self.height - 18, name, "middle") for share, name in ticks]


def text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    """A line of text whose start, middle or end is at x; y is its base line."""
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def text_width(words: str) -> float:
    """About how wide a line of text is, rather too much than too little."""
    return sum(4.2 if c in NARROW else 9.5 if c in WIDE else 11.5 if ord(c) > 0x2E7F else 6.8 for c in words)


def svg(parts: Sequence[str], height: float, label: str) -> str:
    """The drawing of these parts, which a narrow screen scrolls."""
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
    return f'<div class="chart">{head}{"".join(parts)}</svg></div>'


def nice_ticks(top: float, count: int = 4) -> list[float]:
    """About `count` round numbers from 0 up to the first that reaches `top` / 1.1."""
    step = nice_step(top / count)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(top / 1.1 / step - 1e-9) + 1)]


def nice_span(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers, the first not above `low`, the last not below `high`."""
    step = nice_step(max(high - low, abs(high) * 1e-3, 1e-12) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def nice_step(raw: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
