"""GPTQ of DeepSeek-VL: either layout comes in, transformers' goes out, and transformers loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
import tiny_vl
from tiny_vl import VL

from converters.gptq.convert import convert
from converters.gptq.reader import open_model
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.errors import CheckpointError, PlanError
from dsconvert.events import Check, Event
from dsconvert.models.config import load_config, load_json
from tokenizer_tools.load import load_tokenizer

SMALL: dict[str, Any] = {"calib": "builtin", "calib_samples": 4, "calib_len": 64, "group_size": 32}
SIZES = pytest.mark.parametrize("hybrid", [False, True], ids=["1.3B", "7B"])


@pytest.fixture(autouse=True)
def tiny_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vl.tiny_towers(monkeypatch)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], Path]:
    root, layouts = tmp_path_factory.mktemp("vl"), ("original", "transformers")
    return {
        (hybrid, layout): tiny_vl.vl_checkpoint(root / f"{layout}-{hybrid}", VL(hybrid=hybrid), layout)  # type: ignore[arg-type]
        for hybrid in (False, True)
        for layout in layouts
    }


def run(model: Path, out: Path, **asked: Any) -> list[Event]:
    return list(convert(calibrated.gptq_options(model, out=out, **{**SMALL, "effort": "off", **asked})))


def same_tensors(first: Path, second: Path) -> None:
    a, b = (open_model(folder).checkpoint for folder in (first, second))
    assert a.shapes() == b.shapes()
    for name in a.shapes():
        stored = a.tensors[name], b.tensors[name]
        assert stored[0].dtype == stored[1].dtype
        assert bytes_of(stored[0]) == bytes_of(stored[1]), name


def bytes_of(stored: Any) -> bytes:
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        return bytes(file.read(stored.nbytes))


def dequantized(folder: Path, out: Path) -> Path:
    """The folder as a 16-bit one of the values that it stands for: what a runtime computes with."""
    shutil.copytree(folder, out)
    (out / "quantize_config.json").unlink()
    config = load_json(out / "config.json")
    del config["quantization_config"]
    tiny.write_json(out / "config.json", config)
    model = open_model(folder)
    tiny_vl.write_weights(out, {name: model.float32(name) for name in model.shapes()})
    return out


def load(folder: Path) -> Any:
    """The model as transformers loads it, in float32; it must find all that it looks for, and no more."""
    import torch
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def pixels(o: VL) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    found = {"pixel_values": torch.randn(1, 3, o.image, o.image)}
    if o.hybrid:
        found["high_res_pixel_values"] = torch.randn(1, 3, o.sam_image, o.sam_image)
    return found


@SIZES
def test_both_layouts_give_the_same_folder(tmp_path: Path, sources: Any, hybrid: bool) -> None:
    events = run(sources[hybrid, "original"], tmp_path / "a", effort="quick", bits=8)
    checks = [event for event in events if isinstance(event, Check)]
    assert {"structure", "tokenizer", "weights", "mean KLD"} <= {check.name for check in checks}
    assert [check.detail for check in checks if not check.passed] == []
    run(sources[hybrid, "transformers"], tmp_path / "b", bits=8)
    same_tensors(tmp_path / "a", tmp_path / "b")
    ours, theirs = (load_json(tmp_path / name / "config.json") for name in "ab")
    for key in ("architectures", "model_type", "image_token_id"):
        assert ours[key] == theirs[key]
    settings = ours["quantization_config"]
    assert settings == theirs["quantization_config"] == load_json(tmp_path / "a" / "quantize_config.json")
    assert ours["tie_word_embeddings"] is theirs["tie_word_embeddings"] is False
    tokenizer = load_tokenizer(tmp_path / "a", VL().vocab)
    assert ours["text_config"]["bos_token_id"] == tokenizer.bos_id  # in published files it is a wrong one
    assert ours["text_config"]["eos_token_id"] == tokenizer.eos_id
    towers = [key for key in ours if "vision_config" in key]
    assert len(towers) == 1 + hybrid
    for tower in towers:
        stated = {key: value for key, value in ours[tower].items() if key in theirs[tower]}
        assert stated == theirs[tower]


@SIZES
def test_transformers_computes_with_it_what_is_in_the_checkpoint(
    tmp_path: Path, sources: Any, hybrid: bool
) -> None:
    """Pictures give the very embeddings; the logits after them are those of the dequantized weights."""
    import torch

    o = VL(hybrid=hybrid)
    run(sources[hybrid, "original"], tmp_path / "q", bits=8)
    ours = load(dequantized(tmp_path / "q", tmp_path / "ours"))
    source = load(sources[hybrid, "transformers"])
    inputs = pixels(o)
    with torch.no_grad():
        pictures = [
            model.model.get_image_features(**inputs, return_dict=True).pooler_output
            for model in (ours, source)
        ]
        assert torch.equal(*pictures)
        ids = torch.tensor([[1, *[tiny_vl.image_id(o)] * o.tokens, 5, 6, 7]])
        logits = [model(input_ids=ids, **inputs).logits for model in (ours, source)]
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 0 < error < 0.03, "8 bits are near the checkpoint, and not the checkpoint"


@SIZES
def test_transformers_processor_takes_the_files(tmp_path: Path, sources: Any, hybrid: bool) -> None:
    """The same pixels and ids as of a checkpoint that is transformers' from the start."""
    from PIL import Image
    from transformers import AutoProcessor

    o = VL(hybrid=hybrid)
    run(sources[hybrid, "original"], tmp_path / "q")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (o.image, 40, 3), np.uint8))
    ours = AutoProcessor.from_pretrained(tmp_path / "q")
    assert type(ours).__name__ == f"DeepseekVL{'Hybrid' * hybrid}Processor"
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    found = ours.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = found["input_ids"][0].tolist()
    assert ids.count(tiny_vl.image_id(o)) == o.tokens
    written = json.loads((tmp_path / "q" / "preprocessor_config.json").read_text("utf-8"))
    stated = tiny_vl.transformers_files(o)["preprocessor_config.json"]
    assert {key: written[key] for key in stated} == stated
    assert tuple(found["pixel_values"].shape[-2:]) == (o.image, o.image)
    assert ("high_res_pixel_values" in found) is hybrid


