"""The model card in the file: its values as they are written, whatever YAML makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from added_tokens import convert

from converters.gguf.parse import open_gguf
from dsconvert.checkpoints.locate import locate


def card(folder: Path, text: bytes) -> Path:
    """The embedded sample with this README.md."""
    shutil.copytree(locate("sample:"), folder)
    (folder / "README.md").write_bytes(text)
    return folder


CARDS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "the language no": (
        b"---\nlicense: mit\nlanguage:\n- en\n- no\ntags:\n- 2024\n- chat\n---\n# x\n",
        {"license": "mit", "languages": ["en", "no"], "tags": ["2024", "chat"]},
    ),
    "with a mark": (
        b"\xef\xbb\xbf---\nlicense: mit\nlanguage: no\n---\n",
        {"license": "mit", "languages": ["no"]},
    ),
    "line ends of Windows": (
        b"---\r\nlicense: mit\r\nlanguage:\r\n- 'no'\r\n- on\r\n---\r\n",
        {"license": "mit", "languages": ["no", "on"]},
    ),
    "numbers, dates and nulls": (
        b"---\nlicense: ~\nlanguage: [null, y]\ntags: [1.5, 2024-01-02, '', true, {a: b}, [c]]\n---\n",
        {"languages": ["y"], "tags": ["1.5", "2024-01-02", "true"]},
    ),
    "bases": (
        b"---\nbase_model:\n- org/one\n- null\n- two\n---\n",
        {"base_model.count": 2, "base_model.0.name": "one", "base_model.0.organization": "org",
         "base_model.0.repo_url": "https://huggingface.co/org/one", "base_model.1.name": "two",
         "base_model.1.repo_url": "https://huggingface.co/two"},
    ),
    "no card": (b"# only text\n", {}),
    "a list": (b"---\n- a\n---\n", {}),
    "cut": (b"---\nlicense: [mit\n", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CARDS)
def test_the_cards_values_are_as_written(case: str, tmp_path: Path) -> None:
    text, expected = CARDS[case]
    result = convert(card(tmp_path / "model", text), tmp_path / "x.gguf", "--effort", "off")
    assert result.exit_code == 0, result.output
    keys = open_gguf(tmp_path / "x.gguf").keys
    carded = ("license", "languages", "tags", "base_model")
    found = {key.removeprefix("general."): value for key, value in keys.items()}
    assert {key: value for key, value in found.items() if key.startswith(carded)} == expected
