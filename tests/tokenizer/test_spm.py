"""SentencePiece-like BPE: the ids of the GGUF file alone, of transformers and of llama.cpp, or a refusal."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_spm
from tiny_spm import BOS, CONFIG, EOS, FORMS, SPACE, UNK, random_merges, tokenizer_json, write_vocabulary
from tiny_tokenizer import added, rows, write

from dsconvert.errors import TokenizerError
from tokenizer_tools import identity, parity, spm
from tokenizer_tools.library import ids
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import resolve
from tokenizer_tools.rebuild import gguf_keys, rebuild
from tokenizer_tools.score_proof import against_scores, provable, token_texts
from tokenizer_tools.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

NEEDS_LLAMA = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)
RUNS = [f"{a}{' ' * n}{b}" for n in range(36) for a in ("", "x", "\n") for b in ("", "y", "\n")]


def load(folder: Path, raw: dict[str, Any], **config: Any) -> TokenizerData:
    return load_tokenizer(write(folder, raw, {**CONFIG, **config}), 3000)


def plain(data: TokenizerData, name: str = "default") -> dict[str, Any]:
    return {key: value for key, (_, value) in gguf_keys(data, name).items()}


def texts(count: int = 4000) -> list[str]:
    return [*parity.PROBES, *RUNS, *parity.random_texts(7, count)]


def llama_cpp(path: Path, texts: Sequence[str]) -> list[list[int]]:
    from dsconvert.runtimes.llamacpp import Engine

    with Engine(path, vocab_only=True) as engine:
        return [engine.tokenize(text, parse_special=True) for text in texts]


@NEEDS_LLAMA
@pytest.mark.parametrize("form", FORMS)
def test_ids_of_the_file_alone_of_transformers_and_of_llama_cpp(form: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = load(tmp_path, tokenizer_json(form), tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    own = [*texts(), *(f"{a}{token}{b}" for token in (BOS, EOS) for a in ("", "x ") for b in ("", "y", " y"))]
    theirs = AutoTokenizer.from_pretrained(tmp_path)(own, add_special_tokens=False)["input_ids"]
    resolution = resolve(data)
    keys = gguf_keys(data, resolution.name)
    assert resolution.proven
    assert ids(rebuild({key: value for key, (_, value) in keys.items()}), own) == theirs
    runtime = llama_cpp(write_vocabulary(tmp_path / "v.gguf", keys), own)
    differing = [text for text, a, b in zip(own, theirs, runtime, strict=True) if a != b]
    foreseen = [t for t in differing if spm.foreseen(form, t) or BOS in t or EOS in t]
    assert differing == foreseen
    assert bool(differing) == (form in spm.METASPACE) == bool(resolution.notes)


def test_what_transformers_makes_of_the_llama_class(tmp_path: Path) -> None:
    """transformers 5 puts Metaspace in Prepend's place, whatever tokenizer.json says."""
    from transformers import AutoTokenizer

    data = load(tmp_path, tokenizer_json(), tokenizer_class="LlamaTokenizer")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    own = texts(1000)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(own, add_special_tokens=False)["input_ids"]
    differing = [text for text, a, b in zip(own, theirs, data.encode(own), strict=True) if a != b]
    assert differing
    assert all(text[0] in (" ", SPACE) for text in differing)


@NEEDS_LLAMA
def test_any_merges_are_proven_or_refused_as_llama_cpp_does(tmp_path: Path) -> None:
    """What is proven holds on every fuzzed string; what is refused differs on the string that is named."""
    outcomes = {True: 0, False: 0}
    rng = random.Random(1)
    fuzz = ["".join(rng.choices("abc ", k=rng.randint(1, 24))) for _ in range(300)]
    for seed in range(120):
        data = load(tmp_path / str(seed), random_merges(seed))
        path = write_vocabulary(tmp_path / f"{seed}.gguf", gguf_keys(data, "default"))
        wrong = against_scores(data)([*provable(data), *token_texts(data)])
        tried = fuzz if wrong is None else [wrong.text]
        same = llama_cpp(path, tried) == data.encode(tried)
        assert same == (wrong is None), (seed, wrong)
        outcomes[same] += 1
        if wrong is not None:
            with pytest.raises(TokenizerError, match="merges by score, gives other ids"):
                resolve(data)
    assert min(outcomes.values()) > 10, outcomes


