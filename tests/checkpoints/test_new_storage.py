"""A storage of weights that nothing here knows is one function beside the readers: all else reads its rows.

The toy holds a byte for each weight and a scale for each block of 8 by 32 of them, in safetensors files, as
fp8 checkpoints do with blocks of 128 by 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from click.testing import CliRunner
from safetensors.numpy import save_file

from converters.gguf.parse import open_gguf
from converters.gptq.convert import convert
from converters.gptq.reader import open_model
from dsconvert.checkpoints import checkpoint
from dsconvert.checkpoints.safetensors_reader import Stored
from dsconvert.checkpoints.weight_files import Weights, open_weights
from dsconvert.cli import cli

ROWS, COLUMNS = 8, 32
OPTIONS = tiny.Tiny(d=256, ff=256, layers=1, dtype="f32")


def decoded(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """All of the storage: each pair of bytes and scales as one tensor that is read by `decode`."""
    found = {}
    for name, stored in tensors.items():
        if f"{name}_scale" in tensors:
            found[name] = one(stored, tensors[f"{name}_scale"])
        elif not name.endswith(".weight_scale"):
            found[name] = stored
    return found


def one(stored: Stored, scales: Stored) -> Stored:
    codes = np.memmap(stored.path, np.uint8, "r", stored.offset or 0, stored.shape)

    def decode(start: int, stop: int) -> npt.NDArray[np.float32]:
        first, end = start // ROWS, -(-stop // ROWS)
        scale = scales.rows(first, end).repeat(ROWS, 0).repeat(COLUMNS, 1)
        values = codes[start:stop].astype(np.float32) - np.float32(128)
        return values * scale[start - first * ROWS : stop - first * ROWS]

    nbytes = stored.nbytes + scales.nbytes
    return replace(stored, dtype="toy8", nbytes=nbytes, offset=None, data=None, decode=decode)


def bytes_and_scales(exact: npt.NDArray[np.float32]) -> dict[str, Any]:
    blocks = np.abs(exact).reshape(exact.shape[0] // ROWS, ROWS, exact.shape[1] // COLUMNS, COLUMNS)
    scales = (blocks.max(axis=(1, 3)) / np.float32(127)).astype(np.float32)
    codes = np.rint(exact / scales.repeat(ROWS, 0).repeat(COLUMNS, 1)) + 128
    return {"": codes.astype(np.uint8), "_scale": scales}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model twice: in the toy's storage, matrices of the embedding and head too, and in float32."""
    toy = tiny.tiny_checkpoint(tmp_path_factory.mktemp("toy") / "model", OPTIONS)
    plain = tiny.tiny_checkpoint(tmp_path_factory.mktemp("plain") / "model", OPTIONS)
    stored: dict[str, Any] = {}
    for name, exact in tiny.tiny_tensors(OPTIONS).items():
        parts = bytes_and_scales(exact) if exact.ndim == 2 else {"": exact}
        stored |= {name + suffix: value for suffix, value in parts.items()}
    save_file(stored, toy / "model.safetensors")
    tensors = decoded(open_weights(toy).tensors)
    tiny.write_weights(plain, {n: t.rows(0, t.shape[0]) for n, t in tensors.items()}, OPTIONS)
    return toy, plain


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint's opening would say of the storage: one line."""

    def opened(folder: Path, elsewhere: Any = None) -> Weights:
        weights = open_weights(folder, elsewhere)
        return weights._replace(tensors=decoded(weights.tensors))

    monkeypatch.setattr(checkpoint, "open_weights", opened)


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_k_m", "iq4_xs"])
def test_its_gguf_file_is_that_of_the_plain_checkpoint(folders: tuple[Path, Path], quant: str) -> None:
    toy, _ = folders
    assert checkpoint.open_checkpoint(toy).dtype("model.layers.0.mlp.up_proj.weight") == "toy8"
    for folder in folders:
        effort = "quick" if folder == toy else "off"
        arguments = ["-q", quant, "--effort", effort, "--force", "-o", str(folder / f"{quant}.gguf")]
        made = CliRunner().invoke(cli, ["gguf", str(folder), *arguments])
        assert made.exit_code == 0, made.output
    ours, theirs = (open_gguf(folder / f"{quant}.gguf").tensors for folder in folders)
    for name, tensor in ours.items():
        assert np.array_equal(tensor.blocks(), theirs[name].blocks()), name
    told = CliRunner().invoke(cli, ["verify", str(toy / f"{quant}.gguf"), "--against", str(toy)])
    assert told.exit_code == 0, told.output


def test_its_gptq_folder_holds_the_plain_checkpoints_numbers(folders: tuple[Path, Path]) -> None:
    pytest.importorskip("torch")
    asked = {"calib": "builtin", "calib_samples": 2, "calib_len": 64, "device": "cpu", "effort": "off"}
    outs = [folder.with_name("gptq") for folder in folders]
    for folder, out in zip(folders, outs, strict=True):
        list(convert(calibrated.gptq_options(folder, out=out, **asked)))
    ours, theirs = map(open_model, outs)
    assert ours.shapes() == theirs.shapes()
    for name in ours.shapes():
        assert np.array_equal(ours.float32(name), theirs.float32(name)), name
