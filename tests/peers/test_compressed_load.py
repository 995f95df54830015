"""compressed-tensors folders are what that package packs of the same codes, and transformers loads them.

In float32 its logits are those of our reader's weights: both multiply the same codes by the same scales.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_vl
from click.testing import CliRunner

from converters.compressed.pack import pack
from converters.compressed.reader import open_model
from converters.compressed.rounded import Weight, largest
from converters.compressed.schemes import INTEGERS, SCHEMES, integer_weights
from converters.compressed.stated import Weights
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.quantized import QuantizedSource
from dsconvert.cli import cli
from dsconvert.models.config import load_json
from dsconvert.quantization.gptq_grid import Scheme

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages, all of them
TEXT = ("--calib", "builtin", "--calib-samples", "4", "--calib-len", "128")
OFF = ("--effort", "off")
FLOATS = set(SCHEMES) - set(INTEGERS)
EXACT = 2e-6


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [SCHEMES[name].bits for name in INTEGERS])
def test_the_package_packs_the_same_codes_to_the_same_bytes(bits: int, group: int, sym: bool) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng, inputs, outputs = np.random.default_rng(bits), 96, 40
    groups = 1 if group == -1 else inputs // group
    codes = rng.integers(0, 1 << bits, (inputs, outputs)).astype(np.uint8)
    scales = rng.uniform(0.5, 1, (groups, outputs)).astype(np.float16)
    middle, size = 1 << (bits - 1), (groups, outputs)
    zeros = np.full(size, middle) if sym else rng.integers(1, 1 << bits, size)
    ours = pack(codes, scales, zeros.astype(np.uint8), bits, sym)
    group_of = np.arange(inputs) * groups // inputs
    weight = (codes.astype(np.float32) - zeros[group_of]) * scales[group_of].astype(np.float32)
    arguments = QuantizationArgs(**integer_weights(Scheme(bits, group, sym)))
    given = {
        "weight": torch.from_numpy(np.ascontiguousarray(weight.T)),
        "weight_scale": torch.from_numpy(np.ascontiguousarray(scales.T.astype(np.float32))),
        "weight_zero_point": torch.from_numpy(np.ascontiguousarray(zeros.T - middle).astype(np.int8)),
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    theirs = compressor.compress(given, scheme)
    assert set(theirs) == set(ours)
    for part in set(ours) - {"weight_scale"}:
        np.testing.assert_array_equal(theirs[part].numpy(), ours[part], err_msg=part)
        assert theirs[part].numpy().dtype == ours[part].dtype


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - set(INTEGERS)))
def test_the_package_rounds_to_the_same_bytes_by_our_scales(name: str) -> None:
    """Ragged blocks, a group of zeros, and values that are too small for any code."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    row, rng = SCHEMES[name], np.random.default_rng(3)
    values = rng.standard_normal((200, 320)).astype(np.float32) * np.float32(0.05)
    values[3, :32] = 0
    values[150, 40:80] *= 1e-4
    plain = Weight(200, 320, lambda a, b: values[a:b])
    weight = Weight(200, 320, plain.rows, lambda: largest(plain))
    ours = {part: read(piece) for part, piece in row.pieces(weight).items()}
    scale = ours["weight_scale"]
    if name == "mxfp4a16":
        scale = torch.from_numpy(2.0 ** (scale.astype(np.float32) - 127))
    elif name == "nvfp4a16":
        scale = torch.from_numpy(scale).view(torch.float8_e4m3fn).float()
    else:
        scale = torch.from_numpy(scale)
    given = {"weight": torch.from_numpy(values), "weight_scale": scale}
    if "weight_global_scale" in ours:
        given["weight_global_scale"] = torch.from_numpy(ours["weight_global_scale"])
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**row.weights))
    theirs = BaseCompressor.get_value_from_registry(row.format).compress(given, scheme)
    assert set(theirs) == set(ours)
    for part, array in ours.items():
        tensor = theirs[part].view(torch.uint8) if array.dtype == np.uint8 else theirs[part]
        np.testing.assert_array_equal(tensor.numpy(), array, err_msg=part)


def read(piece: Any) -> Any:
    kind = {"F32": "<f4"}.get(piece.dtype, "u1")
    return np.frombuffer(b"".join(map(bytes, piece.chunks())), kind).reshape(piece.shape).copy()


def quantized(model: Path | str, out: Path, *options: str) -> Path:
    """The folder that the command line writes."""
    text = () if set(options) & FLOATS else TEXT
    done = CliRunner().invoke(cli, ["compressed", str(model), "--out", str(out), *OFF, *text, *options])
    assert done.exit_code == 0, done.output
    return out


