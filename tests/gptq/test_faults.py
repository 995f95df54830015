"""What goes wrong in a calibration, seen from the command line: exit code 2, one paragraph, nothing left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from dsconvert.cli import cli

TEXTS = {
    "empty": (b"", "holds no text"),
    "one byte": (b"x", "4 windows of 128 need 512"),
    "too short": (b"fewer tokens than are asked for", "4 windows of 128 need 512"),
    "one token": (b"a" * 100_000, "nothing can be learnt from it"),
}


def refused(model: Path, out: Path, calib: str) -> str:
    """The message of a run that stops."""
    asked = ["--calib", calib, "--calib-samples", "4", "--calib-len", "128", "--group-size", "32"]
    done = CliRunner().invoke(cli, ["gptq", str(model), "--out", str(out), *asked])
    said = " ".join(done.stderr.split())
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert "\n\n" not in done.stderr.strip()
    assert not out.exists()
    return said


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_no_use_is_named(tmp_path: Path, name: str) -> None:
    content, words = TEXTS[name]
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    said = refused(tiny.tiny_checkpoint(tmp_path / "model"), tmp_path / "out", str(text))
    assert words in said
    assert "text.txt" in said


def test_activations_that_are_no_numbers_name_the_linear(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", dtype="f32")
    tensors = tiny.tiny_tensors(tiny.Tiny(dtype="f32"))
    tensors["model.layers.1.post_attention_layernorm.weight"][:] = np.nan
    (model / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    said = refused(model, tmp_path / "out", "builtin")
    assert "model.layers.1.mlp.gate_proj.weight: is given inputs that are not finite numbers" in said
    assert "dsconvert inspect" in said
