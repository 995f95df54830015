"""Janus-Pro on tiny models of both layouts: files, pictures in llama.cpp, prompts, what is left out.

The reference is transformers' own Janus on the checkpoint as it is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
import tiny_vl
from click.testing import CliRunner
from safetensors import safe_open
from tiny_vl import IMAGE, VL

from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.gguf.projector import keys as projector_keys
from converters.gptq.convert import convert as quantize
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError
from dsconvert.events import Event, Planned, Step
from dsconvert.runtimes.llamacpp import Engine
from dsconvert.runtimes.mtmd import Projector
from dsconvert.vision import torch_towers as runner
from tokenizer_tools.chat_template import render
from tokenizer_tools.vision_template import SYSTEM, Dialogue, vision_template

SIZES = VL(janus=True, dtype="f32")
LAYOUTS: tuple[tiny_vl.Layout, ...] = ("original", "transformers")
BEGIN, END = "<begin_of_image>", "<end_of_image>"


@dataclass(frozen=True)
class Made:
    """A checkpoint, its text file and its projector, and what was said on the way."""

    folder: Path
    text: Path
    projector: Path
    events: list[Event]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        tiny_vl.tiny_towers(patch)
        for layout in LAYOUTS:
            root = tmp_path_factory.mktemp(layout)
            folder, text = tiny_vl.vl_checkpoint(root / "model", SIZES, layout), root / "text.gguf"
            asked: dict[str, Any] = {"mmproj": root / "mmproj-text.gguf", "mmproj_quant": "f32"}
            events = list(convert(Options(str(folder), ("f32",), text, effort="off", **asked)))
            found[layout] = Made(folder, text, asked["mmproj"], events)
    return found


@pytest.fixture(scope="module")
def reference(made: dict[str, Made]) -> Any:
    import torch
    from transformers import JanusForConditionalGeneration

    folder = made["transformers"].folder
    return JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_made_checkpoint_has_the_names_of_transformers(reference: Any, made: dict[str, Made]) -> None:
    names = set(open_checkpoint(made["transformers"].folder).shapes())
    theirs = set(reference.state_dict())
    assert names <= theirs
    assert all("vqmodel" in name for name in theirs - names)  # of these it has some, from each kind one


def test_both_layouts_give_the_same_files(made: dict[str, Made]) -> None:
    first, second = made.values()
    assert first.text.read_bytes() == second.text.read_bytes()
    assert first.projector.read_bytes() == second.projector.read_bytes()
    file = open_gguf(first.projector)
    assert file.keys["clip.projector_type"] == "janus_pro"
    assert file.keys["clip.vision.projection_dim"] == SIZES.d
    assert open_gguf(first.text).keys["general.architecture"] == "llama"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_makes_pictures_is_left_out_and_said(layout: str, made: dict[str, Made]) -> None:
    events = made[layout].events
    planned = {t.source for e in events if isinstance(e, Planned) for t in e.tensors}
    left = set(open_checkpoint(made[layout].folder).shapes()) - planned
    making = {name for name in left if "gen_" in name or "vqmodel" in name or "generation" in name}
    assert all("attn_pool" in name for name in left - making)
    assert making
    said = " ".join(e.text for e in events if isinstance(e, Step) and "left out" in e.text)
    assert "make pictures" in said
    for part in ("gen_vision_model", "gen_head") if layout == "original" else ("model.vqmodel",):
        assert f"of {part}" in said


def kld(wanted: Any, found: Any) -> float:
    """The mean divergence over all positions."""
    import torch

    p, q = (torch.as_tensor(x).double().log_softmax(-1) for x in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_text_in_llama_cpp_is_that_of_transformers(reference: Any, made: dict[str, Made]) -> None:
    import torch

    ids = np.random.default_rng(0).integers(3, 400, 60).tolist()
    with Engine(made["original"].text, n_ctx=128) as engine, torch.no_grad():
        assert kld(reference(input_ids=torch.tensor([ids])).logits[0], engine.logits(ids)) < 1e-9


def test_pictures_in_llama_cpp_are_those_of_transformers(reference: Any, made: dict[str, Made]) -> None:
    """Embeddings by the file alone, by llama.cpp and by transformers; a question with its prompt and ids."""
    import torch

    model = made["original"]
    weights, vision = projector_keys.open_projector(open_gguf(model.projector))
    picture = runner.synthetic_picture(vision)
    pictures = runner.exact_pictures(vision, picture)
    with torch.no_grad():
        wanted = reference.model.get_image_features(torch.from_numpy(pictures.low)).pooler_output[0].numpy()
    alone = runner.embed(runner.load_towers(weights, vision), pictures)[0]
    assert runner.embedding_error(wanted, alone).relative < 1e-6
    template = open_gguf(model.text).keys["tokenizer.chat_template"]
    with Engine(model.text, n_ctx=512) as engine, Projector(model.projector, engine) as projector:
        assert runner.embedding_error(wanted, projector.embed(picture[0])).relative < 2e-3
        asked = [{"role": "user", "content": projector.marker + "What is this?"}]
        prompt = render(template, asked, eos_token=tiny.EOS)
        parts = projector.parts(prompt, [picture[0]])
        found = engine.logits(*parts)
    before, embedded, after = parts
    assert len(embedded) == SIZES.tokens
    image = tiny_vl.image_id(SIZES)
    ids = [*before, *[image] * SIZES.tokens, *after]
    # What transformers' processor makes of the same question, with BOS.
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    text = f"{SYSTEM}\n\n<|User|>: {BEGIN}{IMAGE * SIZES.tokens}{END}\nWhat is this?\n\n<|Assistant|>:"
    plain = own.encode(text, add_special_tokens=False).ids
    assert ids == [own.token_to_id(tiny.BOS), *plain]
    with torch.no_grad():
        asked_there = reference(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(pictures.low))
    assert kld(asked_there.logits[0], found) < 1e-4


TEMPLATE = vision_template(IMAGE, Dialogue("<|User|>", "<|Assistant|>", BEGIN, END, own_line=True))
SHOWN = f"{BEGIN}{IMAGE}{END}"
PARTS: dict[str, tuple[Any, str]] = {
    "text": ("Hi ", "Hi"),
    "picture first": ([{"type": "image"}, {"type": "text", "text": "What?"}], f"{SHOWN}\nWhat?"),
    "picture last": ([{"type": "text", "text": "Look:"}, {"type": "image"}], f"Look:\n{SHOWN}"),
    "picture alone": ([{"type": "image"}], SHOWN),
    "original": (f"{IMAGE}\nWhat?", f"{SHOWN}\nWhat?"),
    "mark in parts": (
        [{"type": "media_marker", "text": "<__media__>"}, {"type": "text", "text": "What?"}],
        f"{BEGIN}<__media__>{END}\nWhat?",
    ),
    "marks in a string": (
        "See<__media_a1__>and<__media_a1__>\nWhat?",
        f"See\n{BEGIN}<__media_a1__>{END}\nand\n{BEGIN}<__media_a1__>{END}\nWhat?",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_prompts_are_the_models_own(name: str) -> None:
    content, wanted = PARTS[name]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A."}]
    messages.append({"role": "user", "content": "Why?"})
    found = render(TEMPLATE, messages, eos_token="<e>")
    own = f"{SYSTEM}\n\n<|User|>: {wanted}\n\n<|Assistant|>: A.<e><|User|>: Why?\n\n<|Assistant|>:"
    assert found == own


def test_a_pair_is_verified_and_shown(made: dict[str, Made]) -> None:
    model = made["transformers"]
    for words in (
        ["verify", model.text, "--against", model.folder, "--mmproj", model.projector],
        ["inspect", model.text, model.projector],
    ):
        done = CliRunner().invoke(cli, [*map(str, words)])
        assert done.exit_code == 0, done.output
    assert "pair" in done.output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gptq_keeps_towers_and_what_makes_pictures(
    layout: str, made: dict[str, Made], reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_vl.tiny_towers(monkeypatch)
    out, asked = tmp_path / "gptq", {"calib": "builtin", "calib_samples": 2, "calib_len": 32}
    list(quantize(calibrated.gptq_options(made[layout].folder, out=out, effort="off", **asked)))
    source = open_checkpoint(made["transformers"].folder)
    kept = {name for name in source.shapes() if "language_model.layers" not in name}
    with safe_open(out / "model.safetensors", "numpy") as found:
        others = set(found.keys()) - kept
        assert all(".self_attn." in name or ".mlp." in name or "norm" in name for name in others)
        for name in kept:
            assert np.array_equal(found.get_tensor(name).astype(np.float32), source.float32(name)), name
    raw = json.loads((out / "config.json").read_text("utf-8"))
    assert raw["architectures"] == ["JanusForConditionalGeneration"]
    assert raw["vq_config"]["num_embeddings"] == 16
    stated = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    if layout == "transformers":
        return
    assert (stated["boi_token"], stated["eoi_token"]) == (BEGIN, END)
    # Its template and processor write what the GGUF file's template does, with a picture of 16 tokens.
    from PIL import Image
    from transformers import AutoProcessor

    picture = Image.fromarray(np.zeros((SIZES.image, SIZES.image, 3), np.uint8))
    asked_of = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    processor = AutoProcessor.from_pretrained(out)
    given = processor.apply_chat_template(
        [{"role": "user", "content": asked_of}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    text = processor.tokenizer.decode(given["input_ids"][0])
    shown = f"{BEGIN}{IMAGE * SIZES.tokens}{END}"
    assert text == f"{SYSTEM}\n\n<|User|>: {shown}\nWhat is this?\n\n<|Assistant|>:"


FAULTS: dict[str, tuple[tiny_vl.Layout, str, dict[str, Any], str]] = {
    "norms of q and k": ("transformers", "config.json", {"use_qk_norm": True}, "use_qk_norm"),
    "a deeper aligner": ("transformers", "config.json", {"depth": 3}, "depth"),
    "another width": ("transformers", "config.json", {"projection_dim": 32}, "projection_dim.*32.*64"),
    "a token beside pictures": (
        "original",
        "processor_config.json",
        {"image_start_tag": "<nothing>"},
        "<nothing>",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_this_model_is_refused(
    name: str, made: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_vl.tiny_towers(monkeypatch)
    layout, file, changes, why = FAULTS[name]
    folder = Path(shutil.copytree(made[layout].folder, tmp_path / "model"))
    raw = json.loads((folder / file).read_text("utf-8"))
    part = raw["vision_config"] if file == "config.json" else raw
    part.update(changes)
    tiny.write_json(folder / file, raw)
    with pytest.raises(CheckpointError, match=why):
        list(convert(Options(str(folder), ("f16",), tmp_path / "x.gguf", effort="off")))


def test_the_published_config(tmp_path: Path) -> None:
    """Janus-Pro 7B as deepseek-ai publishes it: the decoder's part is partial, the tower is named."""
    o = tiny_vl.full(hybrid=False, d=4096, janus=True)
    files = tiny_vl.original_files(o)
    files["config.json"]["language_config"] = {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "vocab_size": 102400,
    }
    for name, value in files.items():
        tiny.write_json(tmp_path / name, value)
    from dsconvert.models.config import load_config
    from dsconvert.vision.config import load_vision

    vision = load_vision(tmp_path, load_config(tmp_path))
    assert vision.model.hf_class == "JanusForConditionalGeneration"
    assert (vision.vit.width, vision.vit.layers, vision.tokens, vision.projection) == (1024, 24, 576, 4096)
    assert vision.processor.around == (BEGIN, END)
