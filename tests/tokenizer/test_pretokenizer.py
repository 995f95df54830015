"""The pre-tokenizer's spec, the runtime's name for it, and the tokenizer rebuilt from GGUF keys alone."""

from __future__ import annotations

import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
import tiny_tokenizer
from tiny_tokenizer import BOS, added, rows, tokenizer_json, write

from dsconvert.errors import TokenizerError
from tokenizer_tools import parity
from tokenizer_tools.library import ids, splitter
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import (
    PreTokenizer,
    Step,
    extract,
    from_gguf,
    gguf_keys,
    rebuild,
    resolve,
    to_gguf,
)
from tokenizer_tools.runtimes import CASED_LETTERS, DEEPSEEK_BOS, RUNTIMES, Runtime, by_name
from tokenizer_tools.steps import GPT2_REGEX, to_json

BYTES = Step("bytelevel")
ODD = PreTokenizer(
    (
        Step("split", "a+(?=b)", "removed", True),
        Step("split", "\\.", "merged_with_previous"),
        Step("split", "\u3000", "merged_with_next"),
        Step("split", "x|y", "contiguous"),
        Step("digits", behavior="contiguous"),
        Step("bytelevel_prefix_space", GPT2_REGEX, "isolated"),
    )
)
# The digests by which ollama (convert/tokenizer.go) knows these pre-tokenizers.
OLLAMA = {
    "llama-bpe": "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f",
    "deepseek-llm": "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02",
    "deepseek-coder": "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e",
    "qwen2": "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e",
}


def load(folder: Path, spec: PreTokenizer, **options: Any) -> TokenizerData:
    return load_tokenizer(write(folder, tokenizer_json(spec, **options)), 3000)


def vocabulary(row: Runtime) -> tuple[dict[str, int], list[Any]]:
    """The vocabulary and merges of a tokenizer grown under a runtime's steps, with one unreachable token."""
    raw = tokenizer_json(row.source)
    tiny_tokenizer.add_unreachable(raw, "\u0120zqzq")
    return raw["model"]["vocab"], raw["model"]["merges"]


def plain(data: TokenizerData, name: str = "?") -> dict[str, Any]:
    """The GGUF metadata as a reader gives it: key -> value."""
    return {key: value for key, (_, value) in gguf_keys(data, name).items()}


@pytest.mark.parametrize("spec", [ODD, *(row.source for row in RUNTIMES), *(row.runtime for row in RUNTIMES)])
def test_spec_goes_to_json_and_gguf_and_back(spec: PreTokenizer) -> None:
    assert extract(json.loads(json.dumps(to_json(spec)))) == spec
    keys = {key: value for key, (_, value) in to_gguf(spec).items()}
    assert from_gguf(keys) == spec
    splitter(spec)  # the library takes it