def test_weights_in_a_torch_file_are_laid_out_anew_too(tmp_path: Path, sources: Any) -> None:
    folder = shutil.copytree(sources[False, "original"], tmp_path / "bin")
    source = open_checkpoint(folder)
    tiny.write_bin(
        folder / "pytorch_model.bin", {n: np.array(source.tensors[n].data) for n in source.shapes()}
    )
    (folder / "model.safetensors").unlink()
    run(folder, tmp_path / "a")
    run(sources[False, "original"], tmp_path / "b")
    same_tensors(tmp_path / "a", tmp_path / "b")


def test_the_language_model_alone_is_the_same_from_either(tmp_path: Path, sources: Any) -> None:
    for layout in ("original", "transformers"):
        run(sources[False, layout], tmp_path / layout, language_only=True)
        assert load_config(tmp_path / layout).architecture == "LlamaForCausalLM"
    same_tensors(tmp_path / "original", tmp_path / "transformers")


def test_a_template_of_its_own_is_kept(tmp_path: Path, sources: Any) -> None:
    folder = shutil.copytree(sources[False, "original"], tmp_path / "own")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    run(folder, tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").read_text("utf-8") == "{{ messages[0].content }}"


def test_what_cannot_be_laid_out_anew_is_refused_before_any_work(tmp_path: Path, sources: Any) -> None:
    for number, (file, error, said) in enumerate(
        [
            ("preprocessor_config.json", CheckpointError, "preprocessor_config.json is missing"),
            ("processor_config.json", CheckpointError, "processor_config.json is missing"),
        ]
    ):
        folder = shutil.copytree(sources[True, "original"], tmp_path / str(number))
        (folder / file).unlink()
        with pytest.raises(error, match=said):
            next(iter(convert(calibrated.gptq_options(folder, out=tmp_path / "out", **SMALL))))
    folder = shutil.copytree(sources[True, "original"], tmp_path / "tag")
    chat = load_json(folder / "processor_config.json") | {"image_tag": "<nothing>"}
    tiny.write_json(folder / "processor_config.json", chat)
    with pytest.raises(CheckpointError, match="<nothing>"):
        next(iter(convert(calibrated.gptq_options(folder, out=tmp_path / "out", **SMALL))))
    source = open_checkpoint(sources[True, "original"])
    stored = {name: np.array(source.tensors[name].data) for name in source.shapes()}
    stored.pop("aligner.layers.1.bias")
    tiny_vl.write_weights(shutil.copytree(sources[True, "original"], tmp_path / "less"), stored)
    with pytest.raises(PlanError, match=r"aligner\.layers\.1\.bias"):
        next(iter(convert(calibrated.gptq_options(tmp_path / "less", out=tmp_path / "out", **SMALL))))
    assert not list(tmp_path.glob("out*"))
