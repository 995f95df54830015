"""The report: complete, self-contained, well-formed whatever the text holds, and honest JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from defects import L, noisy
from random_llama import Memory, make, tokens

from dsconvert.errors import OutputError
from dsconvert.proof import checks, compare
from dsconvert.proof import result as rp
from dsconvert.proof.block_sample import compare_blocks
from dsconvert.proof.figures import Estimate
from dsconvert.proof.thresholds import thresholds_for
from dsconvert.report import page as report_page
from dsconvert.report.drawing import nice_ticks
from dsconvert.streams import as_json
from dsconvert.texts import windows

pytest.importorskip("torch")
NASTY = "<script>alert(1)</script>&\"'\x00\x1b\n\ud800"
LIMITS = thresholds_for("q8_0")


@pytest.fixture(scope="module")
def report() -> rp.Report:
    _, source, config = make()
    text = windows.whole(tokens(config, 3, 40))
    found = compare.result(compare.compare(source, noisy(source, 0.01), config, text, device="cpu"))
    return rp.Report(
        title="tiny <to> q8_0",
        comparison=found,
        verdict=checks.judge(found, LIMITS),
        limits=LIMITS,
        windows=text,
        sizes=rp.sizes_by_type([("q8_0", 64, 68), ("f32", 4, 16), ("q8_0", 64, 68)]),
        provenance={"source": "a & b"},
        decode=lambda ids: "".join(chr(0x4E00 + i) for i in ids),
    )


def broken() -> rp.Report:
    _, source, config = make()
    text = windows.whole(tokens(config, 1, 16))
    bad = Memory({**source.tensors, L + "mlp.up_proj.weight": np.full((160, 64), np.nan, np.float32)})
    found = compare.result(compare.compare(source, bad, config, text, device="cpu"))
    return rp.Report("broken", found, checks.judge(found, LIMITS), LIMITS, text)


class Page(HTMLParser):
    """Collects tags and text, and complains about tags that are not closed."""

    VOID = ("meta", "rect", "line", "polyline", "circle")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID or tag in ("rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_shows_every_part(report: rp.Report) -> None:
    page = Page(report_page.as_html(report))
    text = " ".join(page.text)
    for heading in ("Figures", "Error by layer", "Error by tensor", "KL divergence", "Worst tokens",
                    "Size by type", "Provenance", "Mean KLD", "Same top p", "RMS Δp", "a & b"):  # fmt: skip
        assert heading in text, heading
    assert f"{report.comparison.figures.kld.value:.6f}" in text  # type: ignore[union-attr]
    assert ("PASS" in text) == report.verdict.passed
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 5
    assert tags.count("circle") == len(report.comparison.blocks)


def test_the_page_loads_nothing(report: rp.Report) -> None:
    page = report_page.as_html(report)
    tags = Page(page).seen
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not [name for _, attributes in tags for name in attributes if name in ("src", "href")]
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", page)
    assert "default-src 'none'" in page


def test_text_cannot_break_the_page(report: rp.Report) -> None:
    hostile = rp.Report(
        **{**vars(report), "title": NASTY, "decode": lambda ids: NASTY, "provenance": {NASTY: NASTY}}
    )
    page = report_page.as_html(hostile)
    assert "<script" not in page
    assert "script" not in {tag for tag, _ in Page(page).seen}


def test_charts_are_well_formed(report: rp.Report) -> None:
    page = report_page.as_html(report)
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    for drawing in drawings:
        ET.fromstring(drawing)
    assert "nan" not in "".join(drawings)


def test_worst_tokens_are_the_largest_in_their_context(report: rp.Report) -> None:
    assert report.comparison.tokens is not None
    worst = rp.worst_tokens(report, 5)
    kld = sorted(report.comparison.tokens.kld.tolist(), reverse=True)
    assert [w.kld for w in worst] == kld[:5]
    ids = report.windows.tokens
    for w in worst:
        row = ids[w.window]
        assert w.target == chr(0x4E00 + row[w.position + 1])
        assert w.context == "".join(chr(0x4E00 + i) for i in row[max(0, w.position - 23) : w.position + 1])
    assert all(0 <= w.p <= 1 and 0 <= w.p_base <= 1 for w in worst)


def test_json_holds_the_figures_and_no_infinities(report: rp.Report) -> None:
    value = json.loads(
        as_json(rp.as_dict(report)), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert report.comparison.figures is not None
    assert value["figures"]["kld"]["value"] == report.comparison.figures.kld.value
    assert value["passed"] == report.verdict.passed
    assert len(value["tensors"]) == len(report.comparison.tensors)
    norm = next(t for t in value["tensors"] if t["name"] == "model.norm.weight")
    assert norm["equal"] is True
    assert norm["snr"] is None
    assert value["sizes"][0] == {"type": "q8_0", "tensors": 2, "weights": 128, "nbytes": 136}
    assert len(value["worst_tokens"]) == rp.WORST


def test_a_broken_model_has_a_report_that_says_so() -> None:
    report = broken()
    text = " ".join(Page(report_page.as_html(report)).text)
    assert "FAIL" in text
    assert "the candidate gives non-finite values after block 1" in text
    assert "not finite" in text
    value = json.loads(as_json(rp.as_dict(report)))
    assert value["passed"] is False
    assert value["figures"] is None
    assert value["broken"] in value["reasons"]


def test_a_sample_of_blocks_has_a_report() -> None:
    _, source, config = make()
    text = windows.whole(tokens(config, 1, 16))
    run = compare_blocks(source, noisy(source, 0.005), config, text, (0, 1), device="cpu")
    found = compare.result(run)
    report = rp.Report("sample", found, checks.judge(found, LIMITS), LIMITS, text)
    said = " ".join(Page(report_page.as_html(report)).text)
    assert "only a sample of blocks ran" in said
    assert "Sampled blocks" in said


def test_equal_models_have_a_report() -> None:
    _, source, config = make()
    text = windows.whole(tokens(config, 1, 16))
    found = compare.result(compare.compare(source, source, config, text, device="cpu"))
    report = rp.Report("equal", found, checks.judge(found, LIMITS), LIMITS, text)
    said = " ".join(Page(report_page.as_html(report)).text)
    assert "All 15 values are exactly zero" in said
    assert "no error in any tensor" in said


def test_outputs_are_compared_on_one_page(report: rp.Report) -> None:
    figures = report.comparison.figures
    assert figures is not None
    exact = dataclasses.replace(figures, kld=Estimate(0.0, 0.0))
    outcomes = [rp.Outcome("a<b", 2_000_000, 4.5, figures, True), rp.Outcome("exact", 9, 32, exact, False)]
    html = report_page.comparison_page("two", outcomes)
    page = Page(html)
    assert [tag for tag, _ in page.seen].count("circle") == 2
    for cell in ("a<b", "2.0", "4.50", f"{figures.kld.value:.5f}", "pass", "FAIL", "exact (0)"):
        assert cell in page.text
    drawing = re.search(r"<svg.*?</svg>", html, re.S)
    assert drawing
    ET.fromstring(drawing[0])
    assert len(rp.outcome_row(outcomes[0])) == len(rp.OUTCOME_COLUMNS)


def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    rp.save_page(tmp_path / "r.html", "text \ud800")
    assert (tmp_path / "r.html").read_text() == "text ?"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(OutputError, match="mkdir -p"):
        rp.save_page(tmp_path / "none" / "r.html", "text")


def test_only_a_file_of_its_kind_is_overwritten(tmp_path: Path, report: rp.Report) -> None:
    page, proof, other = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "other"
    for _ in range(2):  # each over the first, too
        rp.save_page(page, report_page.as_html(report))
        rp.save_json(proof, as_json(rp.as_dict(report)))
    rp.save_page(page, report_page.comparison_page("several", []))
    rp.save_page(page, report_page.as_html(report))
    before = {path: path.read_bytes() for path in (page, proof)}
    for content in (b"<html>mine</html>", b'{"title": "mine"}', b"[]", b"GGUF"):
        other.write_bytes(content)
        with pytest.raises(OutputError, match="is not a report"):
            rp.save_page(other, "x")
        with pytest.raises(OutputError, match="is not JSON of dsconvert"):
            rp.save_json(other, "x")
        assert other.read_bytes() == content
    with pytest.raises(OutputError, match="is not a report"):
        rp.save_page(proof, "x")
    with pytest.raises(OutputError, match="is not JSON of dsconvert"):
        rp.save_json(page, "x")
    assert before == {path: path.read_bytes() for path in (page, proof)}
    other.write_bytes(b"")  # nothing is lost with it
    rp.save_json(other, as_json(rp.as_dict(report)))
    with pytest.raises(OutputError, match="two outputs"):
        rp.check_targets(page, page)


@pytest.mark.parametrize("top", [1e-12, 0.013, 0.1, 1.0, 3.7, 99.0, 12345.0])
def test_ticks_are_round_and_reach_the_top(top: float) -> None:
    ticks = nice_ticks(top)
    assert ticks[0] == 0
    assert top / 1.1 <= ticks[-1] * (1 + 1e-9)
    assert 3 <= len(ticks) <= 7
    step = ticks[1]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(math.isclose(mantissa, m, rel_tol=1e-6) for m in (1, 2, 2.5, 5))
