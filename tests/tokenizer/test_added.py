"""Added tokens from every file that names some: the ids are those of transformers, and of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from added_tokens import Edit, change, convert, entry, sample
from tiny_tokenizer import BOS, EOS, PAD, added, rows, tokenizer_json, write

from dsconvert.errors import TokenizerError
from tokenizer_tools import identity
from tokenizer_tools import load as load_module
from tokenizer_tools.load import load_tokenizer
from tokenizer_tools.pretokenizer import resolve
from tokenizer_tools.rebuild import gguf_keys, rebuild
from tokenizer_tools.vocabulary import CONTROL, NORMAL, USER_DEFINED

N = rows(tokenizer_json())
WORD = next(token for token, i in tokenizer_json()["model"]["vocab"].items() if i == 700)
NAMES = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
ROOM = 3000


def typed(content: str, **flags: bool) -> dict[str, Any]:
    """A token as an object where transformers writes one beside its decoder."""
    return {**entry(content, **flags), "__type": "AddedToken"}


def decoder(**entries: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json whose added_tokens_decoder has `i123=entry`."""
    return {**NAMES, "added_tokens_decoder": {key[1:]: value for key, value in entries.items()}}


A, B = "<|a|>", "<|b|>"
AT, NEXT = f"i{N}", f"i{N + 1}"
# tokenizer_config.json, and the other files, by the case.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "added_tokens.json": (NAMES, {"added_tokens": {A: N, B: N + 1}}),
    "added_tokens.json unsorted": (NAMES, {"added_tokens": {B: N + 1, A: N}}),
    "added_tokens.json names what is there": (NAMES, {"added_tokens": {PAD: N - 1, A: N}}),
    "added_tokens.json, special by the map": (
        NAMES,
        {"added_tokens": {A: N, B: N + 1}, "special_tokens_map": {"additional_special_tokens": [A]}},
    ),
    "added_tokens.json makes a word one": (NAMES, {"added_tokens": {WORD: 700}}),
    "added_tokens.json and the id of another": (NAMES, {"added_tokens": {A: N - 1, B: N}}),
    "added_tokens.json and another id": (NAMES, {"added_tokens": {PAD: N + 7}}),
    "decoder": (decoder(**{AT: entry(A)}), {}),
    "decoder unsorted": (decoder(**{NEXT: entry(B), AT: entry(A, special=False, normalized=True)}), {}),
    "decoder goes before added_tokens.json": (decoder(**{AT: entry(A)}), {"added_tokens": {B: N}}),
    "decoder empty": ({**NAMES, "added_tokens_decoder": {}}, {"added_tokens": {A: N}}),
    "decoder makes a word one": (decoder(i700=entry(WORD, special=False)), {}),
    "decoder with other flags": (decoder(**{f"i{N - 1}": entry(PAD, lstrip=True, rstrip=True)}), {}),
    "decoder twice": (decoder(**{AT: entry(A), NEXT: entry(A)}), {}),
    "named alone": ({**NAMES, "additional_special_tokens": [A, typed(B, lstrip=True)]}, {}),
    "named alone, as an object": ({**NAMES, "extra_special_tokens": {"image_token": A}}, {}),
    "a padding token named alone": ({**NAMES, "pad_token": A}, {}),
    "a mask token named alone": ({**decoder(**{AT: entry(A)}), "mask_token": typed(B, lstrip=True)}, {}),
}
TEXTS = (A, B, f"{A}user", f"x{A}y {B} z", f"  {PAD}  x", f"{WORD}{WORD}x{WORD}", f"{BOS}{A}\n{EOS}", "hello")


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    config, files = CASES[case]
    folder = write(tmp_path, tokenizer_json(), config, **files)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    data = load_tokenizer(folder, ROOM)
    assert data.encode(TEXTS) == wanted
    assert {token.id: token.content for token in data.added} == {
        i: token.content for i, token in theirs.added_tokens_decoder.items()
    }
    keys = {key: value for key, (_, value) in gguf_keys(data, resolve(data).name).items()}
    made = rebuild(keys)
    assert [made.encode(text, add_special_tokens=False).ids for text in TEXTS] == wanted
    own = identity.of_data(data)
    assert identity.same_added(own, identity.of_metadata(keys)).same
    del keys["dsconvert.pre_tokenizer.type"]  # so that the whole tokenizer.json in the file is what counts
    whole = rebuild(keys)
    assert [whole.encode(text, add_special_tokens=False).ids for text in TEXTS] == wanted