def test_literal_patterns_and_nested_sequences() -> None:
    text = {"type": "Split", "pattern": {"String": "a.b|\u3000"}, "behavior": "Removed", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    inner = {"type": "Sequence", "pretokenizers": [text, level]}
    spec = extract({"type": "Sequence", "pretokenizers": [inner]})
    assert spec.steps == (Step("split", "a\\.b\\|\u3000", "removed"), BYTES)
    pieces = splitter(spec).pre_tokenize_str("1a.b|\u30002axb")
    assert [piece for piece, _ in pieces] == ["1", "2axb"]


def test_gguf_spec_is_refused_when_it_is_not_understood() -> None:
    keys = {key: value for key, (_, value) in to_gguf(ODD).items()}
    prefix = "dsconvert.pre_tokenizer."
    cases: list[tuple[str, Any, str]] = [
        ("type", ["magic", *keys[prefix + "type"][1:]], "'magic' is not known"),
        ("type", keys[prefix + "type"][1:], "do not fit together"),
        ("flavor", "pcre2", "'pcre2'"),
        ("regex", ["other", *keys[prefix + "regex"][1:]], "not the digest"),
        ("sha256", "0" * 64, "not the digest"),
        (
            "behavior",
            ["sideways", *keys[prefix + "behavior"][1:]],
            "'split' is not known here as it is stated",
        ),
    ]
    for name, value, message in cases:
        with pytest.raises(TokenizerError, match=message):
            from_gguf({**keys, prefix + name: value})
    assert from_gguf({}) is None


@pytest.mark.parametrize("name", OLLAMA)
def test_split_digests_are_the_published_ones(name: str) -> None:
    row = by_name(name)
    assert row is not None
    assert row.source.split_sha256 == OLLAMA[name]


def test_deepseek_letter_class() -> None:
    matched = regex.findall("[" + CASED_LETTERS + "]", "".join(map(chr, range(0x110000))))
    assert len(matched) == 2729
    assert unicodedata.normalize("NFC", CASED_LETTERS) != CASED_LETTERS, "so it must never be normalised"


def test_probes_separate_all_runtimes_pairwise() -> None:
    pieces = {
        row.name: [tuple(splitter(row.runtime).pre_tokenize_str(text)) for text in parity.PROBES]
        for row in RUNTIMES
    }
    alike = [(a, b) for a, b in itertools.combinations(pieces, 2) if pieces[a] == pieces[b]]
    assert alike == [("llama-bpe", "dbrx")], "these two differ in ignore_merges alone"


def test_names_and_aliases_are_unique() -> None:
    names = [name for row in RUNTIMES for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", RUNTIMES, ids=lambda row: row.name)
def test_each_runtime_resolves_to_its_own_name_and_to_no_other(row: Runtime, tmp_path: Path) -> None:
    raw = tokenizer_json(row.source, ignore_merges=row.ignore_merges)
    tiny_tokenizer.add_unreachable(raw, "\u0120zqzq")  # tells ignore_merges apart
    data = load_tokenizer(write(tmp_path, raw), 3000)
    resolution = resolve(data)
    assert (resolution.name, resolution.proven, resolution.notes) == (row.name, True, ())
    assert "known steps" in resolution.evidence
    others = [other for other in RUNTIMES if other is not row and resolve(data, other.name).proven]
    for other in others:
        # This vocabulary has no merge that tells the two apart (single digits under a rule that groups
        # them): one grown under the other's steps has.
        raw["model"]["vocab"], raw["model"]["merges"] = vocabulary(other)
        first = len(raw["model"]["vocab"])
        raw["added_tokens"] = [added(first, BOS)]
        data = load_tokenizer(write(tmp_path / other.name, raw, {"bos_token": BOS}), 3000)
        assert resolve(data).name == row.name
        assert not resolve(data, other.name).proven


def test_another_spelling_is_accepted_by_proof_and_said(tmp_path: Path) -> None:
    row = by_name("qwen2")
    assert row is not None
    data = load(tmp_path, row.runtime)
    assert data.spec != row.source
    resolution = resolve(data)
    assert (resolution.name, resolution.proven) == ("qwen2", True)
    assert "not known" in resolution.evidence
    assert resolution.notes


def test_nothing_fits(tmp_path: Path) -> None:
    data = load(tmp_path, PreTokenizer((Step("split", "[a-m]+", "isolated"), BYTES)))
    with pytest.raises(TokenizerError) as caught:
        resolve(data)
    text = str(caught.value)
    for part in ("step 1 is split '[a-m]+'", "the tokenizer gives [", "the runtime [", "--pre NAME"):
        assert part in text, text
    forced = resolve(data, "qwen2")
    assert (forced.name, forced.proven) == ("qwen2", False)
    assert "gives other ids" in forced.notes[0]
    assert "not known here" in resolve(data, "my-own").notes[0]


def test_a_vocabulary_that_tells_nothing_is_not_guessed(tmp_path: Path) -> None:
    raw = tokenizer_json(PreTokenizer((Step("split", "[a-m]+", "isolated"), BYTES)))
    model = raw["model"]
    model["merges"] = []
    model["vocab"] = {token: i for token, i in model["vocab"].items() if len(token) == 1}
    model["vocab"] = {token: n for n, token in enumerate(model["vocab"])}
    raw["added_tokens"] = [added(len(model["vocab"]), BOS)]
    data = load_tokenizer(write(tmp_path, raw, {"bos_token": BOS}), 3000)
    with pytest.raises(TokenizerError, match="cannot tell those known apart"):
        resolve(data)


def test_digit_merges_under_deepseek_llm_are_caught(tmp_path: Path) -> None:
    """llama.cpp keeps digits together for deepseek-llm: right only while the vocabulary has no such merge."""
    row = by_name("deepseek-llm")
    assert row is not None
    raw = tokenizer_json(row.source)
    raw["model"]["merges"].append(["7", "7"])
    tiny_tokenizer.add_unreachable(raw, "77")
    data = load_tokenizer(write(tmp_path, raw), 3000)
    with pytest.raises(TokenizerError, match="deepseek-llm: its steps are the same") as caught:
        resolve(data)
    assert "77" in str(caught.value)


def test_ignore_merges_decides_between_llama_bpe_and_dbrx(tmp_path: Path) -> None:
    row = by_name("llama-bpe")
    assert row is not None
    for flag, name in ((True, "llama-bpe"), (False, "dbrx")):
        data = load(tmp_path / name, row.source, ignore_merges=flag)
        assert resolve(data).name == name


@pytest.mark.parametrize(
    ("steps", "bos", "name"),
    [
        ("qwen2", DEEPSEEK_BOS, "deepseek-r1-qwen"),  # R1-Distill-Qwen, R1-0528-Qwen3
        ("qwen2", BOS, "qwen2"),
        ("qwen2", None, "qwen2"),
        ("llama-bpe", DEEPSEEK_BOS, "llama-bpe"),  # R1-Distill-Llama
        ("deepseek-v3", DEEPSEEK_BOS, "deepseek-v3"),
        ("deepseek-llm", DEEPSEEK_BOS, "deepseek-llm"),
    ],
)
@pytest.mark.parametrize("spelled", [False, True])
def test_where_names_share_all_steps_bos_decides(
    steps: str, bos: str | None, name: str, spelled: bool, tmp_path: Path
) -> None:
    """Whether the steps are known by their digest, or by proof in another spelling."""
    row = by_name(steps)
    assert row is not None
    raw = tokenizer_json(row.runtime if spelled else row.source, ignore_merges=row.ignore_merges)
    tiny_tokenizer.add_unreachable(raw, "\u0120zqzq")
    raw["added_tokens"].append(added(rows(raw), DEEPSEEK_BOS))
    data = load_tokenizer(write(tmp_path, raw, {"bos_token": bos} if bos else {}), 3000)
    resolution = resolve(data)
    assert (resolution.name, resolution.proven) == (name, True)
    assert resolve(data, name).proven
    keys = {key: value for key, value in plain(data, name).items() if key.startswith("tokenizer.ggml.")}
    assert ids(rebuild(keys), parity.PROBES) == ids(data.tokenizer, parity.PROBES)


def same(first: Any, second: Any, contents: list[str]) -> None:
    texts = [*parity.PROBES, *parity.random_texts(11, 3000, contents)]
    comparison = parity.compare_ids(parity.encoder(first), parity.encoder(second), texts)
    assert comparison.different == 0, comparison.examples
    assert comparison.texts == len(texts)


SPECS = {row.name: row.source for row in RUNTIMES} | {"odd": ODD}


@pytest.mark.parametrize("name", SPECS)
def test_rebuilt_from_the_spec_keys_alone(name: str, tmp_path: Path) -> None:
    raw = tokenizer_json(SPECS[name], ignore_merges=name == "llama-bpe")
    tiny_tokenizer.add_unreachable(raw, "\u0120zqzq")
    for content, flags in (
        ("<|x|>", {"normalized": True}),
        ("<y>", {"lstrip": True, "rstrip": True}),
        ("zqz", {"single_word": True, "special": False}),
        ("\xfc\xe9", {"special": False}),
    ):
        raw["added_tokens"].append(added(rows(raw), content, **flags))
    raw["normalizer"] = {"type": "NFC"}
    data = load_tokenizer(write(tmp_path, raw), 3000)
    keys = plain(data)
    for unneeded in ("tokenizer.huggingface.json", "tokenizer.ggml.pre"):
        del keys[unneeded]
    rebuilt = rebuild(keys)
    same(data.tokenizer, rebuilt, [token.content for token in data.added])
    assert rebuilt.encode("x").ids == [data.bos_id, *ids(rebuilt, ["x"])[0]]
    text = "Stra\xdfe zqz \u4f60 1"
    assert rebuilt.decode(ids(rebuilt, [text])[0]) == text or name == "odd"


def test_added_tokens_in_the_middle_of_the_model(tmp_path: Path) -> None:
    """As trainers place them (SmolLM2, GPT-2): special tokens first in the model's own vocabulary."""
    raw = tokenizer_json()
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] = {BOS: 0} | {token: i + 1 for token, i in vocab.items()}
    raw["added_tokens"] = [added(0, BOS)]
    data = load_tokenizer(write(tmp_path, raw, {"bos_token": BOS}), 3000)
    keys = plain(data)
    del keys["tokenizer.huggingface.json"]
    same(data.tokenizer, rebuild(keys), [BOS])


def test_rebuilt_from_tokenizer_json_when_that_is_all_there_is(tmp_path: Path) -> None:
    data = load(tmp_path, ODD)
    keys = {k: v for k, v in plain(data).items() if not k.startswith("dsconvert.")}
    same(data.tokenizer, rebuild(keys), [])


@pytest.mark.parametrize("row", RUNTIMES, ids=lambda row: row.name)
def test_rebuilt_from_the_runtimes_name_in_a_strangers_file(row: Runtime, tmp_path: Path) -> None:
    data = load(tmp_path, row.source, ignore_merges=row.ignore_merges)
    wanted = ("tokenizer.ggml.", "general.")
    for name in (row.name, *row.aliases):
        keys = {k: v for k, v in plain(data, name).items() if k.startswith(wanted)}
        assert ids(rebuild(keys), parity.PROBES) == ids(data.tokenizer, parity.PROBES)


def test_rebuild_refuses_by_name(tmp_path: Path) -> None:
    keys = {k: v for k, v in plain(load(tmp_path, ODD), "magic").items() if k.startswith("tokenizer.ggml.")}
    with pytest.raises(TokenizerError, match="names the pre-tokenizer 'magic'"):
        rebuild(keys)
    keys["tokenizer.ggml.pre"] = "qwen2"
    with pytest.raises(TokenizerError, match="'bert' tokenizer"):
        rebuild({**keys, "tokenizer.ggml.model": "bert"})
    with pytest.raises(TokenizerError, match=r"no tokenizer\.ggml\.merges"):
        rebuild({k: v for k, v in keys.items() if not k.endswith("merges")})
    with pytest.raises(TokenizerError, match="one token type for each"):
        rebuild({**keys, "tokenizer.ggml.token_type": [1]})
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        rebuild({**keys, "tokenizer.ggml.merges": ["nope nope"]})


def test_gguf_keys_carry_everything(tmp_path: Path) -> None:
    config = {
        "bos_token": BOS,
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "a"}, {"name": "tool", "template": "b"}],
    }
    data = load_tokenizer(write(tmp_path, tokenizer_json(), config), 3000)
    keys = gguf_keys(data, "gpt-2")
    assert keys["tokenizer.ggml.model"] == ("string", "gpt2")
    assert keys["tokenizer.ggml.pre"] == ("string", "gpt-2")
    assert keys["tokenizer.ggml.token_type"] == ("array:int32", list(data.types))
    assert keys["tokenizer.ggml.bos_token_id"] == ("uint32", data.bos_id)
    assert keys["tokenizer.ggml.eos_token_id"] == ("uint32", data.eos_id)
    assert keys["tokenizer.ggml.add_bos_token"] == ("bool", True)
    assert keys["tokenizer.ggml.add_eos_token"] == ("bool", False)
    assert keys["tokenizer.chat_template"] == ("string", "a")
    assert keys["tokenizer.chat_template.tool"] == ("string", "b")
    assert keys["tokenizer.chat_templates"] == ("array:string", ["tool"])
    assert keys["tokenizer.huggingface.json"] == ("string", (tmp_path / "tokenizer.json").read_text("utf-8"))
    assert "tokenizer.ggml.padding_token_id" not in keys
    assert keys["dsconvert.pre_tokenizer.sha256"] == ("string", data.spec.sha256)


