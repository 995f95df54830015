"""DeepSeek-OCR and OCR-2 on tiny models of transformers' classes: text, projectors, pictures in llama.cpp."""

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
import tiny_ocr
from click.testing import CliRunner

from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.gguf.projector import keys as projector_keys
from converters.gguf.projector.completeness import completeness
from converters.gptq.convert import convert as quantize
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, UsageError
from dsconvert.models.config import load_config
from dsconvert.models.tensor_table import plan
from dsconvert.runtimes.llamacpp import Engine
from dsconvert.runtimes.mtmd import Projector
from dsconvert.vision import torch_towers as runner
from dsconvert.vision import tower_sizes
from dsconvert.vision.config import load_vision
from tokenizer_tools.chat_template import render

KINDS = pytest.mark.parametrize("second", [False, True], ids=["OCR", "OCR-2"])


@dataclass(frozen=True)
class Made:
    """transformers' model, its checkpoint, and the files of it."""

    model: Any
    folder: Path
    text: Path
    projector: Path


def shrink(patch: pytest.MonkeyPatch) -> None:
    """OCR-2's configs name its second transformer; let the name stand for a tiny one."""
    sizes = {key: tiny_ocr.QWEN2[key] for key in tower_sizes.QUERIED if key in tiny_ocr.QWEN2}
    patch.setitem(tower_sizes.DEFAULTS, "queried", tower_sizes.QUERIED | sizes)


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Made]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for second in (False, True):
            root, model = tmp_path_factory.mktemp("ocr"), tiny_ocr.model(second)
            folder = tiny_ocr.checkpoint(root / "model", model, second)
            projector = root / "mmproj-text.gguf"
            asked: dict[str, Any] = {"mmproj": projector, "mmproj_quant": "f32", "effort": "off"}
            list(convert(Options(str(folder), ("f32",), root / "text.gguf", **asked)))
            found[second] = Made(model, folder, root / "text.gguf", projector)
    return found


