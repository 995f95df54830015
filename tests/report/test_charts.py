"""The drawings of a report: names that cover nothing, colours that show differences, legends with units."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest

from dsconvert.report import drawing, maps, scatter
from dsconvert.report.scatter import Box, Point


def drawn(html: str) -> ET.Element:
    """The one drawing of some HTML."""
    (found,) = re.findall(r"<svg.*?</svg>", html, re.S)
    return ET.fromstring(found)


def words(svg: ET.Element) -> list[str]:
    return ["".join(part.itertext()) for part in svg.iter("text")]


def names_of(svg: ET.Element) -> dict[str, Box]:
    """Where each name stands, as wide as it is at the least."""
    found = {}
    for part in svg.iter("text"):
        if part.attrib.get("class") == "name" and part.text:
            x, y, width = (
                float(part.attrib["x"]),
                float(part.attrib["y"]),
                0.85 * drawing.text_width(part.text),
            )
            left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[part.attrib["text-anchor"]]
            found[part.text] = Box(left, y - 8, left + width, y)
    return found


def check_apart(points: list[Point], fewest: int) -> None:
    """No name covers another one, a point or the edge; a name far from its point has a line to it."""
    svg = drawn(scatter.log_scatter(points, "size, MB", "mean KLD, nats"))
    boxes = names_of(svg)
    assert len(boxes) >= fewest
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    assert len(circles) == len(points)
    for one, other in combinations(boxes.values(), 2):
        assert not one.meets(other)
    for box in boxes.values():
        assert all(box.gap(x, y) >= scatter.DOT for x, y in circles)
        assert drawing.LEFT <= box.left < box.right <= drawing.WIDTH
    starts = {
        (line.attrib["x1"], line.attrib["y1"])
        for line in svg.iter("line")
        if line.attrib["class"] == "leader"
    }
    for point, (x, y) in zip(points, circles, strict=True):
        box = boxes.get(point.name)
        if box is not None and (f"{x:.1f}", f"{y:.1f}") not in starts:
            assert box.gap(x, y) <= 16
            others = [p for p in circles if math.dist(p, (x, y)) > scatter.SAME]
            assert all(box.gap(x, y) < box.gap(*other) for other in others)


def test_names_of_outputs_that_lie_together_do_not_cover_each_other() -> None:
    """q4_0 and q4_k_m of the sample, whose names were printed one over the other."""
    check_apart([Point("q4_0", 1.803, 0.0098), Point("q4_k_m", 1.869, 0.0096), Point("q8_0", 2.98, 5e-5)], 3)
    check_apart([Point("a", 1.0, 0.01), Point("b", 1.0, 0.01), Point("c", 1.0, 0.01)], 3)


@pytest.mark.parametrize("seed", range(6))
def test_names_of_many_outputs_do_not_cover_each_other(seed: int) -> None:
    lots = random.Random(seed)
    points = [
        Point(
            f"iq{i}_xxs" if i % 2 else f"q{i}_k",
            lots.uniform(1, 4),
            10 ** lots.uniform(-4, 0),
        )
        for i in range(20)
    ]
    check_apart(points, 19)


def test_outputs_of_the_same_name_are_all_drawn() -> None:
    svg = drawn(scatter.log_scatter([Point("a", 1.0, 0.1), Point("a", 2.0, 0.01)], "x", "y"))
    assert len(list(svg.iter("circle"))) == 2
    assert words(svg).count("a") == 2


def test_the_outputs_that_none_beats_are_joined_and_the_failed_are_marked() -> None:
    points = [
        Point("a", 1, 0.1),
        Point("worse", 2, 0.2),
        Point("b", 2, 0.05),
        Point("c", 3, 0.04, good=False),
    ]
    svg = drawn(scatter.log_scatter(points, "x", "y"))
    (front,) = svg.iter("polyline")
    circles = [(c.attrib["cx"], c.attrib["cy"], c.attrib["class"]) for c in svg.iter("circle")]
    joined = [f"{x},{y}" for i, (x, y, _) in enumerate(circles) if i != 1]
    assert front.attrib["points"].split() == joined
    assert [kind for _, _, kind in circles] == ["dot", "dot", "dot", "dot failed"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["sample-q4_0.gguf", "sample-q4_k_m.gguf"], ["q4_0", "q4_k_m"]),
        (["m-gptq-4bit-128g", "m-gptq-3bit-128g"], ["4bit", "3bit"]),
        (["a.gguf"], ["a.gguf"]),
        (["a", "a"], ["a", "a"]),
        (["a-b", "a-b-b"], ["a-b", "a-b-b"]),
        (["one.gguf", "two"], ["one.gguf", "two"]),
    ],
)
def test_names_are_shown_without_what_they_share(names: list[str], short: list[str]) -> None:
    assert scatter.short_names(names) == short


def fills(svg: ET.Element) -> dict[str, str]:
    """The colour, else the class, of each cell, by its title."""
    return {
        cell.findtext("title") or "": cell.attrib.get("fill", cell.attrib.get("class", ""))
        for cell in svg.iter("rect")
        if cell.find("title") is not None
    }


def test_small_differences_of_errors_have_colours_of_their_own() -> None:
    """Every tensor of a q4_0 file has about the same error, and all cells once had one colour."""
    cells = {"q_proj": {0: 21.3, 1: 21.4}, "o_proj": {0: 21.5, 1: 21.6}, "norm": {0: math.inf, 1: math.nan}}
    svg = drawn(maps.error_map(cells, 2, "dB"))
    found = fills(svg)
    assert len(set(found.values())) == 6
    assert found["q_proj, layer 0: 21.3 dB"] == maps.colour(maps.ERRORS, 1.0)
    assert found["o_proj, layer 1: 21.6 dB"] == maps.colour(maps.ERRORS, 0.0)
    assert found["norm, layer 0: no error"] == "equal"
    assert found["norm, layer 1: not finite"] == "broken"
    assert {"signal to noise, dB", "21.60", "21.30", "layer"} <= set(words(svg))


def test_one_error_alone_and_none_are_drawn() -> None:
    for cells in ({"q_proj": {0: 21.3}}, {"norm": {0: math.inf}}, {"norm": {0: math.nan}}):
        assert len(fills(drawn(maps.error_map(cells, 1, "dB")))) == 1


def test_types_have_colours_in_the_order_of_their_bits_and_are_counted() -> None:
    types = {"q_proj": {0: "q4_k", 1: "q4_k"}, "v_proj": {0: "q6_k", 1: "q4_k"}, "norm": {0: "f32", 1: "f32"}}
    svg = drawn(maps.type_map(types, 2))
    found = fills(svg)
    assert found["q_proj, layer 0: q4_k"] == maps.colour(maps.BITS, 0)
    assert found["v_proj, layer 0: q6_k"] == maps.colour(maps.BITS, 0.5)
    assert found["norm, layer 1: f32"] == maps.colour(maps.BITS, 1)
    assert [word for word in words(svg) if "(" in word] == ["q4_k (3)", "q6_k (1)", "f32 (2)"]
    order = ["exl2_2", "iq3_xxs", "mxfp4", "q4_0", "gptq8", "bf16", "f32"]
    assert sorted(order, key=lambda kind: (maps.bits_of(kind), kind)) == order


def test_a_legend_of_many_types_stays_inside() -> None:
    svg = drawn(maps.type_map({"q_proj": {i: f"exl2_{2 + i}" for i in range(17)}}, 17))
    for part in svg.iter("text"):
        assert float(part.attrib["x"]) <= drawing.WIDTH
    height = float(svg.attrib["viewBox"].split()[3])
    assert max(float(part.attrib["y"]) for part in svg.iter("text")) < height


@pytest.mark.parametrize(("low", "high"), [(1.1, 3.0), (0.0, 1e-9), (404e3, 405e3), (21.3, 21.31)])
def test_round_numbers_go_around_what_is_drawn(low: float, high: float) -> None:
    ticks = drawing.nice_span(low, high)
    assert ticks[0] <= low * (1 + 1e-9)
    assert ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 14
