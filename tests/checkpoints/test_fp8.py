"""Matrices in fp8 with a scale for each block are read as torch's own cast times the scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from dsconvert.checkpoints import fp8
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, PlanError

torch = pytest.importorskip("torch")
OPTIONS = tiny.Tiny(d=256, ff=320, layers=1, dtype="f32")
UP = "model.layers.0.mlp.up_proj.weight"  # [320, 256]: the last block of rows has 64


def folder_of(path: Path, scale: Any, block: list[int] | None = None, **more: Any) -> Path:
    """A folder whose up_proj is in fp8 with these scales."""
    from safetensors.torch import save_file

    folder = tiny.tiny_checkpoint(path, OPTIONS)
    tensors = {n: torch.from_numpy(np.array(v)) for n, v in tiny.tiny_tensors(OPTIONS).items()}
    codes = torch.arange(320 * 256, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(320, 256)
    codes[(codes & 127) == 127] = 1  # no NaN
    tensors[UP] = codes.view(torch.float8_e4m3fn)
    tensors[UP + "_scale_inv"] = scale
    save_file({**tensors, **more}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block or [128, 128]}
    tiny.write_json(folder / "config.json", config)
    return folder


SCALES = torch.tensor([[0.5, 3e-3], [1.7, 0.01], [2e-5, 7.0]])


@pytest.mark.parametrize(
    "scale",
    [SCALES, SCALES.bfloat16(), SCALES.log2().round().exp2().to(torch.float8_e8m0fnu)],
    ids=["f32", "bf16", "e8m0"],
)
def test_rows_are_torchs_cast_times_the_scales(scale: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_of(tmp_path / "model", scale))
    assert checkpoint.dtype(UP) == fp8.NAME
    assert UP + "_scale_inv" not in checkpoint.tensors
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model" / "model.safetensors")
    each = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:320]
    wanted = (stored[UP].float() * each).numpy()
    assert np.array_equal(checkpoint.float32(UP), wanted)
    for start, stop in ((0, 1), (100, 300), (319, 320), (127, 129), (300, 500), (5, 5)):
        assert np.array_equal(checkpoint.rows(UP, start, stop), wanted[start:stop]), (start, stop)


def test_every_byte_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    np.testing.assert_array_equal(fp8.VALUES, codes.view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(fp8.POWERS, codes.view(torch.float8_e8m0fnu).float().numpy())


def test_a_dense_model_in_fp8_converts_and_verifies(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", SCALES / 500)
    out = str(tmp_path / "x.gguf")
    made = CliRunner().invoke(cli, ["gguf", str(folder), "-q", "q8_0", "-o", out])
    assert made.exit_code == 0, made.output
    told = CliRunner().invoke(cli, ["verify", out, "--against", str(folder), "--windows", "1"])
    assert told.exit_code == 0, told.output


def refused(folder: Path, kind: type[ConversionError], told: str) -> None:
    with pytest.raises(kind, match=told):
        open_checkpoint(folder)


def test_scales_that_do_not_fit_are_refused_by_the_matrix_name(tmp_path: Path) -> None:
    refused(folder_of(tmp_path / "rows", SCALES[:2].clone()), PlanError, r"scales of shape \[2, 2\]")
    refused(folder_of(tmp_path / "flat", SCALES[:, 0].clone()), PlanError, UP)
    refused(folder_of(tmp_path / "blocks", SCALES, [64, 64]), PlanError, "asks for .5, 4.")
    refused(folder_of(tmp_path / "size", SCALES, [128]), CheckpointError, "weight_block_size")
    refused(
        folder_of(tmp_path / "type", SCALES.to(torch.int32)),
        CheckpointError,
        "scales of .* are stored as i32",
    )


def test_other_fp8_is_refused(tmp_path: Path) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    bare = folder_of(tmp_path / "bare", SCALES, **{down: torch.zeros(256, 320).to(torch.float8_e4m3fn)})
    refused(bare, CheckpointError, "quantized already")
    left = folder_of(tmp_path / "left", SCALES, **{down + "_scale_inv": torch.ones(2, 3)})
    refused(left, CheckpointError, "quantized already")
    five = folder_of(tmp_path / "e5m2", SCALES, **{down: torch.zeros(256, 320).to(torch.float8_e5m2)})
    refused(five, CheckpointError, "quantized already")