def kld(wanted: Any, found: Any) -> float:
    """The mean divergence over all positions."""
    import torch

    p, q = (torch.as_tensor(x).double().log_softmax(-1) for x in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@KINDS
def test_text_in_llama_cpp_is_that_of_transformers(second: bool, made: dict[bool, Made]) -> None:
    import torch

    ids = np.random.default_rng(0).integers(3, 400, 60).tolist()
    with Engine(made[second].text, n_ctx=128) as engine, torch.no_grad():
        wanted = made[second].model(input_ids=torch.tensor([ids])).logits[0]
        assert kld(wanted, engine.logits(ids)) < 1e-9


@KINDS
def test_pictures_in_llama_cpp_are_those_of_transformers(second: bool, made: dict[bool, Made]) -> None:
    """By the file alone, to the bit; by llama.cpp, a whole picture, and its tiles as well as it can."""
    import torch
    from PIL import Image
    from tokenizers import Tokenizer

    model = made[second]
    weights, vision = projector_keys.open_projector(open_gguf(model.projector))
    picture = runner.synthetic_picture(vision)
    pictures = runner.exact_pictures(vision, picture)
    side = 768 if second else 640  # of a tile
    large = np.asarray(Image.fromarray(picture[0]).resize((2 * side, 2 * side)))
    halves = [part for row in np.split(large, 2) for part in np.split(row, 2, axis=1)]
    tiles = np.stack(halves).transpose(0, 3, 1, 2).astype(np.float32)
    local = torch.from_numpy((tiles / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
    grid = {} if second else {"patches_grid": [[2, 2]]}
    with torch.no_grad():
        features = model.model.model.get_image_features(
            torch.from_numpy(pictures.low), local, num_local_patches=[4], **grid
        )
    both = features.pooler_output[0].numpy()
    wanted, cut = both[-vision.tokens :], both[: -vision.tokens]
    alone = runner.embed(runner.load_towers(weights, vision), pictures)[0]
    assert np.array_equal(wanted, alone)
    template = open_gguf(model.text).keys["tokenizer.chat_template"]
    with Engine(model.text, n_ctx=2048) as engine, Projector(model.projector, engine) as projector:
        asked = [{"role": "user", "content": projector.marker + "Free OCR."}]
        parts = projector.parts(render(template, asked), [picture[0]])
    found = np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    assert runner.embedding_error(wanted, found[-vision.tokens :]).relative < 2e-3
    assert found.shape == both.shape
    # llama.cpp resizes position tables otherwise, see docs/gguf.md, and the picture a little so.
    assert runner.embedding_error(cut, found[: -vision.tokens]).relative < (0.05 if second else 0.5)
    # The published prompt, <image>, a line's end and the task.
    assert parts[0] == [open_gguf(model.text).keys["tokenizer.ggml.bos_token_id"]]
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    assert parts[-1] == tokenizer.encode("\nFree OCR.", add_special_tokens=False).ids


@KINDS
def test_the_projector_says_what_llama_cpp_reads(second: bool, made: dict[bool, Made]) -> None:
    file = open_gguf(made[second].projector)
    assert all(check.passed for check in completeness(file))
    wanted = {
        "clip.projector_type": "deepseekocr2" if second else "deepseekocr",
        "clip.vision.projection_dim": 64,
        "clip.vision.window_size": 14,
        "clip.vision.sam.block_count": 3,
        "clip.vision.sam.embedding_length": 16,
        "clip.vision.sam.head_count": 1,
        "clip.vision.preproc_min_tiles": 2,
        "clip.vision.preproc_max_tiles": 6 if second else 9,
        "dsconvert.image.token": "<image>",
        "dsconvert.image.tokens": 257 if second else 273,
    }
    if second:
        wanted["clip.vision.attention.head_count_kv"] = 2
    assert {key: file.keys.get(key) for key in wanted} == wanted
    text = open_gguf(made[second].text)
    assert text.keys["general.architecture"] == "deepseek2-ocr"
    assert "deepseek2-ocr.rope.freq_base" not in text.keys


def test_a_pair_is_verified(made: dict[bool, Made]) -> None:
    model = made[True]
    command = ["verify", model.text, "--against", model.folder, "--mmproj", model.projector]
    done = CliRunner().invoke(cli, [*map(str, command), "--windows", "1"])
    assert done.exit_code == 0, done.output
    assert "mmproj question" in done.output


def test_transformers_own_config_says_the_same(made: dict[bool, Made], tmp_path: Path) -> None:
    folder = tiny_ocr.checkpoint(tmp_path / "m", made[True].model, True, published=False)
    published = made[True].folder
    ours, theirs = (load_vision(place, load_config(place)) for place in (folder, published))
    assert (ours.vit, ours.sam, ours.dims) == (theirs.vit, theirs.sam, theirs.dims)
    first, second = (load_config(place) for place in (folder, published))
    assert (first.dims, first.experts) == (second.dims, second.experts)
    assert open_checkpoint(folder).shapes() == open_checkpoint(published).shapes()


def test_what_no_forward_pass_uses_is_left_out(made: dict[bool, Made]) -> None:
    """CLIP's own patches, which SAM's output stands for, are in the published file."""
    folder = made[False].folder
    vision, shapes = load_vision(folder, load_config(folder)), open_checkpoint(folder).shapes()
    unused = {"model.vision_model.embeddings.patch_embedding.weight": (64, 3, 14, 14)}
    specs = plan(vision.model.tables["DeepseekOCRForCausalLM"], vision, {**shapes, **unused})
    taken = {name for spec in specs for name in spec.names}
    decoder = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
    assert taken == {name for name in shapes if not name.startswith(decoder)}


FAULTS: dict[str, tuple[bool, dict[str, Any], str]] = {
    "another aligner": (False, {"projector_config": {"projector_type": "mlp_gelu"}}, "projector_config"),
    "no SAM": (False, {"vision_config": {"width": {}}}, "clip-l-14-224"),
    "latent attention": (True, {"language_config": {**tiny_ocr.TEXT, "use_mla": True}}, "use_mla"),
    "scaled experts": (
        True,
        {"language_config": {**tiny_ocr.TEXT, "routed_scaling_factor": 2.0}},
        "routed_scaling_factor",
    ),
    "other layers see all": (
        False,
        {"vision_config": {"width": {"clip-l-14-224": {}, "sam_vit_b": {"global_attn_indexes": [1]}}}},
        "global_attn_indexes",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    name: str, made: dict[bool, Made], tmp_path: Path
) -> None:
    second, changes, why = FAULTS[name]
    shutil.copytree(made[second].folder, tmp_path / "m")
    stated = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    tiny.write_json(tmp_path / "m" / "config.json", stated | changes)
    with pytest.raises(CheckpointError, match=why):
        list(convert(Options(str(tmp_path / "m"), ("f16",), tmp_path / "x.gguf", effort="off")))


def test_no_folder_is_made_of_it(made: dict[bool, Made], tmp_path: Path) -> None:
    asked = {"calib": "builtin", "out": tmp_path / "q"}
    with pytest.raises(UsageError, match="becomes no folder"):
        list(quantize(calibrated.gptq_options(made[False].folder, **asked)))