def test_types_scores_and_keys(tmp_path: Path) -> None:
    raw = tokenizer_json()
    raw["added_tokens"].append(added(rows(raw) - 3, "<tool>", special=False))
    data = load(tmp_path, raw)
    keys = plain(data)
    kinds = dict(zip(data.tokens, data.types, strict=True))
    assert [kinds[t] for t in (UNK, BOS, EOS, "<0x0A>", "<tool>", SPACE)] == [
        UNKNOWN, CONTROL, CONTROL, BYTE, USER_DEFINED, NORMAL,
    ]  # fmt: skip
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.unknown_token_id"] == 0
    assert "tokenizer.ggml.merges" not in keys
    first, second = ("".join(pair) for pair in raw["model"]["merges"][:2])
    scored = dict(zip(data.tokens, keys["tokenizer.ggml.scores"], strict=True))
    assert (scored[first], scored[second], scored[BOS]) == (0, -1, 0)
    assert min(map(len, rebuild(keys).encode_batch(["x", SPACE]))) > 0
    assert data.token_bytes[data.tokens.index("<0xE4>")] == 1
    assert data.token_bytes[data.tokens.index(SPACE)] == 1


def test_a_token_of_two_merges_has_the_score_of_the_one_that_makes_it(tmp_path: Path) -> None:
    """a b, then ab c makes abc; a bc, which comes first in the list, never has a bc to merge."""
    merges = [["a", "b"], ["a", "bc"], ["c", "d"], ["ab", "c"], ["b", "c"]]
    data = load(tmp_path, tiny_spm.of_merges(["a", "b", "c", "d", SPACE, "ab", "bc", "cd", "abc"], merges))
    assert data.scores[data.tokens.index("abc")] == -3
    assert resolve(data).proven
    assert [data.tokens[i] for i in data.encode(["abcd"])[0]] == [SPACE, "ab", "cd"]


def defect(change: Callable[[dict[str, Any], TokenizerData], None]) -> Any:
    return pytest.param(change, id=change.__name__)


def a_score(keys: dict[str, Any], data: TokenizerData) -> None:
    scores = list(keys["tokenizer.ggml.scores"])
    order = spm.merge_order(data.tokens, data.types, len(data.merges), scores)
    scores[order[-1]] = scores[order[-3]] + 0.5
    keys["tokenizer.ggml.scores"] = scores


def the_space(keys: dict[str, Any], data: TokenizerData) -> None:
    keys["tokenizer.ggml.add_space_prefix"] = False


def two_tokens(keys: dict[str, Any], data: TokenizerData) -> None:
    tokens = list(keys["tokenizer.ggml.tokens"])
    a, b = tokens.index("e"), tokens.index("t")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    keys["tokenizer.ggml.tokens"] = tokens


@pytest.mark.parametrize("change", [defect(a_score), defect(the_space), defect(two_tokens)])
def test_each_planted_defect_is_found(change: Any, tmp_path: Path) -> None:
    data = load(tmp_path, tokenizer_json())
    keys, own = plain(data), identity.of_data(data)
    assert all(f.same for f in identity.findings(own, identity.of_metadata(keys), parity.PROBES))
    assert identity.same_runtime(own, keys, parity.PROBES).same
    change(keys, data)
    assert not identity.same_ids(own, identity.of_metadata(keys), parity.PROBES).same
    assert not identity.same_runtime(own, keys, parity.PROBES).same


def test_what_a_runtime_does_where_a_file_is_silent(tmp_path: Path) -> None:
    keys = plain(load(tmp_path, tokenizer_json()))
    silent = ("add_bos_token", "bos_token_id", "eos_token_id", "add_space_prefix")
    bare = {k: v for k, v in keys.items() if not k.endswith(silent) and not k.startswith("dsconvert.")}
    found = identity.of_metadata(bare)
    assert (found.add_bos, found.special["bos"], found.special["eos"]) == (True, 1, 2)
    assert ids(found.tokenizer, ["a"]) == ids(rebuild(keys), ["a"])


def test_a_checkpoint_without_bos_and_eos(tmp_path: Path) -> None:
    data = load_tokenizer(write(tmp_path, tokenizer_json(), {}), 3000)
    keys, own = plain(data), identity.of_data(data)
    assert list(resolve(data).notes) == [
        "the files name no BOS; llama.cpp takes the token 1, '<s>'",
        "the files name no EOS; llama.cpp takes the token 2, '</s>'",
    ]
    assert "tokenizer.ggml.bos_token_id" not in keys
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert identity.same_special(own, identity.of_metadata(keys)).same
    assert not identity.same_special(
        own, identity.of_metadata({**keys, "tokenizer.ggml.eos_token_id": 9})
    ).same


