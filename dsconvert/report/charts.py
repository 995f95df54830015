"""Small charts as inline SVG: pure functions from numbers to text, no scripts, no outside files.

Colours come from the page's CSS by class, so that a chart follows its light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
WIDTH, HEIGHT = 720, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
NAMES = 150  # where the cells of a heat map begin


def line(values: Sequence[float], x_label: str, y_label: str, limit: float | None = None) -> str:
    """One value per integer x from 0 on, as a line with dots; `limit` is a dashed line if it is in sight."""
    top = max([*filter(math.isfinite, values), 1e-12]) * 1.1
    sight = limit is not None and limit <= 3 * top
    if limit is not None and sight:
        top = max(top, limit * 1.05)
    ticks = nice_ticks(top)
    top = max(top, ticks[-1])
    count = max(len(values) - 1, 1)
    shares = [v / top if math.isfinite(v) else 1.0 for v in values]  # at the upper edge; its title says it
    points = [(_x(i / count), _y(share)) for i, share in enumerate(shares)]
    parts = _frame(x_label, y_label, [(t / top, f"{t:g}") for t in ticks])
    step = max(1, len(values) // 16)
    parts += [_text(_x(i / count), HEIGHT - 18, str(i), "middle") for i in range(0, len(values), step)]
    if limit is not None and sight:
        y = _y(limit / top)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    for i, (x, y) in enumerate(points):
        tip = escape(f"{x_label} {i}: {values[i]:.4g}")
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{tip}</title></circle>')
    return _svg(parts, HEIGHT, f"{y_label} by {x_label}")


def log_histogram(values: Doubles, x_label: str, marks: Mapping[str, float], bins: int = 48) -> str:
    """Counts of positive values in bins of equal ratio; `marks` are named lines; zeros are counted below."""
    endless = int((~np.isfinite(values)).sum())
    positive = values[(values > 0) & np.isfinite(values)]
    if not len(positive) and not endless:
        return f"<p>All {len(values)} values are exactly zero.</p>"
    if not len(positive):
        return f"<p>{endless} of {len(values)} values are not finite and none can be drawn.</p>"
    low = math.log10(max(float(positive.min()), 1e-14))
    high = max(math.log10(float(positive.max())), low + 1e-3)
    counts, edges = np.histogram(np.log10(positive.clip(min=10**low)), bins, (low, high))
    top = float(counts.max()) * 1.25  # room for the marks' names above the bars
    parts = _frame(x_label, "tokens", [(t / top, f"{t:g}") for t in nice_ticks(top) if t <= top])
    width = (WIDTH - LEFT - RIGHT) / bins
    for i, count in enumerate(counts):
        y = _y(count / top)
        tip = f"{10 ** edges[i]:.2g} to {10 ** edges[i + 1]:.2g}: {count}"
        parts.append(
            f'<rect class="bar" x="{LEFT + i * width:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{tip}</title></rect>'
        )
    for power in range(math.ceil(low), math.floor(high) + 1):
        parts.append(_text(_x((power - low) / (high - low)), HEIGHT - 18, f"1e{power}", "middle"))
    for row, (name, value) in enumerate(marks.items()):
        if 0 < value < math.inf:
            x = _x(min(max((math.log10(value) - low) / (high - low), 0), 1))
            parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            anchor = "end" if x > WIDTH - 160 else "start"
            parts.append(_text(x + (-4 if anchor == "end" else 4), TOP + 10 + 13 * row, name, anchor))
    zeros = len(values) - len(positive) - endless
    note = f"<p>{zeros} of {len(values)} values are exactly zero and not drawn.</p>" if zeros else ""
    note += f"<p>{endless} of {len(values)} values are not finite and not drawn.</p>" if endless else ""
    return _svg(parts, HEIGHT, f"histogram of {x_label}") + note


def log_scatter(points: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> str:
    """Named points (x from 0 on, y above 0 on a logarithmic axis); a y of 0 is at the lower edge, marked."""
    positive = [y for _, y in points.values() if 0 < y < math.inf]
    low = math.floor(math.log10(min(positive, default=1e-6)))
    high = max(math.ceil(math.log10(max(positive, default=1e-5))), low + 1)
    ticks = nice_ticks(max([x for x, _ in points.values()], default=1.0) * 1.1)
    powers = range(low, high + 1)
    parts = _frame(x_label, y_label, [((p - low) / (high - low), f"1e{p}") for p in powers])
    parts += [_text(_x(t / ticks[-1]), HEIGHT - 18, f"{t:g}", "middle") for t in ticks]
    for name, (x, y) in points.items():
        share = (math.log10(y) - low) / (high - low) if 0 < y < math.inf else float(y > 0)
        at, height = _x(x / ticks[-1]), _y(share)
        tip = escape(f"{name}: {x:.4g}, {y:.4g}")
        parts.append(
            f'<circle class="dot" cx="{at:.1f}" cy="{height:.1f}" r="4"><title>{tip}</title></circle>'
        )
        near, label = at > WIDTH - 110, name if y > 0 else f"{name} (0)"
        parts.append(_text(at + (-8 if near else 8), height + 4, label, "end" if near else "start"))
    return _svg(parts, HEIGHT, f"{y_label} against {x_label}")


def heat_map(rows: Mapping[str, Mapping[int, float]], columns: int, floor: float, unit: str) -> str:
    """A cell per named row and integer column: pale where the value is far above `floor`, strong near it.

    Cells without any error (infinite values) are left empty; missing ones are not there.
    """
    finite = [v for row in rows.values() for v in row.values() if math.isfinite(v)]
    best = max([*finite, floor + 1])
    side = min(22.0, (WIDTH - NAMES - RIGHT) / max(columns, 1))
    parts = []
    for r, (name, row) in enumerate(rows.items()):
        y = TOP + r * 20
        parts.append(_text(NAMES - 8, y + 13, name, "end"))
        for column, value in row.items():
            if value == math.inf:
                style = 'class="equal"'
            else:
                worth = (value - floor) / (best - floor) if math.isfinite(value) else 0.0
                style = f'class="heat" fill-opacity="{1 - 0.9 * min(max(worth, 0), 1):.2f}"'
            tip = escape(f"{name}, {column}: {'no error' if value == math.inf else f'{value:.1f} {unit}'}")
            parts.append(
                f'<rect {style} x="{NAMES + column * side:.1f}" y="{y}" width="{side - 1:.1f}" height="18">'
                f"<title>{tip}</title></rect>"
            )
    height = TOP + 20 * len(rows) + 20
    step = max(1, columns // 16)
    parts += [_text(NAMES + (i + 0.5) * side, height - 6, str(i), "middle") for i in range(0, columns, step)]
    return _svg(parts, height, "error by tensor and layer")


def stacked_bar(shares: Mapping[str, float]) -> str:
    """One bar of named shares that sum to something positive."""
    total = sum(shares.values()) or 1.0
    parts, x = [], 0.0
    for i, (name, value) in enumerate(shares.items()):
        width = WIDTH * value / total
        tip = escape(f"{name}: {value / total:.1%}")
        parts.append(
            f'<rect class="part{i % 6}" x="{x:.1f}" y="0" width="{max(width - 1, 0.5):.1f}" height="28">'
            f"<title>{tip}</title></rect>"
        )
        if width > 60:
            parts.append(_text(x + width / 2, 18, f"{name} {value / total:.0%}", "middle", "inside"))
        x += width
    return _svg(parts, 28, "share of bytes by type")


def nice_ticks(top: float, count: int = 4) -> list[float]:
    """About `count` round numbers from 0 up to the first that reaches `top` / 1.1."""
    raw = top / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(top / 1.1 / step - 1e-9) + 1)]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(x_label: str, y_label: str, ticks: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for share, name in ticks:
        y = _y(share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, name, "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = escape(y_label)
    return [
        *parts,
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{label}</text>',
    ]


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"
