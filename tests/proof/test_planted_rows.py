"""Defects of single rows in files of every type: found and named by `verify`; a faithful file passes.

One file holds one of each: a row zeroed, two rows swapped, one row scaled by 1.05, two heads' rows
exchanged, two heads' columns exchanged, two rows of the embedding swapped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harm
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.checkpoints.quantized import QuantizedSource
from dsconvert.cli import cli

pytest.importorskip("torch")
Floats = npt.NDArray[np.float32]
# Types, and where a block keeps the float16 numbers that all its values are multiples of.
BLOCKS = ("q8_0", "q6_k", "q5_k", "q5_0", "q5_1", "q4_k", "q4_0", "q4_1", "q3_k", "q2_k")
SCALES = {"f32": (), "f16": (), "bf16": ()} | {kind: harm.SCALES[kind] for kind in BLOCKS}
MIXTURES = {kind: f"{kind}_s" if kind in ("q3_k", "q4_k", "q5_k") else kind for kind in SCALES}
WEIGHTED = ("q6_k", "q4_k", "q4_0", "q3_k", "q2_k")
FACTOR = np.float32(1.05)
# GGUF name, Hugging Face name, what is said of it.
PLANTED = (
    ("blk.0.attn_v", "layers.0.self_attn.v_proj", "row 70 (head 1) is zero, and the checkpoint's is not"),
    ("blk.1.ffn_up", "layers.1.mlp.up_proj", "row 3 points elsewhere"),
    ("blk.0.ffn_down", "layers.0.mlp.down_proj", "row 9 is 1.0"),
    ("blk.0.attn_q", "layers.0.self_attn.q_proj", "row 0 (head 0) points elsewhere"),
    ("blk.1.attn_output", "layers.1.self_attn.o_proj", "(head 0) points elsewhere"),
    ("token_embd", "embed_tokens", "row 40 points elsewhere"),
)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def verify(path: Path, *options: object) -> Result:
    short = ("--windows", 1, "--length", 64, "--json", "-")
    # One page of text turns the top token of 2-bit files easily; this is about weights.
    lenient = ("--max-kld", 20, "--max-ppl-ratio", 1000, "--min-top1", 0)
    return command("verify", path, "--against", "sample:", *short, *lenient, *options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample in every type, and in some by an importance matrix."""
    folder = tmp_path_factory.mktemp("files")
    common = ("--pure", "--verify", "off", "--threads", 2)
    made = command("gguf", "sample:", "-q", ",".join(MIXTURES.values()), "-o", folder / "a.gguf", *common)
    assert made.exit_code == 0, made.output
    found = {kind: folder / f"a-{name}.gguf" for kind, name in MIXTURES.items()}
    names = [MIXTURES[kind] for kind in WEIGHTED]
    calib = ("--calib", "builtin", "--calib-samples", 2, "--calib-len", 128)
    made = command("gguf", "sample:", "-q", ",".join(names), "-o", folder / "w.gguf", *calib, *common)
    assert made.exit_code == 0, made.output
    return found | {f"{kind} weighted": folder / f"w-{MIXTURES[kind]}.gguf" for kind in WEIGHTED}


EVERY = (*SCALES, *(f"{kind} weighted" for kind in WEIGHTED))


def rows_of(data: bytearray, file: GGUFFile, name: str) -> npt.NDArray[np.uint8]:
    """The stored rows of a tensor, to be changed in place."""
    tensor = file.tensors[f"{name}.weight"]
    flat = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset)
    return flat.reshape(tensor.shape[0], -1)


def scale(row: npt.NDArray[np.uint8], kind: str, size: int) -> None:
    """Make a stored row 1.05 times as long."""
    if kind in ("f32", "f16"):
        row.view({"f32": "<f4", "f16": "<f2"}[kind])[:] *= FACTOR
    elif kind == "bf16":
        wide = (row.view("<u2").astype(np.uint32) << 16).view(np.float32) * FACTOR
        row.view("<u2")[:] = wide.view(np.uint32) >> 16
    for at in SCALES[kind]:
        blocks = row.reshape(-1, size)
        field = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2") * FACTOR
        blocks[:, at : at + 2] = field.astype("<f2").view(np.uint8)


def plant(source: Path, target: Path) -> Path:
    file, data = open_gguf(source), bytearray(source.read_bytes())
    rows_of(data, file, "blk.0.attn_v")[70] = 0
    up = rows_of(data, file, "blk.1.ffn_up")
    up[[3, 700]] = up[[700, 3]]
    down = file.tensors["blk.0.ffn_down.weight"].qtype
    scale(rows_of(data, file, "blk.0.ffn_down")[9], down.name, down.size)
    q = rows_of(data, file, "blk.0.attn_q")
    q[:128] = np.concatenate([q[64:128], q[:64]])
    embedding = rows_of(data, file, "token_embd")
    embedding[[40, 41]] = embedding[[41, 40]]
    target.write_bytes(data)
    return target