def test_comparison_shrinks_and_classifies() -> None:
    def first(texts: Any) -> list[list[int]]:
        return [[ord(char) for char in text] for text in texts]

    def second(texts: Any) -> list[list[int]]:
        return [[ord(char) for char in text.replace("\u3000 ", "X").replace("\u1b4e", "Y")] for text in texts]

    texts = ["plain", "a long \u3000 text", "more\u1b4e", "1\u3000 2 \u3000 "]
    result = parity.compare_ids(first, second, texts)
    assert (result.texts, result.different) == (4, 3)
    assert result.classes == {"Unicode whitespace": 2, "characters new in Unicode 16": 1}
    assert {example[1] for example in result.examples} == {"\u3000 ", "\u1b4e"}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\u2029 ", "Unicode whitespace"),
        ("  \u1b4e", "characters new in Unicode 16"),
        ("  ", "ASCII whitespace runs"),
        ("a1", "digits"),
        ("\u4e2d", "CJK"),
        ("e\u0301", "combining marks"),
        ("a->", "punctuation and symbols"),
        ("ab", "other"),
    ],
)
def test_classes(text: str, kind: str) -> None:
    assert parity.classify(text) == kind


def test_random_texts_are_the_same_for_a_seed_and_reach_everywhere() -> None:
    texts = list(parity.random_texts(3, 20000, ["<|x|>"]))
    assert texts == list(parity.random_texts(3, 20000, ["<|x|>"]))
    joined = "".join(texts)
    assert not any(0xD800 <= ord(char) < 0xE000 for char in joined)
    assert {ord(char) >> 16 for char in joined} == set(range(17))
    assert "<|x|>" in joined
    categories = {unicodedata.category(char) for char in joined}
    assert {"Lu", "Lo", "Nd", "Nl", "No", "Mn", "Zs", "Zl", "Zp", "So", "Sm", "Cf", "Cn", "Co"} <= categories


@pytest.mark.parametrize("row", RUNTIMES, ids=lambda row: row.name)
def test_known_steps_split_alike_where_they_say_so(row: Runtime) -> None:
    """The texts that `split_otherwise` leaves out, on random texts; it must not leave out everything."""
    own, other = splitter(row.source, ""), splitter(row.runtime, "")
    everything = [*parity.random_texts(11, 6000), "it's 12", "x\u0663"]
    texts = set(everything) - set(row.split_otherwise(everything))
    assert len(texts) > 500
    assert row.source == row.runtime or not {"it's 12", "x\u0663"} & texts
    for text in texts:
        assert own.pre_tokenize_str(text) == other.pre_tokenize_str(text), ascii(text)
