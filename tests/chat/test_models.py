"""Models to talk to, each against a reading of the whole sequence at once; how they take and give text."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
import tiny_experts
import tiny_families
import tiny_spm

from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gptq.convert import convert as quantize
from converters.outputs import open_output
from dsconvert.chat.file_model import FileModel, open_file_model
from dsconvert.chat.model import Floats, Model
from dsconvert.chat.session import never
from dsconvert.chat.torch_model import TorchModel
from dsconvert.checkpoints.locate import locate
from dsconvert.decoder import torch_decoder as st
from dsconvert.proof.sources import Opened
from dsconvert.vision.prompt import prompt_logits
from tokenizer_tools.load import load_tokenizer

pytest.importorskip("torch", reason="needs torch: pip install torch")
SENTENCE = "def f(x):\n    return x ** 2  # caf\u00e9, \u4f60\u597d\n" * 3


def torch_model(opened: Opened) -> TorchModel:
    tokenizer = load_tokenizer(opened.path, opened.config.vocab_size)
    return TorchModel(opened.source, opened.config, tokenizer, "cpu", 256)


def in_pieces(model: Model, ids: list[int]) -> list[Floats]:
    """Logits after several pieces, one of them forgotten and read again in another way."""
    found = []
    for at, stop in ((0, 20), (20, 21), (21, 30)):
        found.append(model.read(ids[at:stop], at, never))
    assert model.forget(10) == 10
    found.append(model.read(ids[10:29], 10, never))
    found.append(model.read(ids[29:30], 29, never))
    assert model.forget(0) == 0
    found.append(model.read(ids[:30], 0, never))
    assert all(logits is not None for logits in found)
    return [logits for logits in found if logits is not None]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "gptq"
    asked = {"calib": "builtin", "calib_samples": 2, "calib_len": 64, "effort": "off"}
    list(quantize(calibrated.gptq_options("sample:", out=out, **asked)))
    return out


@pytest.mark.parametrize("name", ["sample:", "gptq"])
def test_a_folder_in_torch_gives_the_logits_of_its_weights(name: str, quantized: Path) -> None:
    opened = open_output(quantized if name == "gptq" else locate(name))
    model = torch_model(opened)
    ids = model.text.encode(SENTENCE)[:30]
    wanted = prompt_logits(opened.source, opened.config, [ids]).numpy()
    for found, at in zip(in_pieces(model, ids), (19, 20, 29, 28, 29, 29), strict=True):
        np.testing.assert_allclose(found, wanted[at], atol=2e-4)


@pytest.mark.parametrize(("kind", "name"), [(tiny_families, "qwen3"), (tiny_experts, "v32")])
def test_every_architecture_keeps_what_it_has_read(kind: Any, name: str, tmp_path: Path) -> None:
    """Norms of heads, latent attention, experts, keys that an indexer chose."""
    more = {"index_topk": 16} if name == "v32" else {}
    opened = open_output(kind.checkpoint(tmp_path / "m", name, num_hidden_layers=3, **more))
    model = torch_model(opened)
    ids = model.text.encode(SENTENCE)[:30]
    wanted = prompt_logits(opened.source, opened.config, [ids]).numpy()
    for found, at in zip(in_pieces(model, ids), (19, 20, 29, 28, 29, 29), strict=True):
        np.testing.assert_allclose(found, wanted[at], atol=2e-4)


def test_a_matrix_of_an_expert_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dequantized for the first token that comes to it, not for each."""
    model, read, seen = torch_model(open_output(locate("sample-moe:"))), st.read, []

    def reading(decoder: st.Decoder, name: str, rows: slice | None = None) -> Any:
        seen.append(name)
        return read(decoder, name, rows)

    monkeypatch.setattr(st, "read", reading)
    ids = model.text.encode(SENTENCE)[:30]
    for at, token in enumerate(ids):
        model.read([token], at, never)
    assert 3 <= len(seen) == len(set(seen)) < 3 * 2 * len(ids)
    assert all(".mlp.experts." in name for name in seen)


