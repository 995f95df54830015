"""Named points over two axes, as inline SVG: every name stands where it covers no other name and no point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from dsconvert.report.drawing import (
    BOTTOM,
    LEFT,
    LINE,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    nice_span,
    svg,
    text,
    text_width,
)

FRAME = Frame(380)
DOT = 4.0
SAME = 1.5 * DOT  # points nearer to each other than this look like one
STEPS = (1, 2, 5)  # of a power of ten, which the logarithmic axis names
ENDS = "-. /"  # of a word; types have underscores in theirs
DISTANCES = (8, 14, 22, 32, 44, 58, 74, 92, 112, 134, 158, 184, 212)  # of a name from its point
# Where a name may stand, the best first: x and y of what it is moved by.
STRAIGHT = (
    (1.0, 0.0),
    (-1.0, 0.0),
    (0.7, -0.7),
    (-0.7, -0.7),
    (0.7, 0.7),
    (-0.7, 0.7),
    (0.0, -1.0),
    (0.0, 1.0),
)
BETWEEN = tuple((x, y) for a, b in ((0.9, 0.4), (0.4, 0.9)) for x in (a, -a) for y in (-b, b))
SIDES = (*STRAIGHT, *BETWEEN)


Place = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A point to draw; `good` is whether its output passed."""

    name: str
    x: float
    y: float
    good: bool = True


@dataclass(frozen=True)
class Box:
    """A rectangle of the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two have some area in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Box) -> bool:
        """Whether the other lies inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom

    def gap(self, x: float, y: float) -> float:
        """How far a place is from it."""
        return math.hypot(max(self.left - x, 0.0, x - self.right), max(self.top - y, 0.0, y - self.bottom))

    def crossed(self, start: Place, end: Place) -> bool:
        """Whether the straight line between two places goes through, by samples of it."""
        shares = [i / 24 for i in range(25)]
        places = [(start[0] + s * (end[0] - start[0]), start[1] + s * (end[1] - start[1])) for s in shares]
        return any(self.left < x < self.right and self.top < y < self.bottom for x, y in places)


@dataclass(frozen=True)
class Label:
    """Where a name stands, which part of it is fixed there, and where a line from its point ends, if any."""

    box: Box
    anchor: str
    leader: Place | None


