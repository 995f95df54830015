"""A long text encoded in pieces has the ids of the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_spm import CONFIG, tokenizer_json
from tiny_tokenizer import write

from dsconvert.texts import encode_long as long_texts
from dsconvert.texts.builtin import builtin_documents
from dsconvert.texts.encode_long import encode_long
from tokenizer_tools.load import load_tokenizer

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "tokenizers"
FOLDERS = [ROOT / "dsconvert" / "sample", SHARED / "deepseek-llm", SHARED / "deepseek-coder"]


def spaces(rng: random.Random, count: int) -> str:
    """Words, numbers, signs, Chinese and runs of every kind of white space."""
    words = ["a", "Word", "12", "345678", "'s", "...", "=", "你好", "。", "！", "é"]
    white = [" ", " ", "  ", "\n", "\n\n", " \n\n\n", "\t", "\r\n", "\u3000", "\u00a0"]
    parts = words + white
    return "".join(rng.choice(parts) for _ in range(count))


def texts() -> dict[str, str]:
    documents = [document.text for document in builtin_documents("evaluation")]
    pages = [d.text for d in builtin_documents("calibration") if d.name.startswith("chinese/")]
    return {
        "library": "\n\n".join(documents)[:400_000],
        "rows": "\n\n".join(line + " \n" for line in "\n".join(documents).splitlines()[:6000]),
        "mixed": spaces(random.Random(1), 60_000),
        "chinese": "".join("".join(pages).split()) * 60,
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("piece", [500, 1 << 14])
def test_pieces_give_the_ids_of_the_whole(folder: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/tokenizers/{folder.name}/tokenizer.json")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    sizes: list[int] = []

    def encode(batch: Sequence[str]) -> list[list[int]]:
        sizes.extend(map(len, batch))
        return [e.ids for e in tokenizer.encode_batch_fast(list(batch), add_special_tokens=False)]

    monkeypatch.setattr(long_texts, "PIECE", piece)
    for name, text in texts().items():
        whole = encode([text])[0]
        sizes.clear()
        assert encode_long(encode, text).tolist() == whole, name
        assert max(sizes) < 8 * piece, name  # it was cut at all


def test_a_tokenizer_that_joins_words_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 100)
    asked: list[int] = []

    def pairs(batch: Sequence[str]) -> list[list[int]]:
        """One id for every two characters from the start, so that no cut at an odd place holds."""
        asked.extend(map(len, batch))
        return [[sum(map(ord, t[i : i + 2])) for i in range(0, len(t), 2)] + [len(t) % 2] for t in batch]

    text = "ab c " * 200
    assert np.array_equal(encode_long(pairs, text), pairs([text])[0])
    assert max(asked) == len(text)


def test_a_tokenizer_that_puts_a_space_before_a_text_is_cut_at_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_tokenizer(write(tmp_path, tokenizer_json(), CONFIG), 2000)
    sizes: list[int] = []

    def encode(batch: Sequence[str]) -> list[list[int]]:
        sizes.extend(map(len, batch))
        return data.encode(batch)

    monkeypatch.setattr(long_texts, "PIECE", 500)
    for name, text in texts().items():
        (whole,) = data.encode([text])
        sizes.clear()
        assert encode_long(encode, text).tolist() == whole, name
        assert name == "chinese" or max(sizes) < 8 * 500, name  # it was cut at all


def test_nothing_and_little() -> None:
    def encode(batch: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in batch]

    assert encode_long(encode, "").tolist() == []
    assert encode_long(encode, "ab").tolist() == [97, 98]
