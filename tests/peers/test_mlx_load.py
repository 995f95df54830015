"""MLX folders are what mlx rounds, byte for byte, and mlx-lm's logits of them are those of our reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_experts
import tiny_families
from click.testing import CliRunner

from converters.mlx.affine import BITS, Affine, codes_of, grids, weights_of
from converters.mlx.pack import pack
from converters.mlx.reader import open_model
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.models.config import load_json

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages, all of them
TEXT = ("--calib", "builtin", "--calib-samples", "2", "--calib-len", "64")
KINDS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_rounds_to_the_same_bytes_and_reads_them_so(bits: int, dtype: str) -> None:
    """Groups of one value, of zeros, of one sign, and next to nothing among them."""
    import mlx.core as mx

    rng, settings = np.random.default_rng(bits), Affine(bits, 32)
    rows = rng.standard_normal((64, 192)).astype(np.float32)
    rows[0], rows[1], rows[2], rows[3] = 0, 0.3, np.abs(rows[2]), -np.abs(rows[3])
    rows[4, :64] = 1e-9
    given = mx.array(rows).astype(getattr(mx, KINDS[dtype]))
    rows = np.array(given.astype(mx.float32))
    scales, biases = grids(rows, settings)
    codes = codes_of(rows, scales, biases, settings)
    ours, theirs = pack(codes, scales, biases, settings, dtype), mx.quantize(given, 32, bits)
    for (part, array), their in zip(ours.items(), theirs, strict=True):
        bits_of = their.view(mx.uint16) if dtype == "bf16" and part != "weight" else their
        np.testing.assert_array_equal(np.array(bits_of), array, err_msg=part)
    wide = [their.astype(mx.float32) for their in theirs[1:]]
    read = mx.dequantize(theirs[0], *wide, group_size=32, bits=bits)
    np.testing.assert_allclose(np.array(read), weights_of(codes, *map(np.array, wide)), rtol=1e-6, atol=1e-7)


def test_the_folder_is_that_of_mlx_lm_itself(tmp_path: Path) -> None:
    """Every tensor of it, names and bytes, of the sample in 4 bits."""
    import mlx.core as mx
    from mlx_lm import convert

    source = open_checkpoint("sample:").folder
    convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=64)
    ours = quantized("sample:", tmp_path / "ours")
    found, wanted = (mx.load(str(folder / "model.safetensors")) for folder in (ours, tmp_path / "theirs"))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert array.dtype == found[name].dtype
        assert mx.array_equal(array, found[name]), name


def quantized(model: Path | str, out: Path, *options: str) -> Path:
    """The folder that the command line writes."""
    words = ["mlx", str(model), "--out", str(out), "--effort", "off", *options]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    return out


def apart(folder: Path, source: Path) -> float:
    """Distance of mlx-lm's logits of a folder from those of our reader's weights, by their norm."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    given = mx.array(np.random.default_rng(0).integers(0, 500, (1, 48)))
    found = np.array(load_model(folder)[0](given).astype(mx.float32))
    config = {key: value for key, value in load_json(folder / "config.json").items() if "quant" not in key}
    dense, read = load_model(source, model_config=config)[0], open_model(folder)
    weights = {name: mx.array(np.ascontiguousarray(read.float32(name))) for name in read.shapes()}
    dense.load_weights(list(dense.sanitize(weights).items()), strict=True)
    expected = np.array(dense(given).astype(mx.float32))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    "options", ["--bits 3", "--bits 4 --head-bits 6", "--bits 5 --head-bits 16", "--bits 8"]
)
def test_logits_are_those_of_our_reader(tmp_path: Path, options: str) -> None:
    """Calibrated, in float32: a model with biases and grouped heads."""
    source = tiny.tiny_checkpoint(tmp_path / "model", d=128, ff=384, bias=True, dtype="f32", shards=2)
    out = quantized(source, tmp_path / "out", "--group-size", "32", *options.split(), *TEXT)
    assert apart(out, source) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_every_class_of_dense_models_loads(tmp_path: Path, name: str) -> None:
    source = tiny_families.checkpoint(tmp_path / "model", name)
    assert apart(quantized(source, tmp_path / "out"), source) < 1e-5


@pytest.mark.parametrize(("name", "text"), [("deepseek", ()), ("v2", ()), ("v3", TEXT)])
def test_models_of_experts_load(tmp_path: Path, name: str, text: tuple[str, ...]) -> None:
    """mlx-lm stacks the experts, and splits the matrix that latent attention keeps in 16 bits."""
    source = tiny_experts.checkpoint(tmp_path / "model", name)
    out = quantized(source, tmp_path / "out", *text)
    assert open_model(out).dtype("model.layers.2.mlp.experts.0.up_proj.weight") == "mlx4"
    assert apart(out, source) < 1e-4