def test_a_folder_that_is_stopped_has_read_nothing(quantized: Path) -> None:
    model, blocks = torch_model(open_output(quantized)), iter((False, True))
    ids = model.text.encode(SENTENCE)
    wanted = model.read(ids[:10], 0, never)
    assert model.read(ids[10:20], 10, lambda: next(blocks)) is None
    model.read(ids[10:20], 10, never)
    assert model.forget(10) == 10
    np.testing.assert_allclose(model.read(ids[9:10], model.forget(9), never), wanted, atol=2e-4)  # type: ignore[arg-type]


def test_a_folder_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsconvert.chat import torch_model as module
    from dsconvert.errors import UsageError

    opened = open_output(locate("sample:"))
    monkeypatch.setattr(module, "free_memory", lambda: 5e6)
    with pytest.raises(UsageError, match=r"takes 0\.0 GB.*0\.0 GB are free.*dsconvert gguf"):
        torch_model(opened)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileModel]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    path = tmp_path_factory.mktemp("chat") / "f32.gguf"
    list(convert(Options("sample:", ("f32",), path, effort="off")))
    with open_file_model(path, mmproj=None, context=256, threads=1, cpu=True) as model:
        yield model


def test_a_file_in_llama_cpp_gives_the_logits_of_its_weights(llama: FileModel) -> None:
    """Its cache of keys and values is in float16, as people run it."""
    opened = open_output(locate("sample:"))
    ids = llama.text.encode(SENTENCE)[:30]
    wanted = prompt_logits(opened.source, opened.config, [ids]).numpy()
    for found, at in zip(in_pieces(llama, ids), (19, 20, 29, 28, 29, 29), strict=True):
        np.testing.assert_allclose(found, wanted[at], atol=0.05)


def test_a_prompt_is_stopped_inside_llama_cpp(llama: FileModel) -> None:
    ids, asked = llama.text.encode(SENTENCE), [0]

    def stopped() -> bool:
        asked[0] += 1
        return asked[0] > 5

    assert llama.forget(0) == 0
    wanted = llama.read(ids[:10], 0, never)
    assert llama.read(ids[10:40], 10, stopped) is None
    assert asked[0] == 6
    assert llama.forget(9) == 9
    np.testing.assert_allclose(llama.read(ids[9:10], 9, never), wanted, atol=0.01)  # type: ignore[arg-type]


def test_what_stopping_raises_comes_out(llama: FileModel) -> None:
    def stopped() -> bool:
        raise KeyboardInterrupt

    llama.forget(0)
    with pytest.raises(KeyboardInterrupt):
        llama.read(llama.text.encode(SENTENCE), 0, stopped)
    assert llama.read([5], 0, never) is not None


def test_both_take_and_give_text_alike(llama: FileModel) -> None:
    folder = torch_model(open_output(locate("sample:"))).text
    file = llama.text
    assert replace(folder, where=file.where, encode=file.encode, piece=file.piece, marker=file.marker) == file
    assert folder.encode(SENTENCE) == file.encode(SENTENCE)
    assert [folder.piece(token) for token in range(2000)] == [file.piece(token) for token in range(2000)]
    assert b"".join(map(folder.piece, folder.encode(SENTENCE))) == SENTENCE.encode()
    assert folder.piece(folder.bos or 0) == file.piece(folder.bos or 0) == b""


def test_a_sentencepiece_vocabulary_gives_text(tmp_path: Path) -> None:
    from dsconvert.chat.torch_model import chat_text

    tiny.write_json(tmp_path / "tokenizer.json", tiny_spm.tokenizer_json())
    tokenizer = load_tokenizer(tmp_path, 1500)
    text, said = chat_text(tokenizer), "a caf\u00e9 \U0001f600"
    assert b"".join(map(text.piece, text.encode(said))) == f" {said}".encode()
