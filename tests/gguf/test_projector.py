"""DeepSeek-VL to GGUF on tiny models: both layouts and sizes, the projector, faults, chat template, pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_vl
from click.testing import CliRunner
from rewrite import edited
from tiny_vl import VL

from converters.gguf.as_model import open_model
from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.gguf.projector import completeness
from converters.gguf.projector import keys as projector_keys
from converters.gguf.projector import proof as projector_proof
from converters.gguf.projector import verify as projector_verify
from converters.outputs import open_reference
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, PlanError, QuantizationError, UsageError
from dsconvert.events import Check, Event, Planned, Step, Warn
from dsconvert.models.config import load_config
from dsconvert.models.language_model import language_model
from dsconvert.models.tensor_table import expand, plan
from dsconvert.vision import config as vision_config

LAYOUTS: tuple[tiny_vl.Layout, ...] = ("original", "transformers", "transformers4")
SIZES = pytest.mark.parametrize("hybrid", [False, True], ids=["1.3B", "7B"])


@pytest.fixture(autouse=True)
def tiny_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vl.tiny_towers(monkeypatch)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], Path]:
    root = tmp_path_factory.mktemp("vl")
    return {
        (hybrid, layout): tiny_vl.vl_checkpoint(
            root / f"{layout}-{hybrid}" / "model", VL(hybrid=hybrid), layout
        )
        for hybrid in (False, True)
        for layout in LAYOUTS
    }


def run(model: Path, out: Path, **asked: Any) -> list[Event]:
    asked.setdefault("effort", "off")
    asked.setdefault("quants", ("f16",))
    return list(convert(Options(str(model), outfile=out, **asked)))


def copied(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a checkpoint; `changes` are JSON files by name without ending, each a dict to merge."""
    shutil.copytree(model, folder)
    for name, change in changes.items():
        path = folder / f"{name}.json"
        tiny.write_json(path, json.loads(path.read_text("utf-8")) | change)
    return folder