def load(auto: str, folder: Path | str, dequantize: bool = False) -> Any:
    """transformers' model of a folder in float32, with all that it looks for and no more."""
    import torch
    import transformers

    more = (
        {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    )
    cls = getattr(transformers, auto)
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    assert not any(info.values()), info
    return model.eval()


def read_back(auto: str, source: Path, model: QuantizedSource[Weights], rounded: str) -> Any:
    """transformers' plain model with the weights of our reader, those of its linears rounded to a type."""
    import torch

    plain = load(auto, source)
    state = plain.state_dict()
    assert set(model.shapes()) <= set(state)
    for name in model.shapes():
        tensor = torch.from_numpy(np.ascontiguousarray(model.float32(name)))
        if name.removesuffix(".weight") in model.linears:
            tensor = tensor.to(getattr(torch, rounded))
        state[name].copy_(tensor)
    return plain


def apart(
    auto: str,
    source: Path,
    folder: Path,
    inputs: dict[str, Any],
    dequantize: bool = False,
    rounded: str = "float32",
) -> float:
    """Distance of the logits, relative to their norm, where the package rounds weights to a type."""
    import torch

    with torch.no_grad():
        found = load(auto, folder, dequantize)(**inputs).logits.double()
        expected = read_back(auto, source, open_model(folder), rounded)(**inputs).logits.double()
    return float((found - expected).norm() / expected.norm())


def ids(vocab: int, length: int = 96) -> Any:
    import torch

    return torch.from_numpy(np.random.default_rng(0).integers(0, vocab, (1, length)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases and grouped heads."""
    folder = tmp_path_factory.mktemp("peers") / "model"
    return tiny.tiny_checkpoint(folder, d=128, ff=384, bias=True, shards=2)


OPTIONS = [f"--scheme {name} --group-size 32" for name in INTEGERS]
OPTIONS += ["--bpw 4.5", "--bpw 3.5 --lm-head --types w2a16-32g,w3a16,w5a16,w8a16"]
OPTIONS += ["--scheme w4a16", "--group-size -1", "--asym --group-size 64", "--scheme w3a16 --asym"]


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_are_those_of_our_reader(tmp_path: Path, source: Path, options: str) -> None:
    out = quantized(source, tmp_path / "out", *options.split())
    given = {"input_ids": ids(512)}
    if "--asym" in options:  # the default way expects an unpacked zero point; this one the scales' type
        assert apart("AutoModelForCausalLM", source, out, given, True, "float16") < EXACT
        return
    assert apart("AutoModelForCausalLM", source, out, given) < EXACT


@pytest.mark.parametrize("text", [(), TEXT], ids=["nearest", "solved"])
@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16"])
def test_logits_of_four_bit_floats_are_those_of_our_reader(
    tmp_path: Path, source: Path, scheme: str, text: tuple[str, ...]
) -> None:
    """The package makes bf16 of them, whatever the model's type is."""
    out, given = quantized(source, tmp_path / "out", "--scheme", scheme, *text), {"input_ids": ids(512)}
    assert apart("AutoModelForCausalLM", source, out, given, True, "bfloat16") < EXACT


def test_logits_of_fp8_are_those_of_our_reader_but_for_the_activations(tmp_path: Path) -> None:
    """Dequantized it has no activations to round; as it is, the package rounds them to fp8."""
    out, source = (
        quantized("sample:", tmp_path / "out", "--scheme", "fp8-block"),
        open_checkpoint("sample:").folder,
    )
    given = {"input_ids": ids(2048)}
    assert apart("AutoModelForCausalLM", source, out, given, dequantize=True) < EXACT
    assert EXACT < apart("AutoModelForCausalLM", source, out, given) < 0.05


def test_the_head_too(tmp_path: Path) -> None:
    out = quantized("sample:", tmp_path / "out", "--lm-head")
    source = open_checkpoint("sample:").folder
    assert apart("AutoModelForCausalLM", source, out, {"input_ids": ids(2048)}) < EXACT


@pytest.mark.parametrize("hybrid", [False, True], ids=["deepseek_vl", "deepseek_vl_hybrid"])
def test_a_model_with_a_tower_loads_whole(tmp_path: Path, hybrid: bool) -> None:
    """The language model quantized, the tower and the aligner as they were; a text with a picture in it."""
    sizes = tiny_vl.VL(hybrid=hybrid, d=128, ff=256)
    source = tiny_vl.vl_checkpoint(tmp_path / "source", sizes)
    out = quantized(source, tmp_path / "out", "--group-size", "32")
    inputs = tiny_vl.pictured(ids(400), sizes, load_json(source / "config.json")["image_token_id"])
    assert apart("AutoModelForImageTextToText", source, out, inputs) < EXACT
