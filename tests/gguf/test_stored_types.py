"""The same weights give the same file, whatever type the checkpoint stores them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from converters.gguf.parse import open_gguf
from dsconvert.cli import cli

PROVEN, QUANTIZED = ("f32", "bf16", "f16"), ("q8_0", "q4_0", "q4_k_m")


def checkpoint(folder: Path, dtype: str) -> Path:
    """A tiny model whose values have a bf16 and a float16 each, so that every type holds the same numbers."""
    options = tiny.Tiny(d=256, ff=256, layers=1)
    tiny.tiny_checkpoint(folder, options)
    stored: dict[str, Any] = {}
    for name, exact in tiny.tiny_tensors(options).items():
        values = tiny.decode(tiny.encode(exact, "bf16")).astype(np.float16).astype(np.float32)
        values[np.abs(values) < 2.0**-10] = 0  # below, float16 has fewer digits than bf16
        stored[name] = values.astype(np.float64) if dtype == "f64" else tiny.encode(values, dtype)
    if dtype == "f64":
        (folder / "model.safetensors").unlink()
        tiny.write_bin(folder / "pytorch_model.bin", stored)
    else:
        tiny.write_weights(folder, stored, options)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of all files made of each."""
    made = {}
    for dtype in ("bf16", "f16", "f32", "f64"):
        folder = tmp_path_factory.mktemp(dtype)
        source = checkpoint(folder / "model", dtype)
        for quants, verify in ((PROVEN, "quick"), (QUANTIZED, "off")):
            options = ["--quant", ",".join(quants), "--verify", verify, "-o", str(folder / "m.gguf")]
            result = CliRunner().invoke(cli, ["gguf", str(source), *options])
            assert result.exit_code == 0, result.output
        made[dtype] = folder
    return made


@pytest.mark.parametrize("quant", PROVEN + QUANTIZED)
@pytest.mark.parametrize("dtype", ["f16", "f32", "f64"])
def test_the_tensors_are_the_same_bytes(files: dict[str, Path], dtype: str, quant: str) -> None:
    ours, bf16 = (open_gguf(files[kind] / f"m-{quant}.gguf") for kind in (dtype, "bf16"))
    assert ours.tensors.keys() == bf16.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert np.array_equal(tensor.blocks(), bf16.tensors[name].blocks()), name


def test_rounded_and_widened_types_make_the_same_file(files: dict[str, Path]) -> None:
    made = {dtype: (files[dtype] / "m-q4_0.gguf").read_bytes() for dtype in ("f16", "f32", "f64")}
    assert len(set(made.values())) == 1
