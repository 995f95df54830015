"""The built-in text: stable names, two parts that share nothing, pages that do not overlap."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from dsconvert.errors import ConversionError, UsageError
from dsconvert.texts import builtin
from dsconvert.texts.builtin import Document, Part, builtin_documents, evaluation_page, evaluation_pages

PARTS: tuple[Part, Part] = ("calibration", "evaluation")


def shingles(document: str, words: int = 8) -> set[tuple[str, ...]]:
    split = document.split()
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def size(documents: list[Document], kind: str) -> int:
    return sum(len(d.text) for d in documents if d.name.startswith(kind + "/"))


def test_each_document_is_in_one_part_by_its_name():
    calibration, evaluation = (builtin_documents(part) for part in PARTS)
    names = [d.name for d in calibration + evaluation]
    assert len(names) == len(set(names)) > 200
    assert not {d.text for d in calibration} & {d.text for d in evaluation}
    # Fixed for ever: were the split to move, the sample would be measured on what it was trained on.
    assert {d.name for d in evaluation if d.name.startswith("chinese/")} == {"chinese/small-models"}
    assert builtin.part_of("topics/import") == builtin.part_of("stdlib/subprocess.py") == "evaluation"
    assert builtin.part_of("topics/compound") == builtin.part_of("stdlib/asyncio/events.py") == "calibration"


@pytest.mark.parametrize("kind", ["topics", "stdlib", "chinese"])
def test_evaluation_gets_about_a_fifth_of_each_kind(kind):
    calibration, evaluation = (size(builtin_documents(part), kind) for part in PARTS)
    assert 0.15 < evaluation / (calibration + evaluation) < 0.4


def test_the_parts_share_almost_no_sentence():
    seen = set().union(*(shingles(d.text) for d in builtin_documents("calibration")))
    evaluation = builtin_documents("evaluation")
    for kind, limit in (("topics/", 0.005), ("stdlib/", 0.03)):
        own = set().union(*(shingles(d.text) for d in evaluation if d.name.startswith(kind)))
        assert len(own) > 5000
        assert len(own & seen) / len(own) < limit


def test_nested_topics_would_have_been_shared():
    # The control of the test above: the topics that are left out are in the bigger ones nearly word for word.
    from pydoc_data.topics import topics

    kept = set().union(*(shingles(d.text) for part in PARTS for d in builtin_documents(part)))
    nested = set().union(*(shingles(topics[n]) for n in builtin.NESTED_TOPICS.split() if n in topics))
    assert len(nested & kept) / len(nested) > 0.9


def test_pages_are_apart_and_of_the_asked_length():
    pages = evaluation_pages(8, 2000)
    assert [len(page) for page in pages] == [2000] * 8
    whole = "\n".join(d.text for d in builtin_documents("evaluation") if d.name.startswith("topics/"))
    starts = [whole.index(page) for page in pages]
    assert all(b - a >= 2000 for a, b in itertools.pairwise(starts))


def test_a_page_holds_prose_code_and_chinese():
    page = evaluation_page(8000)
    assert len(page) == 8000
    assert "def " in page
    assert any("\u4e00" <= char <= "\u9fa5" for char in page)
    assert evaluation_page(10) == evaluation_pages(1, 8)[0] + evaluation_pages(1, 2, "stdlib")[0]


@pytest.mark.parametrize(("count", "chars"), [(0, 10), (1, 0), (10, 1_000_000)])
def test_too_much_text_is_refused(count, chars):
    with pytest.raises(UsageError, match="do not fit"):
        evaluation_pages(count, chars)


def test_a_python_without_text_is_an_error(monkeypatch):
    monkeypatch.setattr(builtin, "_topics", lambda: iter(()))
    monkeypatch.setattr(builtin, "_stdlib", lambda: iter(()))
    with pytest.raises(ConversionError, match="neither pydoc_data nor the sources"):
        builtin._all_documents.__wrapped__()


def test_importing_is_lazy_and_light():
    code = (
        "import sys, dsconvert.texts.builtin; print('torch' in sys.modules, "
        "'pydoc_data.topics' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
