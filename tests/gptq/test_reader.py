"""The GPTQ reader on other tools' folders and on folders of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peer_models import needs, perplexity_of
from tiny import tiny_checkpoint, write_json

from converters.gptq.pack import Packed, dequantize, pack
from converters.gptq.reader import open_model
from converters.gptq.settings import quantization_settings
from converters.gptq.shapes import Layout
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.output_folder import write_folder
from dsconvert.checkpoints.safetensors_writer import from_array, from_stored, write_safetensors
from dsconvert.errors import CheckpointError
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.config import load_config, load_json
from dsconvert.models.tensor_table import plan
from dsconvert.quantization.gptq_grid import Scheme

LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "perplexity", "least", "most"),
    # relative errors: gptqmodel spreads them by its Hessian, auto-round rounds near the weights
    [("gptq_gptqmodel_4b_g128", 46.973, 0.12, 0.15), ("gptq_autoround_4b_g128", 46.974, 0.095, 0.115)],
)
def test_reads_other_tools_folders(name: str, perplexity: float, least: float, most: float) -> None:
    source, model = open_checkpoint(needs("tiny256")), open_model(needs(name))
    config = load_config(model.folder)
    assert model.shapes() == source.shapes()
    plan(ARCHITECTURES[config.architecture].table, config, model.shapes())
    weights = {name: model.float32(name) for name in model.shapes()}
    for tensor, values in weights.items():
        original = source.float32(tensor)
        error = np.linalg.norm(values - original) / np.linalg.norm(original)
        if model.dtype(tensor) == "gptq4":
            assert least < error < most, tensor
        else:
            assert error < 2**-8, tensor
    assert sum(model.dtype(tensor) == "gptq4" for tensor in weights) == 28
    assert perplexity_of(weights) == pytest.approx(perplexity, abs=0.02)


def folder_of(
    path: Path, bits: int = 4, group: int = 32, form: str = "gptq", scramble: bool = False
) -> tuple[Path, Packed, Path]:
    """A tiny model with one linear of random codes in a GPTQ folder: the folder, the linear, the source."""
    source = tiny_checkpoint(path / "source", layers=1, tokenizer=False)
    rng = np.random.default_rng(bits)
    groups = 1 if group == -1 else 64 // group
    g_idx = (np.arange(64) * groups // 64).astype(np.int32)
    packed = pack(
        rng.integers(0, 1 << bits, (64, 64)).astype(np.uint8),
        rng.uniform(0.01, 0.1, (groups, 64)).astype(np.float16),
        rng.integers(1, 1 << bits, (groups, 64)).astype(np.uint8),
        rng.permutation(g_idx) if scramble else g_idx,
        bits,
        form,
    )
    stored = open_checkpoint(source).tensors
    pieces = {n: from_stored(t) for n, t in stored.items() if n != f"{LINEAR}.weight"}
    pieces |= {n: from_array(a) for n, a in packed.tensors(LINEAR).items()}
    settings = quantization_settings(Layout(Scheme(bits, group, False), scramble, form), 0.01)
    write_folder(
        path / "out",
        source,
        load_json(source / "config.json"),
        pieces,
        settings,
        extra={"quantize_config.json": settings},
    )
    return path / "out", packed, source


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "scramble"), [(32, False), (32, True), (-1, False)])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_reads_every_kind(tmp_path: Path, bits: int, group: int, scramble: bool, form: str) -> None:
    folder, packed, source = folder_of(tmp_path, bits, group, form, scramble)
    model, original = open_model(folder), open_checkpoint(source)
    assert model.shapes() == original.shapes()
    assert model.dtype(f"{LINEAR}.weight") == f"gptq{bits}"
    np.testing.assert_array_equal(model.float32(f"{LINEAR}.weight"), dequantize(packed, bits, form))
    for name in original.shapes():
        if name != f"{LINEAR}.weight":
            assert model.dtype(name) == "bf16"
            np.testing.assert_array_equal(model.float32(name), original.float32(name))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the stored tensors of a folder; `change` gets the pieces by name."""
    path = folder / "model.safetensors"
    pieces = {name: from_stored(stored) for name, stored in open_model(folder).checkpoint.tensors.items()}
    change(pieces)
    write_safetensors(folder / "new.safetensors", pieces)
    (folder / "new.safetensors").rename(path)


