"""Charts of one series of numbers as inline SVG: pure functions from numbers to text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from dsconvert.report.drawing import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Frame, nice_ticks, svg, text

Doubles = npt.NDArray[np.float64]
FRAME = Frame()
HEIGHT = FRAME.height


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
    points = [(FRAME.x(i / count), FRAME.y(share)) for i, share in enumerate(shares)]
    parts = FRAME.axes(x_label, y_label, [(t / top, f"{t:g}") for t in ticks])
    step = max(1, len(values) // 16)
    parts += [text(FRAME.x(i / count), HEIGHT - 18, str(i), "middle") for i in range(0, len(values), step)]
    if limit is not None and sight:
        y = FRAME.y(limit / top)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    for i, (x, y) in enumerate(points):
        tip = escape(f"{x_label} {i}: {values[i]:.4g}")
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{tip}</title></circle>')
    return svg(parts, HEIGHT, f"{y_label} by {x_label}")


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
    parts = FRAME.axes(x_label, "tokens", [(t / top, f"{t:g}") for t in nice_ticks(top) if t <= top])
    width = (WIDTH - LEFT - RIGHT) / bins
    for i, count in enumerate(counts):
        y = FRAME.y(count / top)
        tip = f"{10 ** edges[i]:.2g} to {10 ** edges[i + 1]:.2g}: {count}"
        parts.append(
            f'<rect class="bar" x="{LEFT + i * width:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{tip}</title></rect>'
        )
    for power in range(math.ceil(low), math.floor(high) + 1):
        parts.append(text(FRAME.x((power - low) / (high - low)), HEIGHT - 18, f"1e{power}", "middle"))
    for row, (name, value) in enumerate(marks.items()):
        if 0 < value < math.inf:
            x = FRAME.x(min(max((math.log10(value) - low) / (high - low), 0), 1))
            parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            anchor = "end" if x > WIDTH - 160 else "start"
            parts.append(text(x + (-4 if anchor == "end" else 4), TOP + 10 + 13 * row, name, anchor))
    zeros = len(values) - len(positive) - endless
    note = f"<p>{zeros} of {len(values)} values are exactly zero and not drawn.</p>" if zeros else ""
    note += f"<p>{endless} of {len(values)} values are not finite and not drawn.</p>" if endless else ""
    return svg(parts, HEIGHT, f"histogram of {x_label}") + note


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
            parts.append(text(x + width / 2, 18, f"{name} {value / total:.0%}", "middle", "inside"))
        x += width
    return svg(parts, 28, "share of bytes by type")
