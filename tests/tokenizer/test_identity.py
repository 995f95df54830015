"""What an output does with text against the checkpoint: each difference alone, and a runtime's defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsconvert.checkpoints.locate import locate
from tokenizer_tools import identity
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import resolve
from tokenizer_tools.rebuild import gguf_keys
from tokenizer_tools.samples import PROBES

ROWS = 2048


@pytest.fixture(scope="module")
def data() -> TokenizerData:
    return load_tokenizer(locate("sample:"), ROWS)


@pytest.fixture(scope="module")
def keys(data: TokenizerData) -> dict[str, Any]:
    return {key: value for key, (_, value) in gguf_keys(data, resolve(data, None).name).items()}


def found(data: TokenizerData, keys: dict[str, Any]) -> dict[str, identity.Finding]:
    own = identity.of_data(data)
    rows = identity.findings(own, identity.of_metadata(keys), PROBES)
    return {row.name: row for row in (*rows, identity.same_runtime(own, keys, PROBES))}


def test_what_we_write_is_the_same(data: TokenizerData, keys: dict[str, Any]) -> None:
    rows = found(data, keys)
    assert list(rows) == ["token ids", "added tokens", "special tokens", "chat template", "pre-tokenizer"]
    assert all(row.same and row.count == 0 for row in rows.values()), rows
    assert rows["special tokens"].detail.endswith("added: BOS")


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ({"tokenizer.ggml.add_bos_token": False}, "special tokens", "BOS is not added"),
        ({"tokenizer.ggml.add_eos_token": True}, "special tokens", "EOS is added"),
        ({"tokenizer.ggml.bos_token_id": 3}, "special tokens", "BOS is 3"),
        ({"tokenizer.chat_template": ""}, "chat template", "missing"),
        ({"tokenizer.chat_template": "{{ 1 }}"}, "chat template", "differs"),
        ({"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer", "under the name 'qwen2'"),
        ({"tokenizer.ggml.pre": "nobody"}, "pre-tokenizer", "'nobody' is not known"),
    ],
)
def test_each_difference_alone(
    data: TokenizerData, keys: dict[str, Any], change: dict[str, Any], name: str, said: str
) -> None:
    rows = found(data, {**keys, **change})
    assert [row.name for row in rows.values() if not row.same] == [name]
    assert said in rows[name].detail
    assert rows[name].count > 0


def test_a_swapped_pair_of_tokens_is_found(data: TokenizerData, keys: dict[str, Any]) -> None:
    tokens = list(keys["tokenizer.ggml.tokens"])
    a, b = tokens.index("e"), tokens.index("t")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    rows = found(data, {**keys, "tokenizer.ggml.tokens": tokens})
    assert not rows["token ids"].same
    assert not rows["pre-tokenizer"].same


def test_an_absent_flag_is_what_the_runtime_does_without_it(keys: dict[str, Any]) -> None:
    """llama.cpp puts BOS before a text under Llama 3's name and under no other of these."""
    bare = {k: v for k, v in keys.items() if "add_bos" not in k and not k.startswith("dsconvert.")}
    del bare["tokenizer.huggingface.json"]
    assert identity.of_metadata(bare).add_bos is False
    assert identity.of_metadata({**bare, "tokenizer.ggml.pre": "llama-bpe"}).add_bos is True


def test_a_template_that_the_checkpoint_lacks(data: TokenizerData, keys: dict[str, Any]) -> None:
    own = replace(identity.of_data(data), template="")
    row = identity.same_template(own, identity.of_metadata(keys))
    assert not row.same
    assert "the checkpoint has none" in row.detail
