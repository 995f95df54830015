"""A model with a SentencePiece-like BPE: converted, proven, and run by llama.cpp as transformers runs it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_spm import CONFIG, tokenizer_json
from tiny_tokenizer import write

from dsconvert.checkpoints.locate import locate
from dsconvert.cli import cli

SPOKEN = "The  quick brown fox, in 1984!\n\n \u4f60\u597d\U0001f600 def f(x): return x"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's weights under such a tokenizer."""
    folder, sample = tmp_path_factory.mktemp("spm"), locate("sample:")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(sample / name, folder / name)
    return write(folder, tokenizer_json(), {**CONFIG, "tokenizer_class": "PreTrainedTokenizerFast"})


@pytest.fixture(scope="module")
def converted(model: Path) -> Path:
    out = model / "out-f32.gguf"
    result = CliRunner().invoke(cli, ["gguf", str(model), "-q", "f32", "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    return out


def test_llama_cpp_runs_it_as_transformers_does(model: Path, converted: Path) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsconvert.runtimes.llamacpp import Engine

    theirs = AutoTokenizer.from_pretrained(model)(SPOKEN)["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference(torch.tensor([[1, *theirs]])).logits[0].double().log_softmax(-1)
    with Engine(converted, n_ctx=256, threads=1) as engine:
        ids = engine.tokenize(SPOKEN, add_special=True)
        assert ids == [1, *theirs]
        found = torch.from_numpy(engine.logits(ids)).double().log_softmax(-1)
        assert engine.special == {"bos": 1, "eos": 2, "add_bos": True}
        assert engine.ends() == [2]
        assert engine.detokenize(theirs) == " " + SPOKEN or engine.detokenize(theirs) == SPOKEN
    kld = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    assert abs(kld) < 1e-9
    assert np.isfinite(kld)


def test_verify_compares_it_and_finds_a_changed_score(model: Path, converted: Path, tmp_path: Path) -> None:
    verify = ["verify", "--against", str(model), "--windows", "1", "--length", "64"]
    result = CliRunner().invoke(cli, [*verify, str(converted)])
    assert result.exit_code == 0, result.output
    data = bytearray(converted.read_bytes())
    at = data.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 4 + 4 + 8
    scores = np.frombuffer(data, "<f4", 2048, at).copy()
    order = np.argsort(scores[259:900])[::-1] + 259
    scores[order[5]], scores[order[9]] = scores[order[9]], scores[order[5]]
    data[at : at + scores.nbytes] = scores.tobytes()
    changed = tmp_path / "changed-f32.gguf"
    changed.write_bytes(data)
    result = CliRunner().invoke(cli, [*verify, str(changed)])
    assert result.exit_code == 3, result.output
    assert "merged in another order" in " ".join(result.output.split())


@pytest.mark.parametrize("command", [["gptq"], ["exl2", "--bpw", "4"]], ids=["gptq", "exl2"])
def test_quantized_folders_are_made_with_it(command: list[str], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ["--calib", "builtin", "--calib-samples", "4", "--calib-len", "64"]
    result = CliRunner().invoke(cli, [*command, str(model), "-o", str(out), *few])
    assert result.exit_code == 0, result.output
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