def test_types_tell_special_tokens_from_others(tmp_path: Path) -> None:
    config, files = CASES["added_tokens.json, special by the map"]
    data = load_tokenizer(write(tmp_path, tokenizer_json(), config, **files), ROOM)
    assert (data.types[N], data.types[N + 1], data.types[700]) == (CONTROL, USER_DEFINED, NORMAL)
    assert f"beside tokenizer.json have: '{A}' ({N}), '{B}' ({N + 1})" in " ".join(data.notes)
    data = load_tokenizer(write(tmp_path / "word", tokenizer_json(), NAMES, added_tokens={WORD: 700}), ROOM)
    assert data.types[700] == USER_DEFINED


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the id of a word": (NAMES, {"added_tokens": {A: 0}}, "the token 0 is '<|a|>'; in tokenizer.json it is"),
    "a gap": (NAMES, {"added_tokens": {A: N + 5}}, f"token {N + 5} is '<|a|>'; the tokenizers library gives"),
    "no id": (NAMES, {"added_tokens": {A: "7"}}, "not token to id"),
    "another added token's id": (decoder(**{f"i{N - 1}": entry(A)}), {}, "it is '<pad>'"),
    "another id": (decoder(**{AT: entry(PAD)}), {}, f"there '<pad>' is {N - 1}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_reading_can_be_is_refused(case: str, tmp_path: Path) -> None:
    config, files, message = REFUSED[case]
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(write(tmp_path, tokenizer_json(), config, **files), ROOM)
    assert message in str(caught.value)


def test_what_tokenizer_json_gives_otherwise_is_told(tmp_path: Path) -> None:
    config, files = CASES["added_tokens.json and the id of another"]
    data = load_tokenizer(write(tmp_path, tokenizer_json(), config, **files), ROOM)
    assert any(f"{A!r}, tokenizer.json to '<pad>': the latter wins" in note for note in data.notes), (
        data.notes
    )
    config, files = CASES["added_tokens.json and another id"]
    data = load_tokenizer(write(tmp_path, tokenizer_json(), config, **files), ROOM)
    assert f"'<pad>' the id {N + 7}; it keeps {N - 1}" in " ".join(data.notes)


@pytest.mark.parametrize("where", ["tokenizer.json", "decoder", "added_tokens.json", "named"])
def test_tokens_without_a_row_are_left_out_by_name(where: str, tmp_path: Path) -> None:
    raw, config, files = tokenizer_json(), dict(NAMES), dict[str, Any]()
    if where == "tokenizer.json":
        raw["added_tokens"] += [added(N, A), added(N + 1, B)]
    elif where == "decoder":
        config = decoder(**{AT: entry(A), NEXT: entry(B)})
    elif where == "added_tokens.json":
        files["added_tokens"] = {A: N, B: N + 1}
    else:
        raw["added_tokens"].append(added(N, A))
        config["mask_token"] = B
    data = load_tokenizer(write(tmp_path, raw, config, **files), N + 1)
    assert data.tokens[N] == A
    assert B not in data.tokens
    assert B not in data.json
    assert max(max(ids) for ids in data.encode(TEXTS)) == N
    assert any(repr(B) in note and "left out" in note for note in data.notes), data.notes
    keys = {key: value for key, (_, value) in gguf_keys(data, resolve(data).name).items()}
    assert [rebuild(keys).encode(text, add_special_tokens=False).ids for text in TEXTS] == data.encode(TEXTS)


def test_a_row_for_every_token_of_the_model_is_still_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"resize_token_embeddings"):
        load_tokenizer(write(tmp_path, tokenizer_json(), {}), 900)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_that_llama_cpp_does_not_heed_are_named(flag: str, tmp_path: Path) -> None:
    raw = tokenizer_json()
    raw["added_tokens"] += [added(N, A, **{flag: True}), added(N + 1, B, normalized=True)]
    notes = [note for note in load_tokenizer(write(tmp_path, raw, NAMES), ROOM).notes if "heed" in note]
    assert len(notes) == 1
    assert f"llama.cpp does not heed {flag} of '{A}' ({N}): " in notes[0]


# ---- on the sample, in llama.cpp and through the command

START, END = "<|im_start|>", "<|im_end|>"


def in_added_tokens(folder: Path) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder=None)
    change(folder / "added_tokens.json", **{START: 2015, END: 2016})


def in_decoder(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["added_tokens_decoder"] |= {"2015": entry(START), "2016": entry(END)}
    change(folder / "tokenizer_config.json", **config)


@pytest.mark.parametrize("edit", [in_added_tokens, in_decoder])
def test_llama_cpp_gives_the_ids_of_transformers(edit: Edit, llama: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = sample(tmp_path / "model", edit)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    result = convert(folder, tmp_path / "x.gguf")
    assert result.exit_code == 0, result.output
    with llama(tmp_path / "x.gguf") as engine:
        for text in (f"{START}user", f"{START}user\nHello{END}\n", f"a{END}{START}b", "no such token"):
            ids = theirs.encode(text, add_special_tokens=False)
            assert engine.tokenize(text, parse_special=True) == ids
        assert engine.tokenize(f"{START}user", parse_special=True)[0] == 2015


@pytest.mark.parametrize("edit", [in_added_tokens, in_decoder])
def test_a_dropped_token_fails_the_proof(edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sample(tmp_path / "model", edit)
    monkeypatch.setattr(load_module, "beside", lambda *_: [])
    result = convert(folder, tmp_path / "x.gguf", "--json")
    assert result.exit_code == 3, result.output
    checks = [json.loads(line) for line in result.stdout.splitlines()]
    failed = [check for check in checks if check.get("passed") is False or check.get("ok") is False]
    assert [check["name"] for check in failed if "name" in check] == ["added tokens"], result.output
    assert START in result.output


def test_lstrip_is_told_and_true(llama: Any, tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        raw["added_tokens"].append(added(2015, "<mask>", lstrip=True, rstrip=True))
        change(folder / "tokenizer.json", **raw)

    folder, out = sample(tmp_path / "model", edit), tmp_path / "x.gguf"
    result = convert(folder, out)
    assert result.exit_code == 0, result.output
    assert "does not heed lstrip of '<mask>' (2015)" in result.output
    text = "see <mask> here"
    with llama(out) as engine:
        assert engine.tokenize(text, parse_special=True) != load_tokenizer(folder, 2048).encode([text])[0]
