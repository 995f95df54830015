"""Drawing calibration windows, the report on them, and evaluation windows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsconvert.calibration.record import (
    Calibration,
    evaluation_windows,
    fingerprint,
    held_against,
    overlap,
    sample,
    warnings,
)
from dsconvert.calibration.sampling import PAGE, SampleRequest, draw
from dsconvert.errors import UsageError
from dsconvert.texts.files import pack
from dsconvert.texts.sets import Method, TextSet, builtin, chats

ROOT = Path(__file__).parents[2]


def words(texts: Sequence[str]) -> list[list[int]]:
    """A tokenizer of numbers."""
    return [[int(word) for word in text.split()] for text in texts]


def characters(texts: Sequence[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def text_set(documents: Sequence[str], method: Method = "packed") -> TextSet:
    return TextSet("a text", "calibration", pack(documents), method, {"source": "test"})


def numbers(count: int = 400, longest: int = 60) -> list[str]:
    rng = random.Random(7)
    return [
        " ".join(str(rng.randint(1000, 9999)) for _ in range(rng.randint(1, longest))) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def sample_tokens() -> Callable[[Sequence[str]], list[list[int]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "dsconvert" / "sample" / "tokenizer.json"))
    return lambda texts: [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


# Made by optimum 2.3.0's optimum.gptq.data.get_dataset, seed 3, windows of 40 tokens, on the same texts.


def test_documents_are_drawn_as_optimum_draws_c4() -> None:
    got = sample(text_set(numbers(), "documents"), words, SampleRequest(12, 40, seed=3))
    assert got.report.fingerprint == "941e338580260a1b6564783d89cdbef66c52e6e00a09c86a31243e88c954469a"
    assert got.report.documents_used == 11  # one was drawn twice


def test_a_stream_is_drawn_as_optimum_draws_wikitext2() -> None:
    got = sample(text_set(["".join(numbers()[:200])], "stream"), characters, SampleRequest(5, 40, seed=3))
    assert got.report.fingerprint == "8e45563cc1944295da641dde5cddbf411f34e6b3c6cf789ed3483e51fdc8c193"


def test_a_stream_joins_with_blank_lines() -> None:
    text = text_set(["abcdefgh" * 10, "", "ijklmnop" * 10], "stream")
    whole = "abcdefgh" * 10 + "\n\n\n\n" + "ijklmnop" * 10
    got = sample(text, characters, SampleRequest(2, 60))
    assert all(bytes(window.tolist()).decode() in whole for window in got.tokens)


def test_every_window_lies_in_one_document() -> None:
    documents = numbers()
    got = sample(text_set(documents, "documents"), words, SampleRequest(30, 40))
    for window in got.tokens:
        assert any(" ".join(map(str, window)) in document for document in documents)


def test_seeds_decide(sample_tokens: Callable[[Sequence[str]], list[list[int]]]) -> None:
    text = builtin("calibration")
    first, again, other = (
        sample(text, sample_tokens, SampleRequest(4, 512, seed)).tokens for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_documents_of_just_the_length_are_passed_over() -> None:
    exact, longer = (" ".join(str(1000 + i) for i in range(n)) for n in (40, 41))
    got = sample(text_set([exact] * 50 + [longer], "documents"), words, SampleRequest(3, 40))
    assert got.report.documents_used == 1
    assert got.tokens[:, 0].tolist() == [1000] * 3  # the reference never takes the last place
    assert got.report.tokens_left_out == 1


@pytest.mark.parametrize("size", [5, 40])
def test_no_long_document_is_an_error_and_no_endless_loop(size: int) -> None:
    document = " ".join(["1234"] * size)
    with pytest.raises(UsageError, match=r"no document of a text is longer than 40 tokens.*--calib-len"):
        sample(text_set([document] * 20, "documents"), words, SampleRequest(2, 40))


def test_a_rare_long_document_is_found() -> None:
    documents = [*numbers(2000, 40), " ".join(str(i) for i in range(1000, 1100))]
    got = sample(text_set(documents, "documents"), words, SampleRequest(4, 60))
    assert got.report.documents_used == 1
    assert [w.text for w in warnings(got.report) if "1 documents longer than 60 tokens" in w.text]


def test_packed_windows_share_nothing_and_lose_nothing() -> None:
    documents = [f"{i} {i} {i} {i} {i}" for i in range(1000, 1080)]
    got = sample(text_set(documents), words, SampleRequest(8, 50))
    assert np.unique(got.tokens, return_counts=True)[1].tolist() == [5] * 80
    assert got.report.tokens_left_out == got.report.documents_cut == 0
    got = sample(text_set(documents), words, SampleRequest(1, 52))
    assert (got.report.documents_used, got.report.documents_cut, got.report.tokens_left_out) == (11, 1, 3)


def test_packed_pages_meet_all_of_a_long_document() -> None:
    lines = [f"{i:06d}\n" for i in range(100_000, 100_000 + PAGE)]
    got = draw(text_set(["".join(lines)]), words, SampleRequest(16, 256))
    assert np.ptp(got.windows) > PAGE * 0.5
    assert got.cut == 1
    everything = draw(text_set(["".join(lines)]), words, SampleRequest(16, PAGE // 16))
    assert sorted(everything.windows.ravel().tolist()) == list(range(100_000, 100_000 + PAGE))
    assert everything.cut == 0


def test_kinds_take_equal_shares() -> None:
    documents = ["a" * 1000] * 50 + ["b" * 500] * 50
    text = replace(text_set(documents), kinds=("prose",) * 50 + ("code",) * 50, separator="\n")
    got = draw(text, characters, SampleRequest(10, 1000))
    assert abs(np.count_nonzero(got.windows == ord("a")) - np.count_nonzero(got.windows == ord("b"))) < 1600


@pytest.mark.parametrize("method", ["packed", "documents", "stream"])
def test_bos_begins_documents_once(method: Method) -> None:
    text = text_set(["1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"], method)
    got = draw(text, words, SampleRequest(1, 19, bos=7777))
    assert np.count_nonzero(got.windows == 7777) == (got.windows[0, 0] == 7777)
    again = draw(text_set(["7777 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"], method), words,
                 SampleRequest(1, 19, bos=7777))  # fmt: skip
    assert np.array_equal(got.windows, again.windows)


@pytest.mark.parametrize("method", ["packed", "stream"])
def test_fewer_tokens_than_asked(method: Method) -> None:
    documents = ["\n".join(str(i) for i in range(1000, 1100))]
    with pytest.raises(UsageError, match=r"has 100 tokens, 3 windows of 40 need 120.*--calib-samples 2"):
        sample(text_set(documents, method), words, SampleRequest(3, 40))
    with pytest.raises(UsageError, match=r"--calib-samples 1 --calib-len 100"):
        sample(text_set(documents, method), words, SampleRequest(3, 2048))
    assert sample(text_set(documents, method), words, SampleRequest(1, 100)).tokens.shape == (1, 100)


def test_a_text_of_one_byte() -> None:
    with pytest.raises(UsageError, match="has 1 token, 128 windows of 2048 need 262144"):
        sample(replace(text_set(["x"]), separator=""), characters)


def test_a_text_that_repeats_one_byte() -> None:
    with pytest.raises(UsageError, match="gives 400 tokens of 1 kinds: nothing can be learnt"):
        sample(text_set(["x" * 500]), characters, SampleRequest(4, 100))


@pytest.mark.parametrize("ask", [(0, 2048), (128, 1)])
def test_senseless_numbers(ask: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="make no sense"):
        SampleRequest(*ask)


def test_the_report_counts_duplicates() -> None:
    once = "\n".join(str(i) for i in range(1000, 1050)) + "\n"
    got = sample(text_set([once] * 6), words, SampleRequest(6, 50)).report
    assert (got.duplicate_windows, got.duplicate_documents, got.unique_tokens) == (5, 5, 50)
    assert [w.text for w in warnings(got) if w.text.startswith("5 of 6 calibration windows repeat")]


def calibrated(tokens: np.ndarray) -> Calibration:
    documents = [" ".join(map(str, row)) for row in tokens]
    return sample(text_set(documents), words, SampleRequest(*tokens.shape))


def test_overlap_counts_shared_runs_exactly() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    tokens, other = rng.integers(0, 50_000, (2, 6, 300))
    assert overlap(tokens, other, "other").tokens == 0
    other[3, 10:70] = tokens[2, 100:160]
    other[4, 10:59] = tokens[5, 100:149]  # 49 in a row are not enough
    found = overlap(tokens, other, "other")
    assert (found.tokens, found.windows, found.share) == (60, 1, 60 / 1800)
    assert overlap(tokens, tokens, "itself").share == 1.0
    assert overlap(tokens[:, :20], tokens[:, :20], "itself").span == 20


def test_the_overlap_goes_into_the_report_and_warns() -> None:
    rng = np.random.Generator(np.random.PCG64(2))
    tokens = rng.integers(0, 50_000, (4, 200))
    plain = calibrated(tokens)
    assert not warnings(plain.report)
    same = held_against(plain, tokens, "wikitext2").report
    assert same.overlap
    assert same.overlap.share > 0.5
    assert [w.text for w in warnings(same) if "(wikitext2) too: its figures will flatter" in w.text]


def test_the_report_is_json() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    got = held_against(calibrated(rng.integers(0, 99, (2, 100))), rng.integers(0, 99, (1, 100)), "other")
    read = json.loads(json.dumps(got.report.as_dict()))
    assert read["fingerprint"] == fingerprint(got.tokens)
    assert (read["tokens"], read["overlap"]["text"], read["provenance"]) == (200, "other", {"source": "test"})


def test_the_fingerprint_is_of_ids_and_shape() -> None:
    tokens = np.arange(12).reshape(3, 4)
    assert fingerprint(tokens) == fingerprint(tokens.astype(np.int32))
    assert len({fingerprint(tokens), fingerprint(tokens.reshape(4, 3)), fingerprint(tokens + 1)}) == 3


def test_the_builtin_set_is_enough_for_the_usual_calibration(
    sample_tokens: Callable[[Sequence[str]], list[list[int]]],
) -> None:
    got = sample(builtin("calibration"), sample_tokens)
    assert got.tokens.shape == (128, 2048)
    assert got.report.duplicate_windows == 0
    assert got.report.documents_used > 50
    evaluation = evaluation_windows(builtin("evaluation"), sample_tokens, stride=2048)
    found = held_against(got, evaluation.tokens, "builtin").report
    assert found.overlap
    assert found.overlap.share < 0.01  # modules of the library share a function and a licence
    assert not warnings(found)


def test_evaluation_walks_in_consecutive_or_strided_windows() -> None:
    documents = ["".join(f"{i} " for i in range(1000, 1100)), "".join(f"{i} " for i in range(1100, 1200))]
    text = text_set(documents, "stream")
    walked = evaluation_windows(text, words, length=50, stride=50)
    assert np.array_equal(walked.tokens.ravel(), np.arange(1000, 1200))
    assert walked.scored == 4 * 49
    strided = evaluation_windows(text, words, length=50, stride=25, count=3)
    assert strided.tokens[:, 0].tolist() == [1000, 1025, 1050]
    assert strided.scored == 49 + 25 + 25
    assert evaluation_windows(text, words, length=50, count=1, bos=5).tokens[:, 0].tolist() == [5]


def test_evaluation_on_c4_takes_256_random_windows() -> None:
    text = replace(text_set(numbers(), "documents"), split="evaluation")
    windows = evaluation_windows(text, words, length=40)
    assert windows.tokens.shape == (256, 40)
    assert windows.scored == 256 * 39
    assert np.array_equal(windows.tokens[:5], draw(text, words, SampleRequest(5, 40)).windows)
    with pytest.raises(UsageError, match="Ask for shorter windows, or"):
        evaluation_windows(text, words, length=4000)


def test_chats_are_rendered_whole(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{i} {i + 1}"}]} for i in range(1000, 1030)]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    text = chats(file, lambda messages: f"1 {messages[0]['content']} 2 ")
    got = sample(text, words, SampleRequest(6, 20))
    for row in got.tokens.reshape(-1, 4):
        assert (row[0], row[2], row[3]) == (1, row[1] + 1, 2)

    def refuse(messages: object) -> str:
        raise UsageError("no system role")

    with pytest.raises(UsageError, match=r"talk\.jsonl: the chat template refuses conversation 1.*no system"):
        chats(file, refuse)
