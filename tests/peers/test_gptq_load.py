"""GPTQ folders load in transformers with gptqmodel's kernels on the CPU, and mean what our reader says.

Two kernels run each folder. "torch" multiplies by the weights in float16, so that logits are held against
those of our read-back rounded to float16: 1e-5 of their norm. The default kernel, whichever gptqmodel picks
for the folder, may compute in bfloat16: 2e-2 against the read-back as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_experts
import tiny_families
import tiny_vl
from click.testing import CliRunner

from converters.gptq.reader import Stated, open_model
from dsconvert.checkpoints.quantized import QuantizedSource
from dsconvert.cli import cli
from dsconvert.models.config import load_json

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages, all of them
EXACT, DEFAULT = 1e-5, 2e-2
CALIBRATION = ("--calib", "builtin", "--calib-samples", "4", "--calib-len", "128", "--verify", "off")


def quantized(model: Path | str, out: Path, *options: str) -> Path:
    """The folder that the command line writes."""
    done = CliRunner().invoke(cli, ["gptq", str(model), "--out", str(out), *CALIBRATION, *options])
    assert done.exit_code == 0, done.output
    return out


def load(auto: str, folder: Path | str, backend: str | None = None) -> Any:
    """transformers' model of a folder in float32; with `backend`, gptqmodel's kernel of that name."""
    import torch
    import transformers

    more: dict[str, Any] = {}
    if backend is not None:
        settings = load_json(Path(folder) / "config.json")["quantization_config"]
        more["quantization_config"] = transformers.GPTQConfig(bits=settings["bits"], backend=backend)
    cls = getattr(transformers, auto)
    return cls.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **more).eval()


def read_back(auto: str, source: Path, model: QuantizedSource[Stated], half: bool) -> Any:
    """transformers' plain model with the weights of our reader, those of its linears rounded to float16."""
    import torch

    plain = load(auto, source)
    state = plain.state_dict()
    assert set(model.shapes()) <= set(state)
    for name in model.shapes():
        array = model.float32(name)
        if half and (model.dtype(name).startswith("gptq") or name.endswith("proj.bias")):
            array = array.astype(np.float16).astype(np.float32)
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
    return plain


def apart(
    auto: str,
    source: Path,
    folder: Path,
    inputs: dict[str, Any],
    kernels: tuple[str | None, ...] = (None, "torch"),
) -> dict[str, float]:
    """Distance of the logits, relative to their norm, by kernel."""
    import torch

    model, found = open_model(folder), {}
    with torch.no_grad():
        for kernel in kernels:
            logits = load(auto, folder, kernel)(**inputs).logits.double()
            expected = read_back(auto, source, model, half=kernel is not None)(**inputs).logits.double()
            found[kernel or "default"] = float((logits - expected).norm() / expected.norm())
    return found


def held(found: dict[str, float]) -> None:
    assert found["torch"] < EXACT, found
    assert found["default"] < DEFAULT, found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases and grouped heads."""
    folder = tmp_path_factory.mktemp("peers") / "model"
    return tiny.tiny_checkpoint(folder, d=128, ff=384, bias=True, shards=2)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_architecture_loads_as_its_own_class(tmp_path: Path, family: str) -> None:
    source = tiny_families.checkpoint(tmp_path / "source", family)
    out = quantized(source, tmp_path / "out", "--bits", "4", "--group-size", "32")
    assert type(load("AutoModelForCausalLM", out)).__name__ == tiny_families.FAMILIES[family][0]
    held(apart("AutoModelForCausalLM", source, out, {"input_ids": ids(2048)}))


OPTIONS = {
    "default": "--bits 4",
    "natural": "--bits 4 --group-size 32 --no-act-order",
    "dynamic groups": "--bits 4 --group-size 32 --act-order --dynamic-groups",
    "asymmetric": "--bits 4 --group-size 64 --asym --no-mse",
    "2 bits": "--bits 2 --group-size 32",
    "3 bits": "--bits 3 --group-size 64",
    "8 bits": "--bits 8 --group-size 128",
}


def ids(vocab: int, length: int = 96) -> Any:
    import torch

    return torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (1, length)))


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_those_of_our_reader(tmp_path: Path, source: Path, name: str) -> None:
    out = quantized(source, tmp_path / "out", *OPTIONS[name].split())
    held(apart("AutoModelForCausalLM", source, out, {"input_ids": ids(512)}))


@pytest.mark.parametrize("options", ["--bits 4", "--bits 4 --group-size 64 --asym"])
def test_a_short_last_group(tmp_path: Path, options: str) -> None:
    """By the "torch" kernel only: the one that gptqmodel picks on CPUs with AVX-512 takes whole groups."""
    source = tiny.tiny_checkpoint(tmp_path / "source", d=128, ff=352)
    out = quantized(source, tmp_path / "out", *options.split())
    found = apart("AutoModelForCausalLM", source, out, {"input_ids": ids(512)}, ("torch",))
    assert found["torch"] < EXACT, found


def test_whole_rows_as_groups(tmp_path: Path, source: Path) -> None:
    """By the "torch" kernel only: the default one, PyTorch's int4 product, takes groups of 32 to 256."""
    out = quantized(source, tmp_path / "out", "--bits", "4", "--group-size", "-1")
    found = apart("AutoModelForCausalLM", source, out, {"input_ids": ids(512)}, ("torch",))
    assert found["torch"] < EXACT, found