def reweighted(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy with tensors replaced by name, or left out where the value is None."""
    shutil.copytree(model, folder)
    source = open_checkpoint(model)
    stored = {name: np.array(source.tensors[name].data) for name in source.shapes()}
    for name, value in changes.items():
        stored.pop(name, None)
        if value is not None:
            stored[name] = value
    tiny_vl.write_weights(folder, stored)
    return folder


def names_in(config: Any) -> list[str]:
    import torch
    import transformers

    model_class = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        return sorted(model_class(config).state_dict())


@SIZES
def test_the_made_checkpoints_are_those_of_transformers(hybrid: bool, models: Any) -> None:
    from transformers import AutoConfig

    names = names_in(AutoConfig.from_pretrained(models[hybrid, "transformers"]))
    assert names == sorted(open_checkpoint(models[hybrid, "transformers"]).shapes())


def test_the_made_checkpoints_have_the_published_counts() -> None:
    """529 and 775 tensors in the original repositories, 612 and 854 in transformers' layout."""
    for hybrid, layers, counts in ((False, 24, (529, 612)), (True, 30, (775, 854))):
        o = tiny_vl.full(hybrid=hybrid, layers=layers, d=64, ff=64, heads=4)
        shapes = tiny_vl.shapes(o)
        empty = {name: np.zeros((3, 0) if "qkv" in name else (0,), np.float16) for name in shapes}
        assert (len(tiny_vl.original(empty, o)), len(shapes)) == counts


@SIZES
@pytest.mark.parametrize("quant", ["f16", "f32", "bf16", "q8_0"])
def test_all_layouts_give_the_same_files(hybrid: bool, quant: str, models: Any, tmp_path: Path) -> None:
    files = []
    for layout in LAYOUTS:
        out = tmp_path / f"{layout}.gguf"
        run(models[hybrid, layout], out, mmproj_quant=quant, mmproj=tmp_path / f"{layout}-mm.gguf")
        files.append((out.read_bytes(), (tmp_path / f"{layout}-mm.gguf").read_bytes()))
    assert files[0] == files[1] == files[2]


@SIZES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_tensor_is_in_a_file_or_named_as_unused(
    hybrid: bool, layout: str, models: Any, tmp_path: Path
) -> None:
    model = models[hybrid, layout]
    events = run(model, tmp_path / "out.gguf")
    planned = {t.source for e in events if isinstance(e, Planned) for t in e.tensors}
    left = set(open_checkpoint(model).shapes()) - planned
    if layout != "original":
        assert left == set()
        return
    assert all("attn_pool" in name or "_layer_norm" in name for name in left)
    assert len(left) == (17 if hybrid else 13)
    (said,) = [e.text for e in events if isinstance(e, Step) and "left out" in e.text]
    assert "13 of" in said
    assert "attn_pool" in said
    assert ("high_layer_norm" in said) == hybrid


@SIZES
def test_tensors_are_the_sources(hybrid: bool, models: Any, tmp_path: Path) -> None:
    """Against the numbers that transformers' names hold, read with the gguf library."""
    o = VL(hybrid=hybrid)
    stored = tiny_vl.tensors(o)
    run(models[hybrid, "original"], tmp_path / "out.gguf", mmproj_quant="f32")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "mmproj-out.gguf").tensors}
    pairs = {
        "v.patch_embd.weight": "model.vision_model.embeddings.patch_embedding.weight",
        "v.position_embd.weight": "model.vision_model.embeddings.position_embedding.weight",
        "v.post_ln.bias": "model.vision_model.post_layernorm.bias",
        "v.blk.1.attn_q.weight": "model.vision_model.encoder.layers.1.self_attn.q_proj.weight",
        "v.blk.1.attn_k.bias": "model.vision_model.encoder.layers.1.self_attn.k_proj.bias",
        "v.blk.0.attn_v.weight": "model.vision_model.encoder.layers.0.self_attn.v_proj.weight",
        "v.blk.0.attn_out.weight": "model.vision_model.encoder.layers.0.self_attn.out_proj.weight",
        "v.blk.0.ffn_up.weight": "model.vision_model.encoder.layers.0.mlp.fc1.weight",
        "v.blk.0.ffn_down.weight": "model.vision_model.encoder.layers.0.mlp.fc2.weight",
        "v.blk.0.ln2.weight": "model.vision_model.encoder.layers.0.layer_norm2.weight",
    }
    if hybrid:
        sam = "model.high_res_vision_model.vision_encoder."
        pairs |= {
            "mm.high.weight": "model.aligner.high_res_vision_proj.weight",
            "mm.low.bias": "model.aligner.vision_proj.bias",
            "mm.1.weight": "model.aligner.proj.weight",
            "v.sam.pos_embd.weight": sam + "pos_embed",
            "v.sam.blk.1.attn.qkv.weight": sam + "layers.1.attn.qkv.weight",
            "v.sam.blk.0.attn.pos_h.weight": sam + "layers.0.attn.rel_pos_h",
            "v.sam.blk.2.attn.pos_w.weight": sam + "layers.2.attn.rel_pos_w",
            "v.sam.blk.0.post_ln.weight": sam + "layers.0.layer_norm2.weight",
            "v.sam.neck.2.weight": sam + "neck.conv2.weight",
            "v.sam.neck_hd.0.weight": "model.high_res_vision_neck.conv1.weight",
            "v.sam.neck_hd.3.bias": "model.high_res_vision_neck.layer_norm2.bias",
            "v.sam.net_2.weight": "model.high_res_vision_proj.conv1.weight",
            "v.sam.net_3.weight": "model.high_res_vision_proj.conv2.weight",
            "v.sam.hd_alpha.weight": "model.high_res_vision_alpha",
        }
    else:
        pairs |= {"mm.0.weight": "model.aligner.linear1.weight", "mm.1.bias": "model.aligner.linear2.bias"}
    for name, source in pairs.items():
        value = tiny.decode(stored[source])
        assert tuple(reversed(found[name].shape)) == value.shape, name
        assert np.array_equal(found[name].data.reshape(value.shape), value), name


