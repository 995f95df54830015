"""tokenizer.json and its companions into a GGUF's terms: types, special tokens, and every contradiction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizer
from tiny_tokenizer import BOS, PAD, added, rows, tokenizer_json, write

from dsconvert.errors import TokenizerError
from tokenizer_tools import chat_template
from tokenizer_tools.load import load_tokenizer
from tokenizer_tools.special import byte_alphabet
from tokenizer_tools.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED

Mutation = Callable[[dict[str, Any]], object]


def template(*ids: str) -> dict[str, Any]:
    """A post-processor that puts these special tokens before a text."""
    pieces: list[dict[str, Any]] = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ids]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    raw = tokenizer_json()
    numbers = {entry["content"]: entry["id"] for entry in raw["added_tokens"]}
    known = {name: {"id": name, "ids": [numbers[name]], "tokens": [name]} for name in ids}
    return {
        "type": "TemplateProcessing",
        "single": [*pieces, text],
        "pair": [*pieces, text, text],
        "special_tokens": known,
    }


def test_tokens_types_and_special_ids(tmp_path: Path) -> None:
    raw = tokenizer_json()
    raw["added_tokens"].append(added(rows(raw), "\xfc", special=False))
    tiny_tokenizer.add_unreachable(raw, "[PAD3000]")
    count = rows(raw) - 1  # the byte-like token shares its text with a token of the model
    raw["added_tokens"][-1]["id"] = raw["model"]["vocab"]["\xfc"]
    data = load_tokenizer(write(tmp_path, raw), 3100)
    size = len(raw["model"]["vocab"])
    assert len(data.tokens) == len(data.types) == 3100
    assert data.used == count
    assert data.special == {"bos": size, "eos": size + 1, "pad": size + 2}
    assert (data.add_bos, data.add_eos, data.first_id) == (True, False, size)
    assert data.types[raw["model"]["vocab"]["\xfc"]] == USER_DEFINED
    assert data.types[0] == NORMAL
    assert set(data.types[size : size + 3]) == {CONTROL}
    assert set(data.types[count:]) == {UNUSED}
    assert data.tokens[count] == f"[PAD{count}]"
    assert data.tokens[3000] == "[PAD3000]_", "a padding row must not repeat a token of the model"
    assert len(set(data.tokens)) == 3100


def test_merges_of_both_forms_are_the_same(tmp_path: Path) -> None:
    raw = tokenizer_json()
    pairs = raw["model"]["merges"]
    assert isinstance(pairs[0], list), "this library writes pairs"
    first = load_tokenizer(write(tmp_path / "pairs", raw), 3000)
    raw["model"]["merges"] = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    second = load_tokenizer(write(tmp_path / "strings", raw), 3000)
    assert first.merges == second.merges == tuple(" ".join(pair) for pair in pairs)


CONFIGS: list[tuple[dict[str, Any], tuple[str, ...], bool]] = [
    ({"bos_token": BOS, "add_bos_token": True}, (), True),
    ({"bos_token": BOS, "add_bos_token": False}, (), False),
    ({"bos_token": BOS}, (), False),
    ({"bos_token": BOS}, (BOS,), True),
    ({"bos_token": BOS, "add_bos_token": False}, (BOS,), False),
    ({"bos_token": BOS, "tokenizer_class": "LlamaTokenizerFast"}, (), True),
    ({"bos_token": BOS, "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, (), False),
    ({"tokenizer_class": "LlamaTokenizerFast"}, (), False),
    ({"bos_token": {"content": BOS, "__type": "AddedToken"}, "add_bos_token": True}, (), True),
]


@pytest.mark.parametrize(("config", "before", "expected"), CONFIGS)
def test_add_bos(config: dict[str, Any], before: tuple[str, ...], expected: bool, tmp_path: Path) -> None:
    raw = tokenizer_json()
    raw["post_processor"] = template(*before) if before else None
    assert load_tokenizer(write(tmp_path, raw, config), 3000).add_bos is expected


def test_special_ids_fall_back_to_the_configs_where_the_token_is_special(tmp_path: Path) -> None:
    raw = tokenizer_json()
    size = len(raw["model"]["vocab"])
    files = {
        "generation_config": {"eos_token_id": [size + 1, 5]},
        "config": {"bos_token_id": 1, "pad_token_id": size + 2},
    }
    data = load_tokenizer(write(tmp_path, raw, {}, **files), 3000)
    assert data.special == {"eos": size + 1, "pad": size + 2}, "BOS 1 is a default, no special token"
    config = {"eos_token": None, "bos_token": BOS}
    data = load_tokenizer(write(tmp_path, raw, config, **files), 3000)
    assert data.special == {"bos": size, "pad": size + 2}, "null says that there is no EOS"


def test_special_in_the_config_only_is_control(tmp_path: Path) -> None:
    raw = tokenizer_json()
    i = rows(raw)
    raw["added_tokens"].append(added(i, "<image>", special=False))
    config = {"added_tokens_decoder": {str(i): {"content": "<image>", "special": True}}}
    assert load_tokenizer(write(tmp_path, raw, config), 3000).types[i] == CONTROL


def put(path: str, value: object) -> Mutation:
    """A mutation that sets `a.b.c` of a JSON object."""

    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            raw = raw[parent]
        raw[last] = value

    return change


def no_bytes(raw: dict[str, Any]) -> None:
    """Takes the token of the byte 0x41 away, and every merge and token with it."""
    model = raw["model"]
    kept = [token for token in model["vocab"] if "A" not in token]
    model["merges"] = [pair for pair in model["merges"] if "A" not in "".join(pair)]
    model["vocab"] = {token: n for n, token in enumerate(kept)}
    for n, entry in enumerate(raw["added_tokens"]):
        entry["id"] = len(kept) + n


WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "a",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
    "vocab": {"a": 0},
}
REFUSED: list[tuple[Mutation, str]] = [
    (put("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}), "Unigram"),
    (put("model", WORDPIECE), "WordPiece"),
    (put("model.byte_fallback", True), "byte-level BPE with byte_fallback"),
    (put("model.dropout", 0.5), "dropout"),
    (put("model.end_of_word_suffix", "</w>"), "prefixes or suffixes|library says"),
    (put("pre_tokenizer", None), "without a ByteLevel"),
    (
        put("pre_tokenizer", {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}),
        "without byte_fallback",
    ),
    (put("pre_tokenizer", {"type": "Punctuation", "behavior": "Isolated"}), "step 'Punctuation'"),
    (put("pre_tokenizer", {"type": "Digits", "individual_digits": True}), "0 ByteLevel steps"),
    (put("normalizer", {"type": "Lowercase"}), "Lowercase"),
    (put("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "NFKC"),
    (lambda raw: raw["model"]["vocab"].update(zz=0), "to two tokens"),
    (lambda raw: raw["model"]["merges"].append(["nope", "nope"]), "out of vocabulary"),
    (lambda raw: raw["added_tokens"].append(added(7, "<x>")), "cannot have the id 7"),
    (lambda raw: raw["added_tokens"].append(added(9999, "<x>")), "cannot have the id 9999"),
    (lambda raw: raw["added_tokens"].append(added(rows(raw), "")), "without text"),
    (lambda raw: (no_bytes(raw), put("model.unk_token", "!")(raw)), "bytes have no token"),
]


@pytest.mark.parametrize(("mutation", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses_what_a_gguf_cannot_carry(mutation: Mutation, message: str, tmp_path: Path) -> None:
    raw = tokenizer_json()
    mutation(raw)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(write(tmp_path, raw), 3000)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"bos_token": "<nope>"}, "'<nope>' as bos_token"),
    ({"eos_token": 7}, "neither text nor null"),
    ({"add_bos_token": True}, "there is no bos_token"),
    ({"add_bos_token": "yes"}, "neither true nor false"),
    ({"added_tokens_decoder": {"0": {"content": "<x>"}}}, "the token 0 is '<x>'; in tokenizer.json it is"),
    ({"added_tokens_decoder": {"2999": {"content": "<x>"}}}, "the token 2999 is '<x>'; the tokenizers lib"),
    ({"added_tokens_decoder": {"2999": {"content": PAD}}}, "it does not exist"),
    ({"added_tokens_decoder": {"-1": {"content": "<x>"}}}, "not id to token"),
    ({"added_tokens_decoder": [1]}, "not an object"),
    ({"chat_template": 5}, "neither text nor a list"),
]


@pytest.mark.parametrize(("config", "message"), CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_refuses_contradictions(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(write(tmp_path, tokenizer_json(), config), 3000)


def test_refuses_more_ids_than_rows_and_missing_files(tmp_path: Path) -> None:
    raw = tokenizer_json()
    folder = write(tmp_path / "full", raw)
    assert load_tokenizer(folder, rows(raw)).types[-1] == CONTROL
    size = len(raw["model"]["vocab"])
    with pytest.raises(TokenizerError, match=f"up to {size - 1}, the embedding has {size - 1} rows"):
        load_tokenizer(write(tmp_path / "less", raw, {}), size - 1)
    with pytest.raises(TokenizerError, match="as bos_token, which the vocabulary does not have"):
        load_tokenizer(folder, size)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, 3000)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match="SentencePiece"):
        load_tokenizer(tmp_path, 3000)


def test_refuses_a_post_processor_that_adds_something_else(tmp_path: Path) -> None:
    raw = tokenizer_json()
    raw["post_processor"] = template(PAD)
    with pytest.raises(TokenizerError, match="the post-processor adds"):
        load_tokenizer(write(tmp_path, raw, {"bos_token": BOS}), 3000)


def test_notes(tmp_path: Path) -> None:
    raw = tokenizer_json()
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    config = {"pad_token": "[PAD]", "chat_template": "{{ nothing.at.all }}"}
    no_bytes(raw)
    data = load_tokenizer(write(tmp_path, raw, config), 3000)
    assert data.normalizer == "nfc"
    for part in (
        "NFC",
        "1 bytes have no token (41)",
        "'[PAD]' as pad_token, and no file gives it an id",
        "does not render a plain dialogue",
    ):
        assert any(part in note for note in data.notes), data.notes


def test_chat_templates_as_transformers_looks_for_them(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "config"}, {"name": "tool", "template": "t"}]
    write(tmp_path, tokenizer_json(), {"chat_template": named})
    assert chat_template.collect(tmp_path).default == "config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}', "utf-8")
    assert chat_template.collect(tmp_path).default == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja", "utf-8")
    found = chat_template.collect(tmp_path)
    assert (found.default, dict(found.named)) == ("jinja", {"tool": "t"})
    assert len(found.notes) == 2
    assert "chat_template.jinja wins" in found.notes[1]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r", "utf-8")
    assert dict(chat_template.collect(tmp_path).named) == {"tool": "t", "rag": "r"}


DEEPSEEK_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def test_render_a_plain_dialogue() -> None:
    text = chat_template.render(DEEPSEEK_CHAT, bos_token="<B>", eos_token="<E>")
    assert text == ("<B>User: Hello, who are you?\n\nAssistant: A test.<E>User: Thanks.\n\nAssistant:")


def test_byte_alphabet_is_the_librarys() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet().values()) == set(ByteLevel.alphabet())
    split = ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(0x80))) + "\u07ff\ud7ff\U0010ffff"
    ((piece, _),) = split.pre_tokenize_str(text)
    assert piece == "".join(byte_alphabet()[byte] for byte in text.encode("utf-8"))
