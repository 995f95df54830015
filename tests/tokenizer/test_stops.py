"""Where a generation ends: every file that says so, the keys that carry it, and llama.cpp on our file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from added_tokens import change, convert, entry, sample
from tiny_tokenizer import BOS, EOS, added, rows, tokenizer_json, write

from tokenizer_tools import chat_template, identity, stops
from tokenizer_tools import load as load_module
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import resolve
from tokenizer_tools.rebuild import gguf_keys
from tokenizer_tools.rendering import Unrendered

N = rows(tokenizer_json())
E_ID = N - 2
ENDS = ("<|end_a|>", "<|end_b|>", "<|end_c|>", "<|im_end|>")
TURNS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{{ '<|end_b|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
)


def folder_with(folder: Path, template: str = "", **eos: Any) -> Path:
    """A tokenizer with the tokens ENDS from N on, and eos_token_id in the files named."""
    raw = tokenizer_json()
    raw["added_tokens"] += [added(N + i, text, special=text != ENDS[2]) for i, text in enumerate(ENDS)]
    config = {"bos_token": BOS, "eos_token": EOS} | ({"chat_template": template} if template else {})
    return write(folder, raw, config, **{name: {"eos_token_id": value} for name, value in eos.items()})


CASES: list[tuple[str, dict[str, Any], str, tuple[int, ...], tuple[int | None, int | None]]] = [
    ("none", {}, "", (E_ID,), (None, None)),
    ("the same", {"generation_config": E_ID, "config": [E_ID]}, "", (E_ID,), (None, None)),
    ("one more", {"generation_config": [E_ID, N]}, "", (E_ID, N), (N, None)),
    ("another", {"generation_config": N + 1}, "", (E_ID, N + 1), (N + 1, None)),
    ("not special", {"generation_config": [N + 2]}, "", (E_ID, N + 2), (N + 2, None)),
    ("config.json's", {"config": [N, E_ID]}, "", (E_ID, N), (N, None)),
    ("two more", {"generation_config": [N, N + 1]}, "", (E_ID, N, N + 1), (N, N + 1)),
    ("a default of another vocabulary", {"config": 2, "generation_config": 5}, "", (E_ID,), (None, None)),
    ("no row", {"generation_config": [E_ID, 99_999]}, "", (E_ID,), (None, None)),
    ("known by name goes last", {"config": [N + 3, N, N + 1]}, "", (E_ID, N + 3, N, N + 1), (N, N + 1)),
    ("the template's", {}, TURNS, (E_ID, N + 1), (N + 1, None)),
    ("the template's first", {"config": [N, N + 1]}, TURNS, (E_ID, N + 1, N), (N + 1, N)),
    ("of no kind", {"generation_config": "2", "config": [None, True, N]}, "", (E_ID, N), (N, None)),
]


def found(folder: Path) -> tuple[TokenizerData, dict[str, Any]]:
    data = load_tokenizer(folder, 3000)
    return data, {key: value for key, (_, value) in gguf_keys(data, resolve(data).name).items()}


@pytest.mark.parametrize(
    ("files", "template", "ends", "keys"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_ends_of_a_generation(
    files: dict[str, Any],
    template: str,
    ends: tuple[int, ...],
    keys: tuple[int | None, int | None],
    tmp_path: Path,
) -> None:
    data, written = found(folder_with(tmp_path, template, **files))
    assert data.stops == ends
    assert tuple(written.get(key) for key in stops.STOP_KEYS) == keys
    assert written["tokenizer.ggml.eos_token_id"] == E_ID
    noted = [note for note in data.notes if "end a generation" in note]
    assert len(noted) == (len(ends) > 1), data.notes
    assert all(f"({i}" in noted[0] for i in ends[1:])
    assert identity.same_special(identity.of_data(data), identity.of_metadata(written)).same


def test_an_end_that_no_key_can_carry_is_named(tmp_path: Path) -> None:
    data, written = found(folder_with(tmp_path, generation_config=[E_ID, N, N + 1, N + 2, N + 3]))
    assert [written[key] for key in stops.STOP_KEYS] == [N, N + 1]
    lost = [note for note in data.notes if "no GGUF key is left" in note]
    assert len(lost) == 1
    assert f"'<|end_c|>' ({N + 2})" in lost[0]
    assert "<|im_end|>" not in lost[0], "llama.cpp knows it by name"
    assert identity.same_special(identity.of_data(data), identity.of_metadata(written)).same


def test_a_template_that_ends_answers_with_eos_adds_nothing(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    data, _ = found(folder_with(tmp_path, template))
    assert data.stops == (E_ID,)
    data, _ = found(folder_with(tmp_path / "open", "{% for m in messages %}{{ m['content'] }}{% endfor %}"))
    assert data.stops == (E_ID,)


def reply(folder: Path) -> None:
    """A chat model that ends its turns with a token of its own, and a generation_config that says so."""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["added_tokens_decoder"] |= {"2015": entry("<|reply|>"), "2016": entry("<|end_of_reply|>")}
    change(folder / "tokenizer_config.json", **config)
    change(folder / "generation_config.json", eos_token_id=[2001, 2016])


def turns_only(folder: Path) -> None:
    """The same without a word in generation_config: only the template tells."""
    reply(folder)
    change(folder / "generation_config.json", eos_token_id=2001)
    template = "{% for m in messages %}<|reply|>{{ m['content'] }}<|end_of_reply|>\n{% endfor %}"
    change(folder / "tokenizer_config.json", chat_template=template)


def another(folder: Path) -> None:
    reply(folder)
    change(folder / "generation_config.json", eos_token_id=2016)


@pytest.mark.parametrize("edit", [reply, turns_only, another])
def test_llama_cpp_ends_where_the_checkpoint_does(edit: Any, llama: Any, tmp_path: Path) -> None:
    result = convert(sample(tmp_path / "model", edit), tmp_path / "x.gguf")
    assert result.exit_code == 0, result.output
    assert "besides EOS (2001) these tokens end a generation: '<|end_of_reply|>' (2016" in result.output
    with llama(tmp_path / "x.gguf") as engine:
        assert engine.ends() == [2001, 2016]
        assert engine.special["eos"] == 2001


def test_a_lost_end_fails_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "stop_ids", lambda folder, eos, *_: ((eos,), []))
    result = convert(sample(tmp_path / "model", reply), tmp_path / "x.gguf")
    assert result.exit_code == 3, result.output
    assert "a generation does not end at [2016]" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "template", ["{{ nothing.at.all }}", "{% for i in x %}<|end_b|>{% endfor %}", "{% bad"]
)
def test_a_template_that_does_not_render_is_tried_once(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def render(text: str, *rest: object, **values: object) -> str:
        tried.append(text)
        raise Unrendered("TimeoutError", "too long", broke=True)

    monkeypatch.setattr(chat_template, "render", render)
    chat_template._try.cache_clear()
    assert load_tokenizer(folder_with(tmp_path, template), 3000).stops == (E_ID,)
    assert tried == [template]
    chat_template._try.cache_clear()