@SIZES
def test_types_of_the_projector(hybrid: bool, models: Any, tmp_path: Path) -> None:
    for quant, patches in (("f16", "f16"), ("bf16", "f32"), ("f32", "f32"), ("q8_0", "f16")):
        run(models[hybrid, "transformers"], tmp_path / "out.gguf", mmproj_quant=quant, force=True)
        file = open_gguf(tmp_path / "mmproj-out.gguf")
        types = {name: tensor.qtype.name for name, tensor in file.tensors.items()}
        assert types["v.blk.0.ffn_up.weight"] == types["mm.1.weight"] == quant
        assert types["v.patch_embd.weight"] == ("f32" if hybrid else patches)
        plain = [
            n for n in types if n.endswith("bias") or "ln" in n or "pos" in n or "neck" in n or "alpha" in n
        ]
        assert plain
        assert {types[name] for name in plain} == {"f32"}


def test_keys_of_the_small_projector(models: Any, tmp_path: Path) -> None:
    o = VL()
    run(models[False, "original"], tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "mmproj-out.gguf")
    for key, value in {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 1,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "janus_pro",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": o.d,
        "clip.vision.image_size": o.image,
        "clip.vision.patch_size": o.patch,
        "clip.vision.embedding_length": o.width,
        "clip.vision.feed_forward_length": o.mlp,
        "clip.vision.block_count": o.depth,
        "clip.vision.attention.head_count": o.tower_heads,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
        "dsconvert.image.token": "<image_placeholder>",
        "dsconvert.image.tokens": o.tokens,
        "dsconvert.image.pad_color": [127, 127, 127],
        "dsconvert.image.resample": "bicubic",
    }.items():
        assert reader.get_field(key).contents() == value, key
    text = gguf.GGUFReader(tmp_path / "out.gguf")
    assert text.get_field("general.architecture").contents() == "llama"
    for key in ("dsconvert.pairing_id", "dsconvert.image.token_id", "dsconvert.image.tokens"):
        assert reader.get_field(key).contents() == text.get_field(key).contents()
    ids = reader.get_field("dsconvert.image.token_id").contents()
    assert text.get_field("tokenizer.ggml.tokens").contents()[ids] == "<image_placeholder>"


def test_keys_of_the_hybrid_projector(models: Any, tmp_path: Path) -> None:
    o = VL(hybrid=True)
    run(models[True, "original"], tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "mmproj-out.gguf")
    for key, value in {
        "clip.projector_type": "deepseek_vl_hybrid",
        "clip.vision.image_size": o.sam_image,
        "clip.vision.image_mean": pytest.approx(tiny_vl.CLIP_MEAN),
        "clip.vision.image_std": pytest.approx(tiny_vl.CLIP_STD),
        "clip.vision.window_size": o.window,
        "clip.vision.sam.block_count": o.sam_depth,
        "clip.vision.sam.embedding_length": o.sam_width,
        "clip.vision.sam.head_count": o.sam_heads,
        "clip.vision.sam.global_attn_indexes": list(o.global_layers),
        "clip.vision.low_res.image_size": o.image,
        "clip.vision.low_res.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.low_res.norm_folded": False,
        "dsconvert.image.pad_color": [122, 116, 104],
    }.items():
        assert reader.get_field(key).contents() == value, key


def test_what_no_runtime_can_do_is_said_at_the_end(models: Any, tmp_path: Path) -> None:
    events = run(models[True, "transformers"], tmp_path / "out.gguf", effort="quick")
    assert isinstance(events[-1], Warn)
    assert "cannot read this projector" in events[-1].text
    small = run(models[False, "transformers"], tmp_path / "small.gguf", effort="quick")
    assert not any(isinstance(e, Warn) and "cannot read" in e.text for e in small)


@SIZES
def test_the_proof_passes_and_covers_the_projector(hybrid: bool, models: Any, tmp_path: Path) -> None:
    events = run(models[hybrid, "original"], tmp_path / "out.gguf", effort="quick", quants=("q8_0",))
    checks = {e.name: e for e in events if isinstance(e, Check)}
    assert all(check.passed for check in checks.values())
    assert {"mean KLD", "mmproj structure", "mmproj tensors", "mmproj weights", "mmproj pair"} <= set(checks)
    assert {"mmproj images", "mmproj question"} <= set(checks)


