"""The reader of compressed-tensors folders, on folders as other makers write them and on damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from converters.compressed.reader import open_model
from converters.outputs import open_output
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.safetensors_writer import from_array, from_stored, write_safetensors
from dsconvert.errors import CheckpointError
from dsconvert.models.config import load_json

LAYER = "model.layers.0.self_attn"
NAMES = [f"{LAYER}.{x}_proj" for x in "qkvo"]


def stream(values: Any, bits: int) -> Any:
    """Rows of values as int32 words, through one long integer a row."""
    size = -(-values.shape[1] * bits // 32)
    rows = [
        sum(int(v) << (bits * k) for k, v in enumerate(row)).to_bytes(4 * size, "little") for row in values
    ]
    return np.frombuffer(b"".join(rows), "<i4").reshape(len(values), size)


def group(bits: int, targets: list[str], sym: bool = True, size: int | None = 32, **more: Any) -> Any:
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "group_size": size, "dynamic": False}
    return {"targets": targets, "weights": {**weights, "strategy": "group" if size else "channel", **more}}


def linear(bits: int, sym: bool, size: int, rng: Any, bf16: bool = False) -> tuple[dict[str, Any], Any]:
    """The stored tensors of a 64 by 64 linear of random codes, and the weights that they stand for."""
    groups = 64 // size
    codes, scales = rng.integers(0, 1 << bits, (64, 64)), rng.uniform(0.01, 0.1, (64, groups))
    zeros = np.full((64, groups), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (64, groups))
    scales = tiny.encode(scales.astype(np.float32), "bf16") if bf16 else scales.astype(np.float16)
    wide = tiny.decode(scales) if bf16 else scales.astype(np.float32)
    parts = {
        "weight_packed": stream(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array([64, 64], np.int64),
    }
    if not sym:
        parts["weight_zero_point"] = np.ascontiguousarray(stream(zeros.T, bits).T)
    weights = (codes - zeros.repeat(size, 1)).astype(np.float32) * wide.repeat(size, 1)
    return parts, weights


def write(path: Path, stored: dict[str, dict[str, Any]], groups: list[Any], **settings: Any) -> Path:
    """A tiny model of one layer whose linears of these names are stored so."""
    source = tiny.tiny_checkpoint(path, layers=1, kv_heads=4, tokenizer=False)
    tensors = open_checkpoint(source).tensors
    pieces = {n: from_stored(t) for n, t in tensors.items() if n.removesuffix(".weight") not in stored}
    pieces |= {f"{n}.{part}": from_array(a) for n, parts in stored.items() for part, a in parts.items()}
    write_safetensors(path / "new", pieces)
    (path / "new").rename(path / "model.safetensors")
    config = load_json(path / "config.json")
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    named = {f"group_{i}": one for i, one in enumerate(groups)}
    config["quantization_config"] = {**stated, "config_groups": named, **settings}
    tiny.write_json(path / "config.json", config)
    return path


def test_mixed_widths_by_names_and_patterns(tmp_path: Path) -> None:
    """Several groups: by name, by pattern, even a hostile one; scales of either 16-bit type."""
    rng = np.random.default_rng(0)
    made = {
        NAMES[0]: linear(3, True, 64, rng),
        NAMES[1]: linear(8, False, 32, rng, bf16=True),
        NAMES[2]: linear(5, False, 16, rng),
        NAMES[3]: linear(7, True, 32, rng),
    }
    groups = [
        group(7, ["Linear"]),
        group(3, [NAMES[0]], size=None),
        group(8, ["re:(m|.)*k_proj$$"], sym=False),
        group(5, [r"re:model\.layers\.0\..*v_proj$"], sym=False, size=16),
    ]
    folder = write(tmp_path / "m", {name: parts for name, (parts, _) in made.items()}, groups)
    model, source = (
        open_model(folder),
        open_checkpoint(tiny.tiny_checkpoint(tmp_path / "s", layers=1, kv_heads=4)),
    )
    assert model.shapes() == source.shapes()
    assert [model.dtype(f"{name}.weight") for name in NAMES] == ["w3a16", "w8a16", "w5a16", "w7a16"]
    for name, (_, weights) in made.items():
        np.testing.assert_array_equal(model.float32(f"{name}.weight"), weights)
        np.testing.assert_array_equal(model.rows(f"{name}.weight", 7, 33), weights[7:33])
    assert model.dtype("model.embed_tokens.weight") == "bf16"
    opened = open_output(folder)
    assert (opened.kind, opened.holds) == (
        "compressed-tensors", "4 linears of w3a16, w8a16, w5a16, w7a16, 8 tensors kept",
    )  # fmt: skip


def test_groups_in_another_order_as_before_2026(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    parts, weights = linear(4, True, 32, rng)
    order = rng.permutation(64)
    parts["weight_g_idx"] = (order // 32).astype(np.int32)
    folder = write(tmp_path / "m", {NAMES[0]: parts}, [group(4, ["Linear"])])
    by_group = parts["weight_scale"].astype(np.float32)
    codes = weights / by_group.repeat(32, 1)
    np.testing.assert_allclose(
        open_model(folder).float32(f"{NAMES[0]}.weight"), codes * by_group[:, order // 32], rtol=1e-6
    )


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def stated(**changes: Any) -> Change:
    return lambda parts, settings: settings.update(changes)


def of_weights(**changes: Any) -> Change:
    return lambda parts, settings: settings["config_groups"]["group_0"]["weights"].update(changes)


def stored(part: str, value: Any) -> Change:
    return lambda parts, settings: parts.update({part: from_array(np.asarray(value))})


DAMAGES: dict[str, tuple[Change, str]] = {
    "no groups": (stated(config_groups={}), "states no config_groups"),
    "groups of another kind": (stated(config_groups={"a": 3}), "states no weights"),
    "another format": (stated(format="marlin-24"), "its format is 'marlin-24'"),
    "no format": (stated(format=None), "its format is 'None'"),
    "9 bits": (of_weights(num_bits=9), "weights of '9' bits"),
    "bits as text": (of_weights(num_bits="4"), "weights of '4' bits"),
    "floats": (of_weights(type="float"), "of the type 'float'"),
    "a strategy of activations": (of_weights(strategy="token"), "the strategy 'token'"),
    "a group of no inputs": (of_weights(group_size=0), "groups of '0'"),
    "other groups": (of_weights(group_size=64), "weight_scale has shape [64, 2]"),
    "other bits": (of_weights(num_bits=3), "weight_packed has shape [64, 8]; w3a16-32g asks for [64, 6]"),
    "asymmetric without zero points": (of_weights(symmetric=False), "there is no weight_zero_point"),
    "zero points of symmetric codes": (
        stored("weight_zero_point", np.zeros((8, 2), np.int32)), "there is a weight_zero_point"
    ),
    "no scale": (lambda parts, settings: parts.pop("weight_scale"), "there is no weight_scale"),
    "no shape": (lambda parts, settings: parts.pop("weight_shape"), "there is no weight_shape"),
    "a shape of three": (stored("weight_shape", np.array([64, 64, 1])), "has the size [64, 64, 1]"),
    "a shape below nothing": (stored("weight_shape", np.array([-64, 64])), "has the size [-64, 64]"),
    "a shape beyond all": (stored("weight_shape", np.array([1 << 40, 64])), "has the size"),
    "another shape": (stored("weight_shape", np.array([64, 96])), "asks for"),
    "scales of integers": (stored("weight_scale", np.ones((64, 2), np.int32)), "is stored as i32"),
    "codes of floats": (stored("weight_packed", np.ones((64, 8), np.float32)), "is stored as f32"),
    "a group beyond the last": (
        stored("weight_g_idx", np.full(64, 2, np.int32)), "weight_g_idx goes from 2 to 2"
    ),
    "a scale that is no number": (
        stored("weight_scale", np.full((64, 2), np.nan, np.float16)), "not a finite number"
    ),
    "nothing quantized": (lambda parts, settings: parts.clear(), "holds no quantized linear"),
    "codes without scales": (
        lambda parts, settings: [parts.pop(f"weight_{part}") for part in ("scale", "shape")],
        "there is no weight_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, said = DAMAGES[name]
    parts, _ = linear(4, True, 32, np.random.default_rng(0))
    folder = write(tmp_path / "m", {NAMES[0]: parts}, [group(4, ["Linear"])])
    config = load_json(folder / "config.json")
    tensors = open_checkpoint_parts(folder)
    own = {n.rpartition(".")[2]: tensors.pop(n) for n in list(tensors) if n.startswith(f"{NAMES[0]}.")}
    change(own, config["quantization_config"])
    write_safetensors(folder / "new", {**tensors, **{f"{NAMES[0]}.{part}": p for part, p in own.items()}})
    (folder / "new").rename(folder / "model.safetensors")
    tiny.write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError) as caught:
        open_model(folder).float32(f"{NAMES[0]}.weight")
    assert said in str(caught.value), str(caught.value)


def open_checkpoint_parts(folder: Path) -> dict[str, Any]:
    from dsconvert.checkpoints.safetensors_reader import read_safetensors

    copy = folder / "before.safetensors"  # the file itself is written anew
    shutil.copy(folder / "model.safetensors", copy)
    return {name: from_stored(one) for name, one in read_safetensors(copy).items()}


def test_settings_inside_the_text_config_are_found(tmp_path: Path) -> None:
    parts, weights = linear(4, True, 32, np.random.default_rng(0))
    folder = write(tmp_path / "m", {NAMES[0]: parts}, [group(4, ["Linear"])])
    config = load_json(folder / "config.json")
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(open_model(folder).float32(f"{NAMES[0]}.weight"), weights)
