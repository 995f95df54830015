"""Outputs with other tensors than their checkpoint's: a failed check, the rows that both have compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from dsconvert.cli import cli


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("structure") / "model", dtype="f32")


def without_last_block(model: Path, folder: Path, layers: int | None = None) -> Path:
    """A copy that lacks its last block, and with `layers` says so in config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    for path in folder.glob("*.safetensors"):
        save_file({n: x for n, x in load_file(path).items() if not n.startswith(last)}, path)
    for path in folder.glob("*.index.json"):
        path.unlink()
    if layers is not None:
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return folder


def test_a_gguf_file_of_fewer_layers_fails(model: Path, tmp_path: Path) -> None:
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    less = without_last_block(model, tmp_path / "less", layers - 1)
    made = command("gguf", less, "-q", "q8_0", "-o", tmp_path / "less.gguf", "--effort", "off")
    assert made.exit_code == 0, made.output
    result = command("verify", tmp_path / "less.gguf", "--against", model)
    assert result.exit_code == 3, result.output
    assert f"{layers - 1} layers, the checkpoint has {layers}" in result.stderr
    assert "missing, the first is model.layers." in result.stderr
    assert "ok    weights" in result.stdout
    assert "mean KLD" not in result.stdout


def test_a_folder_without_a_block_fails_and_its_rows_are_compared(model: Path, tmp_path: Path) -> None:
    folder = without_last_block(model, tmp_path / "less")
    result = command("verify", folder, "--against", model)
    assert result.exit_code == 3, result.output
    assert "missing, the first is model.layers." in result.stderr
    assert "ok    weights" in result.stdout
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros_like(tensors["model.layers.0.mlp.up_proj.weight"])
    save_file(tensors, path)
    result = command("verify", folder, "--against", model)
    assert result.exit_code == 3, result.output
    assert "model.layers.0.mlp.up_proj.weight: signal to noise 0.0 dB" in result.stderr


def test_another_width_is_another_model(model: Path, tmp_path: Path) -> None:
    other = tiny.tiny_checkpoint(tmp_path / "other", d=128, ff=256)
    result = command("verify", other, "--against", model)
    assert result.exit_code == 2, result.output
    assert "not the same model" in result.stderr


def test_compare_shows_an_output_that_cannot_be_run_beside_one_that_can(model: Path, tmp_path: Path) -> None:
    less = without_last_block(model, tmp_path / "less")
    page = tmp_path / "page.html"
    result = command("compare", less, model, "--against", model, "--report", page)
    assert result.exit_code == 3, result.output
    rows = {
        line.split()[0]: line.split()
        for line in result.stdout.splitlines()
        if line.split()[-1:] in (["FAIL"], ["pass"])
    }
    assert rows["less"][3:] == [*"-----", "FAIL"]
    assert rows["model"][-1] == "pass"
    assert "<td>less</td>" in page.read_text()