def said(result: Result) -> list[str]:
    checks = json.loads(result.stdout)["checks"]
    return [check["detail"] for check in checks if check["name"] == "weights" and not check["passed"]]


@pytest.mark.parametrize("name", EVERY)
def test_a_faithful_file_of_every_type_passes(files: dict[str, Path], name: str) -> None:
    result = verify(files[name])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert sum(tensor["rows"] for tensor in found["tensors"]) == 9216
    assert any("9,216 rows each on its own" in check["detail"] for check in found["checks"])


@pytest.mark.parametrize("name", EVERY)
def test_wrong_rows_are_found_and_named_in_every_type(
    files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    result = verify(plant(files[name], tmp_path / "bad.gguf"))
    assert result.exit_code == 3, result.output
    details = said(result)
    for _, tensor, words in PLANTED:
        if "o_proj" not in tensor:
            assert any(f"model.{tensor}.weight: {words}" in detail for detail in details), (tensor, details)
            assert words in result.stderr
    wrong = [tensor for _, tensor, _ in PLANTED if any(tensor in detail for detail in details)]
    assert {detail.split(":")[0] for detail in details} <= {f"model.{tensor}.weight" for tensor in wrong}


def damaged(name: str, values: Floats, start: int) -> Floats:
    """Rows from `start` on of a tensor, with what is planted there."""
    made, at = np.array(values), {row - start: row for row in range(start, start + len(values))}
    if name.endswith("layers.0.self_attn.v_proj.weight") and len(values) > 70:
        made[70] = 0
    elif name.endswith("layers.1.mlp.up_proj.weight") and len(values) > 700:
        made[[3, 700]] = values[[700, 3]]
    elif name.endswith("layers.0.mlp.down_proj.weight"):
        for here, row in at.items():
            made[here] *= FACTOR if row == 9 else np.float32(1)
    elif name.endswith("layers.0.self_attn.q_proj.weight") and len(values) == 256:
        made = np.concatenate([values[64:128], values[:64], values[128:]])
    elif name.endswith("layers.1.self_attn.o_proj.weight"):
        made = np.concatenate([values[:, 64:128], values[:, :64], values[:, 128:]], 1)
    elif name.endswith("embed_tokens.weight") and len(values) > 41:
        made[[40, 41]] = values[[41, 40]]
    return made


CALIBRATION = ("--calib", "builtin", "--calib-samples", 2, "--calib-len", 128)
# Options, and whether 1.05 on a row of 768 values is more than the noise of its length.
FOLDERS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "gptq 8": (("gptq", "sample:", "-b", 8, "-g", 64), True),
    "gptq 4": (("gptq", "sample:", "-b", 4, "-g", 64), True),
    "gptq 3": (("gptq", "sample:", "-b", 3, "-g", 32), False),
    "gptq 2": (("gptq", "sample:", "-b", 2, "-g", 32), False),
    "exl2 6": (("exl2", "sample:", "-b", 6), True),
    "exl2 3": (("exl2", "sample:", "-b", 3), False),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_wrong_rows_are_found_and_named_in_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, fine = FOLDERS[name]
    made = command(*options, *CALIBRATION, "-o", tmp_path / "out", "--verify", "off")
    assert made.exit_code == 0, made.output
    faithful = verify(tmp_path / "out")
    assert faithful.exit_code == 0, faithful.output
    whole: Callable[[Any, str], Floats] = QuantizedSource.float32
    part: Callable[[Any, str, int, int], Floats] = QuantizedSource.rows
    monkeypatch.setattr(QuantizedSource, "float32", lambda self, name: damaged(name, whole(self, name), 0))
    monkeypatch.setattr(
        QuantizedSource, "rows", lambda self, name, a, b: damaged(name, part(self, name, a, b), a)
    )
    result = verify(tmp_path / "out")
    assert result.exit_code == 3, result.output
    details = said(result)
    for _, tensor, words in PLANTED:
        if fine or "down_proj" not in tensor:
            assert any(f"model.{tensor}.weight" in d and words in d for d in details), (tensor, details)


def test_quick_compares_the_sampled_rows_each_on_its_own(files: dict[str, Path], tmp_path: Path) -> None:
    """A conversion's own proof: the first rows are among the sampled ones."""
    from converters.gguf import opened as opening

    opened = opening.open_gguf

    def harmed(path: Path) -> GGUFFile:
        file, data = opened(path), bytearray(path.read_bytes())
        rows_of(data, file, "blk.1.attn_q")[2] = 0  # RoPE's order: row 1 of Hugging Face's layout
        path.write_bytes(data)
        return opened(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_gguf", harmed)
        result = command("gguf", "sample:", "-q", "q4_0", "-o", tmp_path / "bad.gguf")
    assert result.exit_code == 3, result.output
    assert "model.layers.1.self_attn.q_proj.weight: row 1 (head 0) is zero" in result.stderr
