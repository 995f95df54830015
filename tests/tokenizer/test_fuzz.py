"""Hostile tokenizer files: every one loads, or is refused in one paragraph; nothing else ever comes out."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny_spm
from tiny_tokenizer import BOS, EOS, PAD, added, rows, tokenizer_json, write

from dsconvert.errors import TokenizerError
from tokenizer_tools.load import load_tokenizer
from tokenizer_tools.pretokenizer import gguf_keys, rebuild, resolve

SECONDS = 60  # a case that takes this long hangs
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 2**31, 2**40, 2**70, -(2**63), 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "\x00", "\ufffd", "\u0120", "[PAD3]", " ", "(", "(?<", "(a*)*b", "\\p{Nope}", "x" * 5000),
    *([], {}, [[]], [None], {"type": "Nope"}, {"type": None}, {"Regex": "("}, {"String": ""}, [["a"] * 3]),
)  # fmt: skip
RAW: tuple[bytes, ...] = (
    *(b"", b"null", b"[]", b"{}", b'"x"', b"{", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"NaN"),
    *(b"\x00" * 64, b"[" * 100_000, b'{"a":' * 100_000, b'{"model":{"vocab":{"\\ud800":0}}}'),
    *(b'{"version":"9.9"}', b"\x00"),
    b'{"model":{"type":"BPE","vocab":{},"merges":[]},"pre_tokenizer":{"type":"ByteLevel"}}',
)  # fmt: skip


def small() -> dict[str, Any]:
    raw = tokenizer_json(size=300)
    raw["added_tokens"].append(added(rows(raw), "<x>", special=False))
    return raw


def config() -> dict[str, Any]:
    i = rows(small()) - 1
    return {
        "bos_token": BOS,
        "eos_token": {"content": EOS, "lstrip": False},
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "tokenizer_class": "LlamaTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": "<x>", "special": False}},
        "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}],
    }


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists and objects the first few."""
    if at:
        yield at
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:12]:
            yield from paths(value[key], (*at, key))


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with one to three places replaced, removed, doubled or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        *parents, last = rng.choice(list(paths(value)))
        inside = value
        for key in parents:
            inside = inside[key]
        kind = rng.random()
        if kind < 0.6:
            inside[last] = rng.choice(JUNK)
        elif kind < 0.75:
            del inside[last]
        elif isinstance(inside, list):
            inside.append(inside[last])
        else:
            inside[rng.choice(("type", "x", str(last) + "x"))] = inside[last]
        if not value:
            break
    return value


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def attempt(folder: Path) -> str:
    """Loads, resolves, states and rebuilds; "" or the error's text. Other exceptions fail the test."""
    with no_hang():
        try:
            data = load_tokenizer(folder, 400)
            keys = {key: value for key, (_, value) in gguf_keys(data, resolve(data).name).items()}
            rebuild(keys)
        except TokenizerError as error:
            text = str(error)
            assert text
            assert "\n" not in text, "one paragraph"
            assert len(text) < 1500, text
            return text
    return ""


def files() -> dict[str, dict[str, Any]]:
    size = len(small()["model"]["vocab"])
    return {
        "tokenizer": small(),
        "tokenizer_config": config(),
        "special_tokens_map": {"bos_token": BOS, "unk_token": {"content": PAD}},
        "generation_config": {"eos_token_id": [size + 1], "pad_token_id": 2},
        "chat_template": {"chat_template": "{{ bos_token }}"},
    }


def test_the_unmutated_files_load(tmp_path: Path) -> None:
    everything = files()
    write(tmp_path, everything.pop("tokenizer"), everything.pop("tokenizer_config"), **everything)
    assert attempt(tmp_path) == ""


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("tokenizer", 200, "byte-level"),
        ("tokenizer_config", 80, "byte-level"),
        ("tokenizer", 150, "sentencepiece"),
    ],
)
def test_mutated_objects(name: str, count: int, kind: str, tmp_path: Path) -> None:
    rng = random.Random(count)
    everything = files()
    if kind == "sentencepiece":
        everything |= {"tokenizer": tiny_spm.tokenizer_json(size=80), "tokenizer_config": tiny_spm.CONFIG}
    messages = []
    for n in range(count):
        changed = {**everything, name: mutated(everything[name], rng)}
        folder = write(
            tmp_path / str(n), changed.pop("tokenizer"), changed.pop("tokenizer_config"), **changed
        )
        messages.append(attempt(folder))
    refused = [message for message in messages if message]
    assert len(refused) > count // 4, "the mutations must reach the checks"
    assert len(set(refused)) > 10


@pytest.mark.parametrize("name", files())
def test_files_that_are_no_objects(name: str, tmp_path: Path) -> None:
    everything = files()
    for n, content in enumerate(RAW):
        rest = dict(everything)
        folder = write(tmp_path / str(n), rest.pop("tokenizer"), rest.pop("tokenizer_config"), **rest)
        (folder / f"{name}.json").write_bytes(content)
        message = attempt(folder)
        if name == "tokenizer" or content.removeprefix(b"\xef\xbb\xbf")[:1] not in (b"{", b'"'):
            assert message, content[:20]


def test_damaged_bytes(tmp_path: Path) -> None:
    rng = random.Random(5)
    everything = files()
    whole = json.dumps(everything["tokenizer"], ensure_ascii=False).encode("utf-8")
    refused = 0
    for n in range(60):
        data = bytearray(whole)
        if n % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        folder = write(tmp_path / str(n), {}, everything["tokenizer_config"])
        (folder / "tokenizer.json").write_bytes(bytes(data))
        refused += bool(attempt(folder))
    assert refused > 30


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        folder = write(tmp_path / name, small())
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        attempt(folder)


def with_split(raw: dict[str, Any], pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, raw["pre_tokenizer"]]}
    return raw


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "\\", "(?<n>a)\\k<m>", "\\p{Nope}"])
def test_patterns_that_are_none(pattern: str, tmp_path: Path) -> None:
    assert "library says" in attempt(write(tmp_path, with_split(small(), pattern), config()))


@pytest.mark.parametrize("pattern", ["(a*)*b", "(?:(?:a|aa)+)+$", "(x+x+)+y", "(?:.*.*)*!", ""])
def test_patterns_that_backtrack_do_not_hang(pattern: str, tmp_path: Path) -> None:
    attempt(write(tmp_path, with_split(small(), pattern), config()))