def test_text_file_is_the_plain_llama_model_inside(models: Any, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        source = open_checkpoint(models[False, layout])
        inner, config = language_model(source, load_config(source.folder))
        assert (config.architecture, config.tied) == ("LlamaForCausalLM", False)
        run(models[False, layout], tmp_path / f"{layout}.gguf", quants=("f32",), no_mmproj=True)
        back = open_model(open_gguf(tmp_path / f"{layout}.gguf"))
        assert set(back.shapes()) == set(inner.shapes())
        for name in back.shapes():
            assert np.array_equal(back.float32(name), inner.float32(name)), name
            assert inner.dtype(name) == "f16"


def test_names_and_options_of_the_projector(models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = models[False, "transformers"]
    run(model, tmp_path / "a.gguf")
    assert (tmp_path / "mmproj-a.gguf").is_file()
    run(model, tmp_path / "b.gguf", no_mmproj=True)
    assert not (tmp_path / "mmproj-b.gguf").exists()
    (tmp_path / "else").mkdir()
    run(model, tmp_path / "c.gguf", mmproj=tmp_path / "else" / "p.gguf", quants=("f16", "q8_0"))
    assert sorted(path.name for path in tmp_path.glob("*c*")) == ["c-f16.gguf", "c-q8_0.gguf"]
    assert (tmp_path / "else" / "p.gguf").is_file()
    monkeypatch.chdir(tmp_path / "else")
    list(convert(Options(str(model), quants=("f16", "q8_0"), effort="off")))
    assert {p.name for p in Path().iterdir()} >= {
        "model-f16.gguf",
        "model-q8_0.gguf",
        "mmproj-model-f16.gguf",
    }
    with pytest.raises(UsageError, match="contradict"):
        run(model, tmp_path / "d.gguf", no_mmproj=True, mmproj=tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="file of its own"):
        run(model, tmp_path / "d.gguf", mmproj=tmp_path / "d.gguf")
    plain = tiny.tiny_checkpoint(tmp_path / "plain")
    with pytest.raises(UsageError, match="no vision tower"):
        run(plain, tmp_path / "d.gguf", mmproj=tmp_path / "x.gguf")
    assert not list(tmp_path.glob("d*"))


def test_both_files_appear_or_none(models: Any, tmp_path: Path) -> None:
    """A value in the tower that float16 cannot hold stops the whole conversion, and says what to do."""
    name = "model.vision_model.encoder.layers.1.mlp.fc2.weight"
    source = open_checkpoint(models[False, "transformers"])
    tensors = {n: source.float32(n) for n in source.shapes()}
    tensors[name][3, 5] = 1e6
    folder = tmp_path / "m"
    shutil.copytree(models[False, "transformers"], folder)
    tiny_vl.write_weights(folder, tensors)
    with pytest.raises(QuantizationError, match=f"{name}.*--mmproj-quant bf16 or f32"):
        run(folder, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
    run(folder, tmp_path / "out.gguf", mmproj_quant="bf16", quants=("bf16",))


def test_the_proof_fails_on_another_projector(models: Any, tmp_path: Path) -> None:
    """Held against another checkpoint's towers, or with another number of heads, the same check must fail."""
    run(models[False, "original"], tmp_path / "out.gguf", mmproj_quant="f32")
    text, projector = tmp_path / "out.gguf", tmp_path / "mmproj-out.gguf"

    def proof(model: Path, projector: Path) -> dict[str, bool]:
        pictured = projector_verify.with_towers(open_reference(str(model)))
        assert pictured is not None
        limit = projector_proof.limit_of("f16", "f32")
        events = projector_proof.prove_pair(pictured, open_gguf(projector), [(open_gguf(text), limit)])
        return {e.name: e.passed for e in events if isinstance(e, Check)}

    assert all(proof(models[False, "transformers"], projector).values())
    other = tiny_vl.vl_checkpoint(tmp_path / "other", VL(seed=1))
    failed = {name for name, passed in proof(other, projector).items() if not passed}
    assert failed == {"weights", "images", "question"}
    good = open_gguf(projector)
    shifted = edited(good, tmp_path / "bad.gguf", {"clip.vision.attention.head_count": ("uint32", 1)})
    failed = {name for name, passed in proof(models[False, "original"], shifted).items() if not passed}
    assert "images" in failed
    with pytest.raises(UsageError, match="no vision tower"):
        list(projector_verify.prove_projector(open_reference("sample:"), projector))


# Contradictions and missing files.

IMAGE = "preprocessor_config"
FAULTS: dict[str, tuple[bool, tiny_vl.Layout, dict[str, Any], str]] = {
    "size of the picture": (False, "original", {IMAGE: {"image_size": 128}}, "image_size.*64.*128"),
    "number of tokens": (False, "transformers", {"processor_config": {"num_image_tokens": 99}}, "16.*99"),
    "size, transformers": (
        False,
        "transformers",
        {IMAGE: {"size": {"height": 32, "width": 32}}},
        "image_size",
    ),
    "size of the big picture": (
        True,
        "transformers",
        {IMAGE: {"high_res_size": {"height": 32, "width": 32}}},
        "big picture",
    ),
    "size of the big picture, original": (True, "original", {IMAGE: {"image_size": 128}}, "128"),
    "normalised twice": (True, "original", {IMAGE: {"do_normalize": True}}, "do_normalize"),
    "not normalised": (False, "original", {IMAGE: {"do_normalize": False}}, "do_normalize"),
    "another prompt format": (False, "original", {"processor_config": {"sft_format": "plain"}}, "plain"),
    "another rescaling": (False, "transformers", {IMAGE: {"rescale_factor": 0.5}}, "rescale"),
    "mean of two": (False, "transformers", {IMAGE: {"image_mean": [0.5, 0.5]}}, "image_mean"),
    "mean that is text": (False, "original", {IMAGE: {"image_mean": "0.5"}}, "image_mean"),
    "unknown image tag": (False, "original", {"processor_config": {"image_tag": "<nothing>"}}, "<nothing>"),
    "wrong image token": (False, "transformers", {"config": {"image_token_id": 7}}, "not a special token"),
    "no decoder": (False, "transformers", {"config": {"text_config": None}}, "text_config"),
    "another decoder": (False, "transformers", {"config": {"text_config": {"model_type": "qwen2"}}}, "qwen2"),
    "another tower": (
        False,
        "transformers",
        {"config": {"vision_config": {"model_type": "clip_vision_model"}}},
        "siglip_vision_model",
    ),
    "tower unknown by name": (
        False,
        "original",
        {"config": {"vision_config": {"params": {"model_name": "siglip_so400m_patch14_384"}}}},
        "siglip_so400m.*transformers' layout",
    ),
    "JanusFlow": (False, "original", {"config": {"vision_und_enc_config": {}}}, "JanusFlow"),
    "Janus without its tokens": (False, "original", {"config": {"gen_vision_config": {}}}, "begin_of_image"),
    "odd heads": (
        False,
        "transformers",
        {"config": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 5}}},
        "do not fit each other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_contradictions_are_errors(name: str, models: Any, tmp_path: Path) -> None:
    hybrid, layout, changes, message = FAULTS[name]
    folder = copied(models[hybrid, layout], tmp_path / "m", **changes)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        run(folder, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf"))


ODD: tuple[Any, ...] = (None, "x", -1, 0, 10**30, 0.5, float("inf"), True, [], [1], {}, {"a": 1})


def paths_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a JSON object, as the way to it."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from paths_in(inner, (*path, key))


def with_value(value: Any, path: tuple[str, ...], odd: Any) -> Any:
    return value | {path[0]: odd if len(path) == 1 else with_value(value[path[0]], path[1:], odd)}


@SIZES
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_odd_values_are_errors_or_harmless(hybrid: bool, layout: str, tmp_path: Path) -> None:
    """Any value in any place of the three files: understood or refused, never an accident."""
    o = VL(hybrid=hybrid)
    files = tiny_vl.original_files(o) if layout == "original" else tiny_vl.transformers_files(o)
    for name, value in files.items():
        tiny.write_json(tmp_path / name, value)
    refused = tried = 0
    for name, value in files.items():
        for path in paths_in(value):
            for odd in ODD:
                tiny.write_json(tmp_path / name, with_value(value, path, odd))
                tried += 1
                try:
                    vision_config.load_vision(tmp_path, load_config(tmp_path)).dims  # noqa: B018
                except CheckpointError:
                    refused += 1
        tiny.write_json(tmp_path / name, value)
    vision_config.load_vision(tmp_path, load_config(tmp_path))
    assert tried > 400
    assert refused > tried / 4


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_missing_processor_files_are_named(layout: str, file: str, models: Any, tmp_path: Path) -> None:
    folder = copied(models[False, layout], tmp_path / "m")
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        run(folder, tmp_path / "out.gguf")


def test_transformers_5_writes_one_processor_file(models: Any, tmp_path: Path) -> None:
    folder = copied(models[True, "transformers"], tmp_path / "model")
    image = json.loads((folder / "preprocessor_config.json").read_text())
    chat = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    tiny.write_json(folder / "processor_config.json", chat | {"image_processor": image})
    run(folder, tmp_path / "a.gguf")
    run(models[True, "transformers"], tmp_path / "b.gguf")
    assert (tmp_path / "mmproj-a.gguf").read_bytes() == (tmp_path / "mmproj-b.gguf").read_bytes()


def test_unusual_pixels_are_a_warning(models: Any, tmp_path: Path) -> None:
    folder = copied(models[False, "original"], tmp_path / "m", preprocessor_config={"image_mean": [0.4] * 3})
    events = run(folder, tmp_path / "out.gguf")
    assert any(isinstance(e, Warn) and "0.4" in e.text and "SigLIP" in e.text for e in events)


WRONG_TENSORS: dict[str, tuple[tiny_vl.Layout, str, Any, str]] = {
    "fused qkv of odd height": (
        "original",
        "vision_model.vision_tower.blocks.0.attn.qkv.weight",
        np.zeros((97, 32), np.float16),
        r"\[97, 32\].*\[96, 32\]",
    ),
    "no position embedding": ("original", "vision_model.vision_tower.pos_embed", None, "pos_embed"),
    "no patch bias": (
        "transformers",
        "model.vision_model.embeddings.patch_embedding.bias",
        None,
        "patch_embedding.bias",
    ),
    "another tower size": (
        "transformers",
        "model.vision_model.embeddings.position_embedding.weight",
        np.zeros((25, 32), np.float16),
        r"\[25, 32\]",
    ),
    "unknown tensor of the tower": (
        "transformers",
        "model.vision_model.extra.weight",
        np.zeros((4,), np.float16),
        "extra",
    ),
    "unknown tensor": ("original", "gen_head.weight", np.zeros((4,), np.float16), "gen_head"),
    "no head": ("original", "language_model.lm_head.weight", None, "lm_head"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_named(name: str, models: Any, tmp_path: Path) -> None:
    layout, tensor, value, message = WRONG_TENSORS[name]
    folder = reweighted(models[False, layout], tmp_path / "m", **{tensor: value})
    with pytest.raises(PlanError, match=f"(?s){message}"):
        run(folder, tmp_path / "out.gguf", no_mmproj=True)


def test_a_model_tied_by_default_may_have_no_head(models: Any, tmp_path: Path) -> None:
    folder = reweighted(models[False, "transformers"], tmp_path / "m", **{"lm_head.weight": None})
    run(folder, tmp_path / "out.gguf")
    assert "output.weight" not in open_gguf(tmp_path / "out.gguf").tensors


def test_plans_leave_nothing_unexplained(models: Any) -> None:
    """The decoder's plan alone does not accept what the towers' plan does not know, and the other way."""
    source = open_checkpoint(models[True, "original"])
    config = load_config(source.folder)
    view = vision_config.load_vision(source.folder, config)
    arch = view.model.tables[config.architecture]
    assert len(plan(arch, view, source.shapes())) == 103
    with pytest.raises(PlanError, match="surprise"):
        plan(arch, view, source.shapes() | {"surprise.weight": (1,)})


# Silent failures, pairs, inspect.


SILENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "no use_gelu": ({"clip.use_gelu": None}, "", "activation"),
    "use_gelu false": ({"clip.use_gelu": ("bool", False)}, "", "activation"),
    "no post_ln": ({}, "v.post_ln.weight", "tensors"),
    "no patch bias": ({}, "v.patch_embd.bias", "tensors"),
    "no position embedding": ({}, "v.position_embd.weight", "tensors"),
    "wrong mean": ({"clip.vision.image_mean": ("array:float32", [0.48, 0.45, 0.41])}, "", "pixels"),
    "wrong std": ({"clip.vision.image_std": ("array:float32", [0.26, 0.26, 0.27])}, "", "pixels"),
    "no mean": ({"clip.vision.image_mean": None}, "", "pixels"),
    "wrong projector": ({"clip.projector_type": ("string", "mlp")}, "", "projector"),
    "too few blocks": ({"clip.vision.block_count": ("uint32", 1)}, "", "tensors"),
    "no eps": ({"clip.vision.attention.layer_norm_epsilon": None}, "", "tensors"),
}


@pytest.mark.parametrize("name", SILENT)
def test_silent_failures_are_found(name: str, models: Any, tmp_path: Path) -> None:
    keys, drop, check = SILENT[name]
    run(models[False, "original"], tmp_path / "out.gguf")
    good = open_gguf(tmp_path / "mmproj-out.gguf")
    assert all(c.passed for c in completeness.completeness(good))
    command = ["verify", str(good.path), "--against", str(models[False, "original"])]
    assert CliRunner().invoke(cli, command).exit_code == 0
    bad = edited(good, tmp_path / "bad.gguf", keys, drop)
    assert check in {c.name for c in completeness.completeness(open_gguf(bad)) if not c.passed}
    for command in (["inspect", str(bad)], ["verify", str(bad), "--against", str(models[False, "original"])]):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 3, result.output
        assert "FAIL" in result.output


@pytest.mark.parametrize(
    "drop", ["v.sam.neck_hd.0.weight", "v.sam.hd_alpha.weight", "mm.low.bias", "v.sam.net_3.weight"]
)
def test_silent_failures_of_the_hybrid_are_found(drop: str, models: Any, tmp_path: Path) -> None:
    run(models[True, "original"], tmp_path / "out.gguf")
    good = open_gguf(tmp_path / "mmproj-out.gguf")
    bad = edited(good, tmp_path / "bad.gguf", {}, drop)
    assert "tensors" in {c.name for c in completeness.completeness(open_gguf(bad)) if not c.passed}
    keys = {"clip.vision.low_res.image_mean": ("array:float32", [0.1] * 3)}
    bad = edited(good, tmp_path / "bad.gguf", keys)
    assert [c.name for c in completeness.completeness(open_gguf(bad)) if not c.passed] == ["pixels"]


def test_pairs(models: Any, tmp_path: Path) -> None:
    run(models[False, "original"], tmp_path / "a.gguf")
    other = tiny_vl.vl_checkpoint(tmp_path / "other", VL(seed=1))
    run(other, tmp_path / "b.gguf")
    wide = tiny_vl.vl_checkpoint(tmp_path / "wide", VL(d=128))
    run(wide, tmp_path / "w.gguf")

    def inspect(*names: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["inspect", *(str(tmp_path / name) for name in names)])
        return result.exit_code, result.output

    code, said = inspect("a.gguf", "mmproj-a.gguf")
    assert code == 0
    assert "ok    pair" in said
    assert inspect("mmproj-a.gguf", "a.gguf")[0] == 0
    code, said = inspect("a.gguf", "mmproj-b.gguf")
    assert code == 3
    assert "not a pair, because their pairing ids differ" in said
    code, said = inspect("a.gguf", "mmproj-w.gguf")
    assert code == 3
    assert "128 values" in said
    assert inspect("mmproj-a.gguf", "mmproj-b.gguf")[0] == 3
    assert inspect("a.gguf", "b.gguf")[0] == 0  # two language models are simply shown
    assert projector_keys.is_projector(open_gguf(tmp_path / "mmproj-a.gguf"))


def test_dry_run_shows_both_files(models: Any, tmp_path: Path) -> None:
    events = run(models[True, "original"], tmp_path / "out.gguf", dry_run=True)
    planned = [e for e in events if isinstance(e, Planned)]
    assert [Path(e.outputs[0]).name for e in planned] == ["out.gguf", "mmproj-out.gguf"]
    assert list(tmp_path.iterdir()) == []
    run(models[True, "original"], tmp_path / "out.gguf")
    assert [e.nbytes[0] for e in planned] == [
        (tmp_path / name).stat().st_size for name in ("out.gguf", "mmproj-out.gguf")
    ]


def test_progress_counts_fused_tensors_once(models: Any, tmp_path: Path) -> None:
    from dsconvert.events import TensorDone

    done = [e for e in run(models[True, "original"], tmp_path / "out.gguf") if isinstance(e, TensorDone)]
    assert done[-1].done == done[-1].total


def test_the_embedded_sample_with_pictures(tmp_path: Path) -> None:
    events = list(convert(Options("sample-vl:", ("q8_0",), tmp_path / "s.gguf", effort="quick")))
    checks = {e.name: e for e in events if isinstance(e, Check)}
    assert all(check.passed for check in checks.values())
    assert {"mean KLD", "mmproj images", "mmproj pair"} <= set(checks)
    run(Path("sample:"), tmp_path / "plain.gguf", quants=("q8_0",))
    ours, plain = open_gguf(tmp_path / "s.gguf"), open_gguf(tmp_path / "plain.gguf")
    for name, tensor in plain.tensors.items():
        assert np.array_equal(tensor.blocks(), ours.tensors[name].blocks()), name
    tokens = [file.keys["tokenizer.ggml.tokens"] for file in (ours, plain)]
    changed = [i for i, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b]
    assert changed == [ours.keys["dsconvert.image.token_id"]] == [2015]


# The numbers of the published configs, of which the decoder's part is partial.

PUBLISHED = {
    False: ("1.3B", (2048, 5632, 24, 16, 102400, 16384), {"hidden_size": 2048, "intermediate_size": 5632,
            "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16}),
    True: ("7B", (4096, 11008, 30, 32, 102400, 16384), {"num_hidden_layers": 30}),
}  # fmt: skip


@SIZES
def test_published_configs(hybrid: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real towers
    _, numbers, language = PUBLISHED[hybrid]
    o = tiny_vl.full(hybrid=hybrid, d=numbers[0])
    files = tiny_vl.original_files(o)
    common = {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "torch_dtype": "float16",
        "vocab_size": 102400,
    }
    files["config.json"]["language_config"] = language | common
    for name, value in files.items():
        tiny.write_json(tmp_path / name, value)
    config = load_config(tmp_path)
    found = (config.hidden_size, config.intermediate_size, config.layers, config.heads, config.vocab_size)
    assert (*found, config.context_length) == numbers
    assert (config.kv_heads, config.norm_eps, config.rope_theta, config.tied) == (
        config.heads,
        1e-6,
        1e4,
        False,
    )
    view = vision_config.load_vision(tmp_path, config)
    low = view.vit
    assert (low.width, low.mlp, low.layers, low.heads, low.patch_size) == (1024, 4096, 24, 16, 16)
    assert (low.image_size, low.eps, view.tokens, view.projection) == (384, 1e-6, 576, numbers[0])
    assert low.pixels.mean == low.pixels.std == (0.5, 0.5, 0.5)
    if hybrid:
        high = view.sam
        assert high is not None
        assert (high.width, high.mlp, high.layers, high.heads, high.window) == (768, 3072, 12, 12, 14)
        assert (high.image_size, high.global_layers, high.channels) == (1024, (2, 5, 8, 11), 256)
        assert high.pixels.mean == tuple(tiny_vl.CLIP_MEAN)
        assert view.processor.pad == (122, 116, 104)
        dims = view.dims
        assert [dims[f"rel.{i}"] for i in high.global_layers] == [127] * 4
        assert dims["rel"] == 27
    else:
        assert view.sam is None
        assert view.processor.pad == (127, 127, 127)
    arch = view.model.tables[config.architecture]
    assert len(expand(arch, view)) == (581 if hybrid else 393)
