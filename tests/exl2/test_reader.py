"""The EXL2 reader on exllamav2's own folder and on folders of every kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from peer_models import needs, perplexity_of
from tiny import Tiny, tiny_checkpoint, tiny_config, tiny_tensors, write_json

from converters.exl2.pack import PARTS, Packed, dequantize, pack
from converters.exl2.reader import bits_taken, open_model, per_weight, width_of
from converters.exl2.settings import HEADS, SETTINGS, Setting, bits_of, groups_for
from converters.outputs import open_output
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.safetensors_writer import from_array, write_safetensors
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.config import load_config
from dsconvert.models.tensor_table import plan
from dsconvert.proof.sources import limits_name
from dsconvert.proof.thresholds import LIMITS, SNR_FLOOR

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
TINY = Tiny(layers=1, ff=192, vocab=499, bias=True, tokenizer=False, dtype="f16")  # a head to be padded
MIXES = {
    "lowest": SETTINGS["down"][0],
    "hot rows": SETTINGS["down"][8],
    "even": Setting((4,), (100,), (128,)),
    "narrow groups": Setting((5, 3), (30, 70), (32, 64)),
    "eight": HEADS[8],
}


def test_reads_exllamav2s_own_folder() -> None:
    source, model = open_checkpoint(needs("tiny256")), open_model(needs("exl2_4.2bpw"))
    config = load_config(model.folder)
    assert model.shapes() == source.shapes()
    plan(ARCHITECTURES[config.architecture].table, config, model.shapes())
    weights = {name: model.float32(name) for name in model.shapes()}
    for tensor, values in weights.items():
        original = source.float32(tensor)
        error = np.linalg.norm(values - original) / np.linalg.norm(original)
        least, most = {"exl2_4": (0.08, 0.15), "exl2_6": (0.005, 0.02)}.get(model.dtype(tensor), (0, 2**-10))
        assert least <= error < most, tensor
    assert sum(model.dtype(tensor).startswith("exl2") for tensor in weights) == 29
    assert per_weight(model) == pytest.approx(4.22, abs=0.005)  # as its config states
    assert perplexity_of(weights) == pytest.approx(46.980, abs=0.002)


def test_verify_and_compare_take_an_exl2_folder(tmp_path: Path) -> None:
    source, folder = needs("tiny256"), shutil.copytree(needs("exl2_4.2bpw"), tmp_path / "model")
    folder.chmod(0o755)
    for path in source.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    opened = open_output(folder)
    assert (opened.kind, opened.quant, limits_name(opened)) == ("EXL2", "exl2-4.22bpw-h6", "exl2_4")
    stored = sum(t.nbytes for t in open_model(folder).checkpoint.tensors.values())
    assert sum(size.nbytes for size in opened.sizes) == stored == opened.nbytes
    ask = ["--against", str(source), "--windows", "2"]
    result = CliRunner().invoke(cli, ["verify", str(folder), *ask, "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {size["type"] for size in found["sizes"]} == {"exl2_4", "exl2_6", "f16"}
    assert 0 < found["figures"]["kld"]["value"] < 0.01
    result = CliRunner().invoke(cli, ["compare", str(folder), *ask])
    assert result.exit_code == 0, result.output
    assert "exl2-4.22bpw-h6" in result.output


def test_every_exl2_width_has_limits() -> None:
    for table in (LIMITS, SNR_FLOOR):
        assert {f"exl2_{bits}" for bits in (2, 3, 4, 5, 6, 8)} <= set(table)


def folder_of(path: Path, setting: Setting = MIXES["hot rows"]) -> dict[str, Packed]:
    """A tiny model with three linears of random codes, one of them a padded head, in an EXL2 folder."""
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {n: a.astype(np.float16) for n, a in tiny_tensors(TINY).items()}
    rng = np.random.default_rng(0)
    packed: dict[str, Packed] = {}
    for linear in (Q, DOWN, "lm_head"):
        outputs, inputs = tensors.pop(f"{linear}.weight").shape
        groups = groups_for(inputs, setting)
        packed[linear] = pack(
            np.concatenate([rng.integers(0, 1 << b, (n, outputs)) for b, n in groups]).astype(np.uint8),
            groups,
            rng.integers(0, 16, (len(groups), outputs)).astype(np.uint8),
            rng.uniform(0.01, 0.1, len(groups)).astype(np.float16),
            rng.permutation(inputs),
        )
        tensors |= packed[linear].tensors(linear)
    save(path, tensors)
    settings = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 4}
    write_json(path / "config.json", tiny_config(TINY) | {"quantization_config": settings})
    return packed


def save(folder: Path, tensors: dict[str, Any], name: str = "output.safetensors") -> None:
    write_safetensors(folder / "new", {n: from_array(np.asarray(a)) for n, a in tensors.items()})
    (folder / "new").rename(folder / name)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the stored tensors of a folder; `change` gets the arrays by name."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "output.safetensors")
    change(tensors)
    save(folder, tensors)


@pytest.mark.parametrize("mix", MIXES)
def test_reads_every_kind(tmp_path: Path, mix: str) -> None:
    packed = folder_of(tmp_path, MIXES[mix])
    model, original = open_model(tmp_path), tiny_tensors(TINY)
    assert model.shapes() == {name: values.shape for name, values in original.items()}
    for name, values in original.items():
        linear = name.removesuffix(".weight")
        if linear in packed:
            assert model.dtype(name) == f"exl2_{width_of(model.linears[linear].settings.groups)}"
            values = dequantize(packed[linear], len(values))  # noqa: PLW2901
        else:
            assert model.dtype(name) == "f16"
            values = values.astype(np.float16).astype(np.float32)  # noqa: PLW2901
        np.testing.assert_array_equal(model.float32(name), values)
        for start, stop in ((0, 1), (3, 9), (8, 16), (5, len(values)), (len(values), len(values))):
            np.testing.assert_array_equal(model.rows(name, start, stop), values[start:stop])
    one = model.linears["lm_head"]
    assert (one.outputs, one.inputs) == (499, 64)
    assert bits_taken(one) == 8 * sum(a.nbytes for a in packed["lm_head"].tensors("lm_head").values())
    decoder = [model.linears[name] for name in (Q, DOWN)]
    costs = [bits_of(one.inputs, one.outputs, one.settings.groups, bias=True) for one in decoder]
    assert per_weight(model) == sum(costs) / sum(one.inputs * one.outputs for one in decoder)


def test_a_padded_bias_is_cut(tmp_path: Path) -> None:
    folder_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    bias = np.arange(512, dtype=np.float16)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.bias": bias}))
    model = open_model(tmp_path)
    assert model.shapes()["lm_head.bias"] == (499,)
    np.testing.assert_array_equal(model.float32("lm_head.bias"), bias[:499])
    config["vocab_size"] = 512  # what pads and what counts is the config's word
    write_json(tmp_path / "config.json", config)
    assert open_model(tmp_path).shapes()["lm_head.bias"] == (512,)
    assert open_model(tmp_path).shapes()["lm_head.weight"] == (512, 64)


def test_all_weight_files_are_read_whatever_an_index_says(tmp_path: Path) -> None:
    folder_of(tmp_path)
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "output.safetensors")
    expected = open_model(tmp_path).float32(f"{Q}.weight")
    names = sorted(tensors)
    (tmp_path / "output.safetensors").unlink()
    save(tmp_path, {n: tensors[n] for n in names[::2]}, "output-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="1 shards of 2"):
        open_model(tmp_path)
    save(tmp_path, {n: tensors[n] for n in names[1::2]}, "output-00002-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    np.testing.assert_array_equal(open_model(tmp_path).float32(f"{Q}.weight"), expected)
    for number in (1, 2):
        name = f"output-0000{number}-of-00002.safetensors"
        (tmp_path / name).rename(tmp_path / f"{'ab'[number - 1]}.safetensors")
    np.testing.assert_array_equal(open_model(tmp_path).float32(f"{Q}.weight"), expected)
    shutil.copyfile(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="is in both"):
        open_model(tmp_path)


@pytest.mark.parametrize("part", PARTS[1:])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    folder_of(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{Q}.{part}"))
    with pytest.raises(CheckpointError, match=f"{Q}.*no {part}"):
        open_model(tmp_path)


# The linear has 64 inputs and outputs: groups 8 bits x 32, 4 bits x 32; 8 + 4 rows of words.
@pytest.mark.parametrize(
    ("part", "array"),
    [
        ("q_invperm", np.zeros(96, np.int32)),
        ("q_invperm", np.zeros(64, np.float32)),
        ("q_invperm", np.zeros((64, 1), np.int32)),
        ("q_scale_max", np.ones(3, np.float16)),
        ("q_scale_max", np.ones(2, np.float32)),
        ("q_scale", np.zeros((2, 9), np.int32)),
        ("q_scale", np.zeros((3, 8), np.int32)),
        ("q_weight", np.zeros((12, 48), np.int32)),
        ("q_weight", np.zeros((11, 64), np.int32)),
        ("q_weight", np.zeros((0, 64), np.int32)),
        ("q_groups", np.array([8, 0, 4], np.int16)),
        ("q_groups", np.array([8, 0, 7, 8], np.int16)),
        ("q_groups", np.array([4, 0, 8, 4], np.int16)),
        ("q_groups", np.array([8, 1, 4, 8], np.int16)),
        ("q_groups", np.array([8, 0, 4, 7], np.int16)),
        ("q_groups", np.array([8, 0, 4, 12], np.int16)),
        ("q_groups", np.array([8, 0, 4, -8], np.int16)),
        ("q_groups", np.array([8, 0, 4, 8], np.int32)),
        ("bias", np.zeros(32, np.float16)),
    ],
)
def test_a_part_that_contradicts_the_others_is_refused(tmp_path: Path, part: str, array: Any) -> None:
    folder_of(tmp_path)
    assert open_model(tmp_path).linears[Q].settings.groups == ((8, 32), (4, 32))
    rewrite(tmp_path, lambda tensors: tensors.update({f"{Q}.{part}": array}))
    with pytest.raises(CheckpointError, match=Q):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("part", "array", "words"),
    [
        ("q_invperm", np.zeros(64, np.int32), "not a permutation"),
        ("q_invperm", np.arange(64, dtype=np.int32) - 1, "not a permutation"),
        ("q_scale_max", np.full(2, np.nan, np.float16), "finite"),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path: Path, part: str, array: Any, words: str) -> None:
    folder_of(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f"{Q}.{part}": array}))
    model = open_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"{Q}.*{words}"):
        model.float32(f"{Q}.weight")


def test_folders_that_are_no_exl2_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", layers=1, tokenizer=False)
    with pytest.raises(CheckpointError, match="no quantized linear"):
        open_model(source)
    config = tiny_config(TINY)
    write_json(source / "config.json", config | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointError, match="quant_method 'gptq'"):
        open_model(source)
    (source / "model.safetensors").unlink()
    write_json(source / "config.json", config)
    with pytest.raises(CheckpointError, match="no weights"):
        open_model(source)
    folder_of(tmp_path / "silent")  # exllamav2 does not need the settings
    write_json(tmp_path / "silent" / "config.json", config)
    assert len(open_model(tmp_path / "silent").linears) == 3
