"""Numbers in a stranger's header that no model has: an ordinary error before anything is built from them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result
from rewrite import edited

from converters.gguf import opened as opening
from converters.gguf.as_model import open_model
from converters.gguf.parse import GGUFFile, open_gguf
from converters.gguf.projector.completeness import completeness
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError
from dsconvert.proof import effort, prove


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def file(model: Path) -> GGUFFile:
    out = model.with_name("tiny.gguf")
    made = command("gguf", model, "-q", "q8_0", "-o", out, "--effort", "off")
    assert made.exit_code == 0, made.output
    return open_gguf(out)


COUNTS = (
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "context_length",
    "attention.key_length",
)
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
ODD: tuple[tuple[str, Any], ...] = (
    ("uint32", 4_000_000_000),
    ("int32", -1),
    ("float32", math.inf),
    ("float32", math.nan),
    ("array:uint32", [2, 2]),
    ("string", "2"),
    ("bool", True),
    ("uint32", 0),
)


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("key", [*COUNTS, *NUMBERS])
def test_an_odd_number_is_an_ordinary_error(
    key: str, value: tuple[str, Any], file: GGUFFile, tmp_path: Path
) -> None:
    if key in NUMBERS and value == ("uint32", 4_000_000_000):
        value = ("float32", -1.0)
    keys = {"llama.rope.scaling.type": ("string", "linear"), f"llama.{key}": value}
    bad = open_gguf(edited(file, tmp_path / "bad.gguf", keys))
    with pytest.raises(CheckpointError, match=f"key llama.{key} is"):
        open_model(bad)


def test_heads_that_do_not_divide_are_an_ordinary_error(file: GGUFFile, tmp_path: Path) -> None:
    for key, value in (("attention.head_count_kv", 3), ("attention.key_length", 15)):
        bad = edited(file, tmp_path / "bad.gguf", {f"llama.{key}": ("uint32", value)})
        with pytest.raises(CheckpointError, match=f"key llama.{key} is {value}"):
            open_model(open_gguf(bad))


def test_layers_are_bounded_by_the_tensors(file: GGUFFile, model: Path, tmp_path: Path) -> None:
    """A plan of so many layers would name millions of tensors before it missed the first."""
    pytest.importorskip("torch")
    bad = edited(file, tmp_path / "bad.gguf", {"llama.block_count": ("uint32", 1 << 30)})
    result = command("verify", bad, "--against", model)
    assert result.exit_code == 2
    assert "key llama.block_count is 1073741824" in result.stderr
    assert f"from 1 to {len(file.tensors)}" in result.stderr


ODD_PICTURES: dict[str, tuple[str, tuple[str, Any], str]] = {
    "mean is a number": ("image_mean", ("float32", 0.5), "pixels"),
    "std is a text": ("image_std", ("string", "0.5"), "pixels"),
    "std are texts": ("image_std", ("array:string", ["0.5"] * 3), "pixels"),
    "mean of two": ("image_mean", ("array:float32", [0.5, 0.5]), "pixels"),
    "mean is infinite": ("image_mean", ("array:float32", [math.inf] * 3), "pixels"),
    "blocks without end": ("block_count", ("uint32", (1 << 20) - 1), "tensors"),
    "heads are texts": ("attention.head_count", ("string", "2"), "tensors"),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_an_odd_number_in_a_projector_is_a_failed_check(
    name: str, projector: GGUFFile, tmp_path: Path
) -> None:
    key, value, check = ODD_PICTURES[name]
    bad = open_gguf(edited(projector, tmp_path / "bad.gguf", {f"clip.vision.{key}": value}))
    failed = {found.name: found.detail for found in completeness(bad) if not found.passed}
    assert key in failed[check]
    result = command("inspect", bad.path)
    assert result.exit_code == 3, result.output
    assert key in result.output


@pytest.mark.parametrize("key", ["pad_color", "min_size", "tokens"])
def test_an_odd_number_of_pictures_is_named(key: str, projector: GGUFFile, tmp_path: Path) -> None:
    for value in (("string", "x"), ("array:string", ["a", "b"]), ("float32", math.inf)):
        bad = open_gguf(edited(projector, tmp_path / "bad.gguf", {f"dsconvert.image.{key}": value}))
        (failed,) = [found.detail for found in completeness(bad) if not found.passed]
        assert f"key dsconvert.image.{key} is" in failed


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    out = tmp_path_factory.mktemp("pair") / "text.gguf"
    made = command("gguf", "sample-vl:", "-q", "q8_0", "-o", out, "--effort", "off")
    assert made.exit_code == 0, made.output
    return open_gguf(out.with_name("mmproj-text.gguf"))


CLASS = "Qwen2MoeForCausalLM"


def of_another_class(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    tiny.write_json(out / "config.json", config | {"architectures": [CLASS]})
    return out


@pytest.mark.parametrize("kind", ["16-bit", "gptq", "exl2"])
def test_a_folder_of_another_class_is_an_ordinary_error(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = tiny.tiny_checkpoint(tmp_path / "model", d=128, ff=256, layers=1)
    folder = model
    if kind != "16-bit":
        folder = tmp_path / kind
        calibration = ("--calib", "builtin", "--calib-samples", 1, "--calib-len", 32)
        made = command(kind, model, "-b", 4, *calibration, "-o", folder, "--effort", "off")
        assert made.exit_code == 0, made.output
    other = of_another_class(folder, tmp_path / "other")
    asked = [("verify", other, "--against", model), ("compare", other, "--against", model)]
    if kind == "16-bit":
        asked += [("gguf", other), ("gptq", other), ("exl2", other), ("imatrix", other)]
        asked += [("verify", model, "--against", other)]
    for arguments in asked:
        result = command(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert f"architecture '{CLASS}' has no table" in result.stderr, arguments
        assert "config.json" in result.stderr, arguments


def test_header_numbers_are_compared_where_no_block_is_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "free_memory", lambda: 1000)
    monkeypatch.setattr(effort, "QUICK_SECONDS", 0.0)
    good = command("gguf", model, "-q", "q8_0", "-o", tmp_path / "a.gguf")
    assert good.exit_code == 0, good.output
    assert "no blocks and no logits: two decoder blocks need" in good.output
    assert "ok    config" in good.output
    opened = opening.open_gguf

    def damaged(path: Path) -> GGUFFile:
        found = opened(path)
        return replace(found, typed=found.typed | {"llama.rope.freq_base": ("float32", 500000.0)})

    monkeypatch.setattr(opening, "open_gguf", damaged)
    bad = command("gguf", model, "-q", "q8_0", "-o", tmp_path / "b.gguf")
    assert bad.exit_code == 3, bad.output
    assert "rope_theta is 500000.0, the reference has 10000.0" in bad.stderr


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_biases_are_sampled_right(dtype: Any, tmp_path: Path) -> None:
    """q and k biases lie in RoPE's order too, and have one axis."""
    pytest.importorskip("torch")
    model = tiny.tiny_checkpoint(tmp_path / "model", bias=True, dtype=dtype)
    for quants, options in (("f32,f16,q8_0", ()), ("q8_0", ("--effort", "full"))):
        made = command("gguf", model, "-q", quants, "-o", tmp_path / "a.gguf", "--force", *options)
        assert made.exit_code == 0, made.output
        assert made.output.count("ok    weights") == len(quants.split(","))


def test_a_bias_in_the_wrong_order_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", bias=True)
    opened = opening.open_gguf

    def damaged(path: Path) -> GGUFFile:
        found = opened(path)
        data = bytearray(path.read_bytes())
        tensor = found.tensors["blk.1.attn_q.bias"]
        at = slice(tensor.offset, tensor.offset + tensor.nbytes)
        half = tensor.nbytes // 2
        data[at] = data[at][half:] + data[at][:half]
        path.write_bytes(data)
        return opened(path)

    monkeypatch.setattr(opening, "open_gguf", damaged)
    bad = command("gguf", model, "-q", "q8_0", "-o", tmp_path / "b.gguf")
    assert bad.exit_code == 3, bad.output
    assert "blk.1.attn_q.bias" in bad.stderr or "self_attn.q_proj.bias" in bad.stderr