def log_scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points over x and, on a logarithmic axis, y; those that no other beats in both are joined.

    A y of 0 is at the lower edge and one that is infinite at the upper, and the name says so.
    """
    drawn = [(p, *_place(p, points)) for p in points]
    low, high = _decades(points)
    rows = [(_share(t, low, high), _short(t)) for t in _log_ticks(low, high)]
    left, right = _span(points)
    columns = [t for t in nice_span(left, right) if left <= t <= right]
    parts = FRAME.axes(x_label, y_label, rows)
    parts += FRAME.x_ticks([((t - left) / (right - left), f"{t:g}") for t in columns])
    front = " ".join(f"{x:.1f},{y:.1f}" for x, y in _front(drawn))
    parts.append(f'<polyline class="front" points="{front}"/>')
    names = [f"{p.name} (0)" if p.y == 0 else p.name for p, _, _ in drawn]
    labels = place_labels([(x, y) for _, x, y in drawn], names)
    for (point, x, y), name, label in zip(drawn, names, labels, strict=True):
        tip = escape(f"{point.name}: {point.x:.4g}, {point.y:.4g}{'' if point.good else ', failed'}")
        kind = "dot" if point.good else "dot failed"
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"><title>{tip}</title></circle>'
        )
        if label is None:
            continue
        box = label.box
        if label.leader is not None:
            end = f'x2="{label.leader[0]:.1f}" y2="{label.leader[1]:.1f}"'
            parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" {end}/>')
        at = {"start": box.left + 2, "middle": (box.left + box.right) / 2, "end": box.right - 2}
        parts.append(text(at[label.anchor], box.bottom - 3, name, label.anchor, "name"))
    left_out = sum(label is None for label in labels)
    note = f"<p>{left_out} of {len(points)} points have no room for a name.</p>" if left_out else ""
    return svg(parts, FRAME.height, f"{y_label} against {x_label}") + note


def place_labels(places: Sequence[Place], names: Sequence[str]) -> list[Label | None]:
    """A box for each name, near its point, that meets no other and no point; None where there is no room.

    A name that stands nearer to another point than to its own has a line to its own.
    """
    dots = [Box(x - DOT - 1, y - DOT - 1, x + DOT + 1, y + DOT + 1) for x, y in places]
    field = Box(LEFT, TOP - 6, WIDTH - RIGHT, FRAME.height - BOTTOM)
    boxes: list[Box] = []
    lines: list[tuple[Place, Place]] = []
    found: list[Label | None] = [None] * len(places)
    for i in sorted(range(len(places)), key=lambda i: (-places[i][0], places[i][1])):  # from the right
        rest = [j for j, place in enumerate(places) if math.dist(place, places[i]) > SAME]
        others, apart = [places[j] for j in rest], [dots[j] for j in rest]
        for label in _candidates(places[i], text_width(names[i]) + 4):
            box, end = label.box, label.leader
            if not field.holds(box) or any(box.meets(other) for other in (*boxes, *dots)):
                continue
            if any(box.crossed(*line) for line in lines):
                continue
            if end is None and any(box.gap(*other) <= box.gap(*places[i]) + 2 for other in others):
                continue
            if end is not None and any(other.crossed(places[i], end) for other in (*boxes, *apart)):
                continue
            found[i] = label
            boxes.append(box)
            lines += [] if end is None else [(places[i], end)]
            break
    return found


def short_names(names: Sequence[str]) -> list[str]:
    """The names without what all of them begin and end with, cut where a word ends; at least a word stays."""
    if len(set(names)) < 2:
        return list(names)
    head, tail = _same(names), _same([name[::-1] for name in names])[::-1]
    begin = max(head.rfind(mark) for mark in ENDS) + 1
    at = min((place for place in map(tail.find, ENDS) if place >= 0), default=len(tail))
    end = len(tail) - at
    short = [name[begin : len(name) - end] for name in names]
    return short if all(short) else list(names)


def _same(names: Sequence[str]) -> str:
    """What all names begin with."""
    differing = (i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1)
    return names[0][: next(differing, min(map(len, names)))]


def _candidates(place: Place, width: float) -> Iterator[Label]:
    """Where a name of this width may stand, at growing distances from its place."""
    x, y = place
    for distance in DISTANCES:
        for across, down in SIDES:
            cx, cy = x + across * distance, y + down * distance
            left = cx if across > 0 else cx - width if across < 0 else cx - width / 2
            box = Box(left, cy - LINE / 2, left + width, cy + LINE / 2)
            end = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
            anchor = "start" if across > 0 else "end" if across < 0 else "middle"
            yield Label(box, anchor, end if distance > DISTANCES[1] else None)


def _span(points: Sequence[Point]) -> tuple[float, float]:
    """The ends of x: around all points, with some room for names."""
    values = [p.x for p in points] or [1.0]
    room = 0.08 * max(max(values) - min(values), 0.1 * max(values), 1e-9)
    return max(min(values) - room, 0.0), max(values) + room


def _short(value: float) -> str:
    """A number on an axis: 0.002, 5e-4."""
    return f"{value:g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def _decades(points: Sequence[Point]) -> tuple[float, float]:
    """The logarithms of the lower and the upper end of y: round numbers around all that can be drawn."""
    values = [p.y for p in points if 0 < p.y < math.inf] or [1e-6, 1e-5]
    low, high = _round_log(min(values) / 1.15, down=True), _round_log(max(values) * 1.15, down=False)
    return math.log10(low), math.log10(high)


def _round_log(value: float, down: bool) -> float:
    power = math.floor(math.log10(value))
    rounds = [m * 10.0**p for p in (power - 1, power, power + 1) for m in STEPS]
    if down:
        return max(r for r in rounds if r <= value * 1.0001)
    return min(r for r in rounds if r >= value * 0.9999)


def _log_ticks(low: float, high: float) -> list[float]:
    """The numbers named along y: 1, 2 and 5 of every power of ten, or 1 alone where those are too many."""
    powers = range(math.floor(low) - 1, math.ceil(high) + 1)
    steps = STEPS if high - low <= 4 else (1,)
    ticks = [float(f"{m}e{p}") for p in powers for m in steps]
    return [t for t in ticks if low - 1e-9 <= math.log10(t) <= high + 1e-9]


def _share(value: float, low: float, high: float) -> float:
    return (math.log10(value) - low) / (high - low)


def _place(point: Point, points: Sequence[Point]) -> tuple[float, float]:
    (left, right), (low, high) = _span(points), _decades(points)
    share = _share(point.y, low, high) if 0 < point.y < math.inf else float(point.y > 0)
    return FRAME.x((point.x - left) / (right - left)), FRAME.y(share)


def _front(drawn: Sequence[tuple[Point, float, float]]) -> list[tuple[float, float]]:
    """The points, from the left, that are nearer than every one that is as small."""
    best, front = math.inf, []
    for point, x, y in sorted(drawn, key=lambda one: (one[0].x, one[0].y)):
        if 0 < point.y < best:
            best = point.y
            front.append((x, y))
    return front