def test_groups_are_runs_where_g_idx_is_left_out(tmp_path: Path) -> None:
    folder, packed, _ = folder_of(tmp_path)
    rewrite(folder, lambda pieces: pieces.pop(f"{LINEAR}.g_idx"))
    np.testing.assert_array_equal(open_model(folder).float32(f"{LINEAR}.weight"), dequantize(packed, 4))


def test_settings_may_be_in_the_legacy_file_only(tmp_path: Path) -> None:
    folder, packed, _ = folder_of(tmp_path)
    config = load_json(folder / "config.json")
    del config["quantization_config"]
    write_json(folder / "config.json", config)
    np.testing.assert_array_equal(open_model(folder).float32(f"{LINEAR}.weight"), dequantize(packed, 4))
    (folder / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match="quantization_config"):
        open_model(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": ["gptq"]}, "known kind"),
        ({"bits": 5}, "5 bits"),
        ({"bits": "4"}, "whole number"),
        ({"bits": True}, "whole number"),
        ({"group_size": 0}, "group 0"),
        ({"group_size": None}, "whole number"),
        ({"bits": 8}, "contradicts"),
        ({"bits": 3}, "contradicts"),
        ({"group_size": 64}, "contradicts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder, _, _ = folder_of(tmp_path)
    config = load_json(folder / "config.json")
    config["quantization_config"] |= change
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=words):
        open_model(folder)


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    folder, _, _ = folder_of(tmp_path)
    rewrite(folder, lambda pieces: pieces.pop(f"{LINEAR}.{part}"))
    with pytest.raises(CheckpointError, match=f"no {part}"):
        open_model(folder)


@pytest.mark.parametrize(
    ("part", "array"),
    [
        ("g_idx", np.zeros(32, np.int32)),
        ("g_idx", np.zeros(64, np.float32)),
        ("scales", np.ones((3, 64), np.float16)),
        ("scales", np.ones((2, 64), np.int32)),
        ("qzeros", np.zeros((2, 9), np.int32)),
        ("qweight", np.zeros((8, 48), np.int32)),
        ("qweight", np.zeros((7, 64), np.int32)),
        ("qweight", np.zeros((0, 64), np.int32)),
    ],
)
def test_a_part_of_another_shape_or_type_is_refused(tmp_path: Path, part: str, array: Any) -> None:
    folder, _, _ = folder_of(tmp_path)
    rewrite(folder, lambda pieces: pieces.update({f"{LINEAR}.{part}": from_array(array)}))
    with pytest.raises(CheckpointError, match=LINEAR):
        open_model(folder)


@pytest.mark.parametrize(
    ("part", "array", "words"),
    [
        ("g_idx", np.full(64, 2, np.int32), "2 groups"),
        ("g_idx", np.full(64, -1, np.int32), "from -1"),
        ("scales", np.full((2, 64), np.nan, np.float16), "finite"),
        ("qzeros", np.full((2, 8), -1, np.int32), "two ways"),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path: Path, part: str, array: Any, words: str) -> None:
    folder, _, _ = folder_of(tmp_path)
    rewrite(folder, lambda pieces: pieces.update({f"{LINEAR}.{part}": from_array(array)}))
    model = open_model(folder)
    with pytest.raises(CheckpointError, match=words):
        model.float32(f"{LINEAR}.weight")


def test_a_zero_point_of_all_ones_is_plain_in_the_second_format(tmp_path: Path) -> None:
    folder, _, _ = folder_of(tmp_path, form="gptq_v2")
    ones = np.full((2, 8), -1, np.int32)
    rewrite(folder, lambda pieces: pieces.update({f"{LINEAR}.qzeros": from_array(ones)}))
    assert open_model(folder).float32(f"{LINEAR}.weight").max() <= 0


def test_a_folder_without_quantized_linears_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", layers=1, tokenizer=False)
    with pytest.raises(CheckpointError, match="quantization_config"):
        open_model(source)
    config = load_json(source / "config.json")
    config["quantization_config"] = quantization_settings(Layout(Scheme()), 0.01)
    write_json(source / "config.json", config)
    with pytest.raises(CheckpointError, match="qweight"):
        open_model(source)
