"""The real DeepSeek tokenizers: published cases, published vocabularies, and 200,000 random texts.

They lie beside the project, under the DeepSeek model licence, and are not part of it.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest

from tokenizer_tools import parity
from tokenizer_tools.library import ids
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import gguf_keys, rebuild, resolve
from tokenizer_tools.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (DATA / "tokenizers").is_dir(),
    reason=f"needs DeepSeek's tokenizer files in {DATA / 'tokenizers'}; they are not part of the project",
)
ROWS = {"deepseek-llm": 102400, "deepseek-coder": 32256, "deepseek-vl": 102400}
PRE = {"deepseek-llm": "deepseek-llm", "deepseek-coder": "deepseek-coder", "deepseek-vl": "deepseek-llm"}
# llama.cpp's convert_hf_to_gguf.py knows these tokenizers by the SHA-256 of their ids on its test text.
CHKHSH = {"deepseek-llm": "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754"}
CHKHSH["deepseek-vl"] = CHKHSH["deepseek-llm"]
CHKHSH["deepseek-coder"] = "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821"
BYTE_LIKE = "\xf8\xf6\xfa\xff\xf5\xf7\xfb\xfd\xc0\xf9\xc1\xfe\xfc"
# deepseek-vl is deepseek-llm with one more added token (tested below): fewer texts suffice.
TEXTS = {"deepseek-llm": 200_000, "deepseek-coder": 200_000, "deepseek-vl": 20_000}
models = pytest.mark.parametrize("name", ROWS)


@functools.cache
def model(name: str) -> TokenizerData:
    return load_tokenizer(DATA / "tokenizers" / name, ROWS[name])


@functools.cache
def rebuilt(name: str) -> Any:
    """The tokenizer made of the GGUF keys alone, without the tokenizer.json that they also carry."""
    keys = {key: value for key, (_, value) in gguf_keys(model(name), PRE[name]).items()}
    del keys["tokenizer.huggingface.json"], keys["tokenizer.ggml.pre"]
    return rebuild(keys)


def cases(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's published texts and ids of a vocabulary."""
    stem = DATA / "vocab" / f"ggml-vocab-{PRE[name]}.gguf"
    with open(f"{stem}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{stem}.out").read_text("utf-8").split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)][:-1]


@models
def test_the_46_published_cases(name: str) -> None:
    published = cases(name)
    assert len(published) == 46
    texts = [text for text, _ in published]
    expected = [numbers for _, numbers in published]
    assert ids(model(name).tokenizer, texts) == expected
    assert ids(rebuilt(name), texts) == expected


@models
def test_the_fingerprint_of_llama_cpp(name: str) -> None:
    text = max((text for text, _ in cases(name)), key=len)
    numbers = rebuilt(name).encode(text).ids
    assert numbers[0] == model(name).bos_id, "the rebuilt tokenizer adds BOS"
    assert hashlib.sha256(str(numbers).encode()).hexdigest() == CHKHSH[name]


@models
def test_resolved_by_fingerprint_and_proof(name: str) -> None:
    resolution = resolve(model(name))
    assert (resolution.name, resolution.proven, resolution.notes) == (PRE[name], True, ())
    assert "known steps" in resolution.evidence


@models
def test_vocabulary_facts(name: str) -> None:
    data = model(name)
    coder = name == "deepseek-coder"
    size = 32000 if coder else 100000
    assert data.types[:size] == (NORMAL,) * size
    assert len(data.merges) == (31757 if coder else 99757)
    assert data.special == (
        {"bos": 32013, "eos": 32014, "pad": 32014} if coder else {"bos": 100000, "eos": 100001, "pad": 100001}
    )
    assert data.tokens[data.special["bos"]] == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert data.types[data.special["bos"]] == data.types[data.special["eos"]] == CONTROL
    assert (data.add_bos, data.add_eos, data.notes) == (True, False, ())
    byte_like = [i for i, token in enumerate(data.tokens[size:], size) if token in BYTE_LIKE]
    assert byte_like == list(range(32000, 32013) if coder else range(100002, 100015))
    assert {data.types[i] for i in byte_like} == {USER_DEFINED}
    used = {"deepseek-llm": 100015, "deepseek-coder": 32022, "deepseek-vl": 100016}[name]
    assert data.types[used:] == (UNUSED,) * (ROWS[name] - used)
    assert UNUSED not in data.types[:used]
    assert data.tokens[-1] == f"[PAD{ROWS[name] - 1}]"
    if name == "deepseek-vl":
        assert data.tokens[100015] == "<image_placeholder>"
        assert data.types[100015] == CONTROL


@pytest.mark.parametrize("name", ["deepseek-llm", "deepseek-coder"])
def test_keys_are_those_of_the_published_vocabularies(name: str) -> None:
    """All tokenizer keys; those files call the padding rows user-defined, which was before UNUSED."""
    from gguf import GGUFReader

    fields = GGUFReader(DATA / "vocab" / f"ggml-vocab-{name}.gguf").fields
    published = {key: f.contents() for key, f in fields.items() if key.startswith("tokenizer.")}
    ours = {key: value for key, (_, value) in gguf_keys(model(name), name).items()}
    types = published.pop("tokenizer.ggml.token_type")
    assert len(published) == 9
    different = [key for key, value in published.items() if ours[key] != value]
    assert different == []
    changed = [i for i, kind in enumerate(ours["tokenizer.ggml.token_type"]) if kind != types[i]]
    assert changed == list(range(model(name).used, ROWS[name]))
    assert {types[i] for i in changed} == {USER_DEFINED}


@models
def test_random_texts_have_the_same_ids_when_rebuilt(name: str) -> None:
    data = model(name)
    contents = [token.content for token in data.added]
    texts = parity.random_texts(len(name), TEXTS[name], contents)
    result = parity.compare_ids(parity.encoder(data.tokenizer), parity.encoder(rebuilt(name)), texts)
    assert result.texts == TEXTS[name]
    assert result.different == 0, result.examples


def test_deepseek_vl_is_deepseek_llm_with_one_more_token() -> None:
    vl, llm = model("deepseek-vl"), model("deepseek-llm")
    assert (vl.spec, vl.merges) == (llm.spec, llm.merges)
    assert [i for i in range(102400) if vl.tokens[i] != llm.tokens[i]] == [100015]
    assert vl.added[:-1] == llm.added
    assert vl.added[-1].content == "<image_placeholder>"


def test_the_keys_carry_the_whole_file() -> None:
    kind, text = gguf_keys(model("deepseek-vl"), "deepseek-llm")["tokenizer.huggingface.json"]
    assert (kind, text) == (
        "string",
        (DATA / "tokenizers" / "deepseek-vl" / "tokenizer.json").read_text("utf-8"),
    )
