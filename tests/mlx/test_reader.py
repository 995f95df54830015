"""The reader of MLX folders, on folders as other makers write them and on damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from converters.mlx.reader import open_model
from converters.outputs import open_output
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.safetensors_writer import from_array, from_stored, write_safetensors
from dsconvert.errors import CheckpointError, UsageError
from dsconvert.models.config import load_json

LAYER = "model.layers.0.self_attn"
NAMES = [f"{LAYER}.{x}_proj" for x in "qkvo"]
Parts = dict[str, Any]


def matrix(bits: int, size: int, rng: Any, dtype: str = "bf16") -> tuple[Parts, Any]:
    """The stored tensors of a 64 by 64 matrix of random codes, and the weights that they stand for."""
    codes = rng.integers(0, 1 << bits, (64, 64))
    words = [sum(int(v) << (bits * k) for k, v in enumerate(row)) for row in codes]
    data = b"".join(word.to_bytes(8 * bits, "little") for word in words)
    parts: Parts = {"weight": np.frombuffer(data, "<u4").reshape(64, 2 * bits)}
    wide = {}
    for part in ("scales", "biases"):
        numbers = rng.uniform(-0.1, 0.1, (64, 64 // size)).astype(np.float32)
        parts[part] = tiny.encode(numbers, dtype)
        wide[part] = tiny.decode(parts[part]).astype(np.float32).repeat(size, 1)
    return parts, codes.astype(np.float32) * wide["scales"] + wide["biases"]


def write(path: Path, stored: dict[str, Parts], stated: dict[str, Any]) -> Path:
    """A tiny model of one layer whose matrices of these names are stored so."""
    source = tiny.tiny_checkpoint(path, layers=1, kv_heads=4, tokenizer=False)
    tensors = open_checkpoint(source).tensors
    pieces = {n: from_stored(t) for n, t in tensors.items() if n.removesuffix(".weight") not in stored}
    pieces |= {f"{n}.{part}": from_array(a) for n, parts in stored.items() for part, a in parts.items()}
    write_safetensors(path / "new", pieces)
    (path / "new").rename(path / "model.safetensors")
    tiny.write_json(path / "config.json", {**load_json(path / "config.json"), **stated})
    return path


def test_mixed_widths_by_path_as_mlx_lm_states_them(tmp_path: Path) -> None:
    """`quantization` alone, as of old; a matrix by its path, and one that it says is not quantized."""
    rng = np.random.default_rng(0)
    made = {
        NAMES[0]: matrix(4, 32, rng),
        NAMES[1]: matrix(6, 64, rng, "f16"),
        NAMES[3]: matrix(4, 32, rng, "f32"),
    }
    stated = {
        "group_size": 32,
        "bits": 4,
        NAMES[1]: {"group_size": 64, "bits": 6},
        NAMES[2]: False,
        NAMES[0]: True,
    }
    stored = {name: parts for name, (parts, _) in made.items()}
    folder = write(tmp_path / "m", stored, {"quantization": stated})
    opened = open_output(folder)
    assert (opened.kind, opened.quant, opened.holds) == (
        "MLX", "mlx-4bit-32g", "3 matrices of 4 and 6 bits, 9 tensors kept"
    )  # fmt: skip
    model = open_model(folder)
    assert [model.dtype(f"{name}.weight") for name in NAMES] == ["mlx4", "mlx6", "bf16", "mlx4"]
    for name, (_, weights) in made.items():
        np.testing.assert_array_equal(model.float32(f"{name}.weight"), weights)
        np.testing.assert_array_equal(model.rows(f"{name}.weight", 7, 33), weights[7:33])


def test_a_folder_of_mlx_lm_states_no_method(tmp_path: Path) -> None:
    """Both keys, neither with a quant_method; and as a source to convert it is refused by name."""
    parts, weights = matrix(4, 64, np.random.default_rng(1))
    stated = {"group_size": 64, "bits": 4, "mode": "affine"}
    both = {"quantization": stated, "quantization_config": stated}
    folder = write(tmp_path / "m", {NAMES[0]: parts}, both)
    assert open_output(folder).kind == "MLX"
    np.testing.assert_array_equal(open_model(folder).float32(f"{NAMES[0]}.weight"), weights)
    with pytest.raises(CheckpointError, match="MLX"):
        open_checkpoint(folder)


Change = Callable[[Parts, dict[str, Any]], Any]


def stated(**changes: Any) -> Change:
    return lambda parts, settings: settings.update(changes)


def stored(part: str, value: Any) -> Change:
    return lambda parts, settings: parts.update({part: np.asarray(value)})


DAMAGES: dict[str, tuple[Change, str]] = {
    "7 bits": (stated(bits=7), "It states '7' bits"),
    "bits as text": (stated(bits="4"), "It states '4' bits"),
    "bits that are true": (stated(bits=True), "It states 'True' bits"),
    "small floats": (stated(mode="mxfp4"), "mode 'mxfp4'"),
    "groups of 16": (stated(group_size=16), "groups of '16'"),
    "other groups": (stated(group_size=64), "ask for [64, 16]"),
    "other bits": (stated(bits=3), "'model.layers.0.self_attn.q_proj.weight' has shape [64, 8]"),
    "not quantized": (stated(**{NAMES[0]: False}), "config.json says that it is not"),
    "damage by path": (stated(**{NAMES[0]: {"bits": 9, "group_size": 32}}), "It states '9' bits"),
    "no scales": (lambda parts, settings: parts.pop("scales"), "has no scales"),
    "no biases": (lambda parts, settings: parts.pop("biases"), "has no biases"),
    "no codes": (lambda parts, settings: parts.pop("weight"), "has no weight"),
    "scales of three sides": (
        stored("scales", np.ones((64, 2, 1), np.float32)),
        "is stored as f32 [64, 2, 1]",
    ),
    "scales of integers": (stored("scales", np.ones((64, 2), np.int32)), "is stored as i32"),
    "codes with a sign": (stored("weight", np.ones((64, 8), np.int32)), "is stored as i32"),
    "no outputs": (stored("scales", np.ones((0, 2), np.float32)), "is stored as f32 [0, 2]"),
    "biases for others": (stored("biases", np.ones((32, 2), np.float32)), "has shape [32, 2]"),
    "biases of another type": (stored("biases", np.ones((64, 2), np.float16)), "in another type"),
    "a scale that is no number": (
        stored("scales", np.full((64, 2), np.nan, np.float32)),
        "not a finite number",
    ),
    "nothing quantized": (lambda parts, settings: parts.clear(), "holds no quantized linear"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, said = DAMAGES[name]
    parts, _ = matrix(4, 32, np.random.default_rng(0), "f32")
    settings: dict[str, Any] = {"group_size": 32, "bits": 4, "mode": "affine"}
    change(parts, settings)
    folder = write(tmp_path / "m", {NAMES[0]: parts}, {"quantization": settings})
    with pytest.raises((CheckpointError, UsageError)) as caught:
        open_model(folder).float32(f"{NAMES[0]}.weight")
    assert said in str(caught.value), str(caught.value)