def test_a_refusal_spells_the_spaces_of_its_text(tmp_path: Path) -> None:
    data = load(tmp_path, random_merges(10))
    with pytest.raises(TokenizerError, match=r"on '\\ue000a a\\x20\\x20' the tokenizer gives"):
        resolve(data)


def test_runs_of_one_score_grow_from_the_left_and_other_ties_are_refused(tmp_path: Path) -> None:
    """Llama's own files give all runs of spaces the score -1e9."""
    data = load(tmp_path, tokenizer_json())
    keys = plain(data)
    runs = [i for i, token in enumerate(data.tokens) if len(token) > 1 and set(token) == {SPACE}]
    assert len(runs) > 2
    scores = [-1e9 if i in runs else score for i, score in enumerate(data.scores)]
    own, tied = identity.of_data(data), identity.of_metadata({**keys, "tokenizer.ggml.scores": scores})
    assert identity.same_ids(own, tied, [*RUNS, *parity.PROBES]).same
    flat = [-1000.0] * len(scores)
    with pytest.raises(TokenizerError, match="the same score, -1000"):
        rebuild({**keys, "tokenizer.ggml.scores": flat})
    with pytest.raises(TokenizerError, match="the score nan"):
        rebuild({**keys, "tokenizer.ggml.scores": [float("nan")] * len(scores)})
    with pytest.raises(TokenizerError, match="one score"):
        rebuild({**keys, "tokenizer.ggml.scores": flat[1:]})


def drop_a_byte(raw: dict[str, Any]) -> None:
    vocab = raw["model"]["vocab"]
    vocab["nothing"] = vocab.pop("<0x41>")


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            raw = raw[parent]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_a_byte, "these bytes have no token: <0x41>"),
        (put("model.byte_fallback", False), "its bytes are the unknown token"),
        (put("normalizer", {"type": "NFKC"}), "normalises text by NFKC"),
        (put("normalizer", {"type": "Prepend", "prepend": "_"}), "normalises text by Prepend"),
        (put("normalizer", None), "does not spell a space"),
        (put("pre_tokenizer", {"type": "Whitespace"}), "splits text by Whitespace"),
        (
            put(
                "pre_tokenizer",
                {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False},
            ),
            "splits text by Split",
        ),
        (put("pre_tokenizer", {"type": "Digits", "individual_digits": True}), "merges by score, gives other"),
        (put("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}), "a Unigram model"),
    ],
)
def test_refused_by_name(change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    raw = tokenizer_json()
    change(raw)
    with pytest.raises(TokenizerError, match=said):
        resolve(load(tmp_path, raw))


def test_merges_of_bytes_and_tokens_of_unknown_characters_are_refused(tmp_path: Path) -> None:
    raw = tokenizer_json()
    bytes_merged = tiny_spm.of_merges(["a", SPACE, "<0x41>a"], [["<0x41>", "a"]])
    with pytest.raises(TokenizerError, match="merges the bytes <0x41> a"):
        load(tmp_path, bytes_merged)
    with pytest.raises(TokenizerError, match="no pre-tokenizer that --pre qwen2"):
        resolve(load(tmp_path, raw), "qwen2")


def test_gemma_s_split_at_spaces_changes_nothing(tmp_path: Path) -> None:
    raw = tokenizer_json("never")
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    raw["pre_tokenizer"] = split
    data = load(tmp_path, raw)
    assert resolve(data).proven
    assert plain(data)["tokenizer.ggml.add_space_prefix"] is False


@NEEDS_LLAMA
def test_added_tokens_that_llama_cpp_sees_elsewhere_are_told(tmp_path: Path) -> None:
    """An added token that is normalized takes the space before it along; llama.cpp's does not."""
    raw = tokenizer_json()
    raw["added_tokens"].append(added(rows(raw) - 3, "<tool>", special=False, normalized=True))
    data = load(tmp_path, raw)
    (note,) = resolve(data).notes
    assert "llama.cpp gives other ids around added tokens: on " in note
    text = note.split(": on ")[1].split(" the tokenizer gives")[0].strip("'")
    path = write_vocabulary(tmp_path / "v.gguf", gguf_keys(data, "default"))
    assert llama_cpp(path, [text]) != data.encode([text])