def test_the_sample_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model of DeepSeek's layout, its output cut into shards."""
    from dsconvert.checkpoints.checkpoint import open_checkpoint
    from dsconvert.quantization import folder as flow

    whole = flow.write_folder
    monkeypatch.setattr(flow, "write_folder", lambda *args, **more: whole(*args, shard_bytes=1 << 20, **more))
    out = quantized("sample:", tmp_path / "out")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    folder = open_checkpoint("sample:").folder
    held(apart("AutoModelForCausalLM", folder, out, {"input_ids": ids(2048)}))


@pytest.mark.parametrize("hybrid", [False, True], ids=["deepseek_vl", "deepseek_vl_hybrid"])
def test_a_model_with_a_tower_loads_whole(tmp_path: Path, hybrid: bool) -> None:
    """The language model quantized, the tower and the aligner as they were; a text with a picture in it."""
    sizes = tiny_vl.VL(hybrid=hybrid, d=128, ff=256)
    source = tiny_vl.vl_checkpoint(tmp_path / "source", sizes)
    out = quantized(source, tmp_path / "out", "--group-size", "32")
    inputs = tiny_vl.pictured(ids(400), sizes, load_json(source / "config.json")["image_token_id"])
    held(apart("AutoModelForImageTextToText", source, out, inputs))


@pytest.mark.parametrize("hybrid", [False, True], ids=["deepseek_vl", "deepseek_vl_hybrid"])
def test_the_language_model_alone_loads_as_a_llama(tmp_path: Path, hybrid: bool) -> None:
    source = tiny_vl.vl_checkpoint(tmp_path / "source", tiny_vl.VL(hybrid=hybrid, d=128, ff=256), "original")
    out = quantized(source, tmp_path / "out", "--group-size", "32", "--language-only")
    plain = tmp_path / "plain"  # the same, unquantized
    plain.mkdir()
    model = open_model(out)
    config = load_json(out / "config.json")
    del config["quantization_config"]
    tiny.write_json(plain / "config.json", config)
    arrays = {name: model.float32(name) for name in model.shapes()}
    (plain / "model.safetensors").write_bytes(tiny.safetensors_bytes(arrays))
    held(apart("AutoModelForCausalLM", plain, out, {"input_ids": ids(400)}))


@pytest.mark.parametrize("name", ["v2", "v3", "qwen3moe"])
def test_experts_load_in_gptqmodel_itself(tmp_path: Path, name: str) -> None:
    """transformers fuses experts and cannot load them; gptqmodel takes them apart first.

    Its weights are our reader's in float16, to the bit, of every linear. Logits, in 16 bits, are near those
    of transformers' plain model with our weights: by the median token, as a few go to other experts.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "moe_intermediate_size": 64, "kv_lora_rank": 64}
    sizes |= {} if name == "qwen3moe" else {"first_k_dense_replace": 1}
    source = tiny_experts.checkpoint(tmp_path / "source", name, **sizes)
    out = quantized(source, tmp_path / "out", "--group-size", "32")
    model = open_model(out)
    loaded = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
    modules = {n: module for n, module in loaded.named_modules() if hasattr(module, "qweight")}
    assert set(modules) == set(model.linears)
    for linear, module in modules.items():
        ours = torch.from_numpy(model.float32(f"{linear}.weight")).half()
        assert torch.equal(module.dequantize_weight().T, ours), linear
    inputs = {"input_ids": ids(400)}
    with torch.no_grad():
        logits = loaded(**inputs).logits[0].double()
        expected = plain_logits(source, model, inputs)
    apart = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(apart.median()) < DEFAULT


def plain_logits(source: Path, model: QuantizedSource[Stated], inputs: dict[str, Any]) -> Any:
    """Logits of transformers' plain model in float32 with our reader's weights, read as a checkpoint's."""
    folder = source.with_name("plain")
    shutil.copytree(source, folder)
    arrays = {name: model.float32(name) for name in model.shapes()}
    (folder / "model.safetensors").write_bytes(tiny.safetensors_bytes(arrays))
    return load("AutoModelForCausalLM", folder)(**inputs).logits[0].double()
