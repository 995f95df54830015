"""The embedded sample: its files agree, its tokenizer is of DeepSeek's kind, it is really trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import dsconvert
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.config import load_config
from dsconvert.models.tensor_table import plan
from dsconvert.texts.builtin import evaluation_page, evaluation_pages

SAMPLE = Path(dsconvert.__file__).parent / "sample"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "deepseek-llm"
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
# What byte-level BPE makes of the bytes C0, C1 and F5-FF, which never occur in UTF-8.
NEVER = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}


def read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((SAMPLE / name).read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaForCausalLM

    loaded, info = LlamaForCausalLM.from_pretrained(SAMPLE, dtype="float32", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


def bits_per_byte(model: Any, tokenizer: Tokenizer, pages: list[str]) -> float:
    import torch

    nats = 0.0
    for page in pages:
        ids = torch.tensor([tokenizer.encode(BOS + page, add_special_tokens=False).ids])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return nats / math.log(2) / sum(len(page.encode()) for page in pages)


def test_tensors_are_the_ones_that_the_config_asks_for():
    config = load_config(SAMPLE)
    with safe_open(SAMPLE / "model.safetensors", "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        assert {s.get_dtype() for s in slices.values()} == {"BF16"}
    assert {spec.hf for spec in plan(LLAMA.table, config, shapes)} == set(shapes)
    assert (SAMPLE / "model.safetensors").stat().st_size < 5_500_000


def test_it_is_the_layout_that_finds_mistakes():
    config = load_config(SAMPLE)
    assert config.kv_heads < config.heads  # grouped queries, as DeepSeek 67B has
    assert not config.tied
    assert config.hidden_size % 256 == config.intermediate_size % 256 == 0  # whole k-quant super-blocks
    assert config.hidden_size != config.intermediate_size != config.vocab_size
    raw = config.raw
    assert raw["rope_parameters"] == {"rope_theta": raw["rope_theta"], "rope_type": "default"}


def test_vocabulary_is_laid_out_like_deepseeks(tokenizer):
    config, rows = load_config(SAMPLE), load_config(SAMPLE).vocab_size
    ids = tokenizer.get_vocab(with_added_tokens=True)
    plain = tokenizer.get_vocab(with_added_tokens=False)
    assert sorted(ids.values()) == list(range(len(ids)))
    assert len(ids) < rows  # padding rows
    added = tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(len(plain), len(ids)))
    assert [t.content for t in added.values() if t.special] == [BOS, EOS]
    assert {t.content for t in added.values() if not t.special} == NEVER
    assert not NEVER & set(plain)
    assert (ids[BOS], ids[EOS]) == (config.raw["bos_token_id"], config.raw["eos_token_id"])
    assert read("generation_config.json")["eos_token_id"] == ids[EOS]


def test_tokenizer_config_names_the_same_tokens(tokenizer):
    config = read("tokenizer_config.json")
    named = {int(i): (t["content"], t["special"]) for i, t in config["added_tokens_decoder"].items()}
    decoder = tokenizer.get_added_tokens_decoder()
    assert named == {i: (t.content, t.special) for i, t in decoder.items()}
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (BOS, EOS, EOS)
    assert read("special_tokens_map.json") == {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}


def test_every_step_but_the_model_is_deepseeks():
    path = SHARED / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"needs {path}, the tokenizer of deepseek-llm")
    theirs, ours = json.loads(path.read_text(encoding="utf-8")), read("tokenizer.json")
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[key] == theirs[key], key
    assert [t["content"] for t in ours["added_tokens"]] == [t["content"] for t in theirs["added_tokens"]]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x: int) -> int:\n    return x ** 2  # squares\r\n\tpass\n\n\n",
        "\u5982\u679c\u5141\u8bb8\u4e00\u70b9\u70b9\u8bef\u5dee\uff0c\u56db\u4f4d\u4e5f\u5c31\u591f\u4e86\u3002",
        "na\xefve caf\xe9 \u0416\u0443\u043a \u0e20\u0e32\u0e29\u0e32 \U0001f600\u200d\U0001f680 2024-01-15",
        "  leading and trailing   ",
        "",
    ],
)
def test_text_comes_back_from_its_ids(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_pages_come_back_and_are_compressed(tokenizer):
    page = evaluation_page(8000)
    ids = tokenizer.encode(page, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == page
    assert len(ids) < len(page.encode()) / 2.3


def test_chat_template_renders_deepseeks_dialogue():
    from jinja2 import Environment

    template = Environment().from_string(read("tokenizer_config.json")["chat_template"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    tokens = {"bos_token": "<b>", "eos_token": "<e>"}
    asked = template.render(messages=messages, add_generation_prompt=True, **tokens)
    assert asked == "<b>Be brief.\n\nUser: Hi\n\nAssistant: Hello<e>User: Bye\n\nAssistant:"
    assert template.render(messages=messages[1:3], **tokens) == "<b>User: Hi\n\nAssistant: Hello<e>"


def test_it_predicts_held_out_prose_and_shuffled_weights_do_not(model, tokenizer):
    import torch

    pages = evaluation_pages(4, 2000)
    trained = bits_per_byte(model, tokenizer, pages)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                order = torch.randperm(weight.numel(), generator=generator)
                weight.copy_(weight.flatten()[order].view_as(weight))
    shuffled = bits_per_byte(model, tokenizer, pages)
    assert trained < 1.9
    assert shuffled > trained + 0.5
