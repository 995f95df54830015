"""GGUF files of others, and what is taken for one: every type and value is shown, every mistake named."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from converters.gguf.inspect import pre_tokenizer
from converters.gguf.layout import encode_string, encode_value
from converters.gguf.parse import open_gguf
from converters.gguf.qtypes import BY_ID
from dsconvert.checkpoints.locate import locate
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, TokenizerError
from tokenizer_tools.load import load_tokenizer
from tokenizer_tools.rebuild import gguf_keys, rebuild

NUMBERS = (np.int8, np.int16, np.int32, np.int64, np.float64)


def opaque(kind: Any) -> bool:
    """Whether the gguf library makes no numbers of a type, and none are stored as they are."""
    if kind.name in ("I8", "I16", "I32", "I64", "F64"):
        return False
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return True
    return False


def write(path: Path, kind: Any, rows: int = 4, columns: int = 256) -> Path:
    """A file with one tensor of a type, all zeros, by the gguf library."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((rows, columns // block * size), np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def inspect(path: Path, *options: str) -> Any:
    return CliRunner().invoke(cli, ["inspect", str(path), *options])


def test_the_table_of_types_is_the_gguf_librarys() -> None:
    theirs = {int(kind): (kind.name.lower(), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: (row.name, row.block, row.size) for number, row in BY_ID.items()}
    assert {number: ours.get(number) for number in theirs} == theirs


@pytest.mark.parametrize("kind", list(gguf.GGML_QUANT_SIZES), ids=lambda kind: kind.name)
def test_every_type_is_shown_and_refused_only_for_its_values(kind: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    result = inspect(path, "--tensors")
    assert result.exit_code == 0, result.output
    assert kind.name.lower() in result.output
    assert f"{4 * 256 // block * size:,}" in result.output
    tensor = open_gguf(path).tensors["blk.0.attn_q.weight"]
    if opaque(kind):
        with pytest.raises(CheckpointError, match=f"of type {kind.name.lower()}, whose values cannot be"):
            tensor.float32()
    else:
        values = tensor.float32()
        assert values.shape == (4, 256)
        assert np.isfinite(values).all()


def test_plain_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    stored = {kind: np.array([[-3, 0, 7, 100]], kind) for kind in NUMBERS}
    for kind, value in stored.items():
        writer.add_tensor(kind.__name__, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x.gguf")
    for kind, value in stored.items():
        assert np.array_equal(file.tensors[kind.__name__].float32(), value), kind


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", gguf.GGMLQuantizationType.I8)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    assert struct.unpack_from("<I", data, at) == (24,)
    struct.pack_into("<I", data, at, 99)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight' has type 99"):
        open_gguf(path)


def with_value(path: Path, value: bytes) -> Path:
    """A file of one key with these bytes, type first, and no tensor."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + encode_string("x.y") + value)
    return path


def nested(depth: int, items: bytes, count: int) -> bytes:
    """An array of one array of one array ... of `items`, int32."""
    inner = struct.pack("<IQ", 5, count) + items
    for _ in range(depth):
        inner = struct.pack("<IQ", 9, 1) + inner
    return struct.pack("<I", 9) + inner


def test_an_array_of_arrays_is_shown(tmp_path: Path) -> None:
    rows = [struct.pack(f"<IQ{len(row)}i", 5, len(row), *row) for row in ([1, 2, 3], [4], [])]
    value = struct.pack("<IIQ", 9, 9, 3) + b"".join(rows)
    path = with_value(tmp_path / "x.gguf", value)
    assert open_gguf(path).typed["x.y"] == ("array:array", [[1, 2, 3], [4], []])
    assert "[[1, 2, 3], [4], []]" in inspect(path).output
    assert open_gguf(with_value(path, nested(2, struct.pack("<i", 5), 1))).keys["x.y"] == [[[5]]]


@pytest.mark.parametrize(
    "value",
    [nested(3000, b"", 0), nested(1, b"", 9), struct.pack("<IIQ", 9, 9, 1 << 60)],
    ids=["too deep", "cut short", "too many"],
)
def test_arrays_that_cannot_be_are_refused(value: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be|ends inside"):
        open_gguf(with_value(tmp_path / "x.gguf", value))


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", "x")


OTHERS: dict[str, tuple[bytes, str]] = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64, "a Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html><body>401</body></html>", "a web page"),
    "html after a blank line": (b"\n  <html lang='en'>", "a web page"),
    "lower case": (b"<!doctype html>", "a web page"),
    "ggjt": (b"tjgg" + struct.pack("<I", 3) + bytes(64), "old GGML format"),
    "ggml": (b"lmgg" + bytes(64), "old GGML format"),
    "ggla": (b"algg" + bytes(64), "old GGML format"),
    "json": (b'{"error": "Repository not found"}', "a JSON text"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "a gzip file"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
    "noise": (b"whatever it is", r"it begins with b'whatever'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "big-endian, version 2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big-endian"),
    "version 1": (b"GGUF" + struct.pack("<IIQ", 1, 0, 0), "GGUF version 1 is not supported"),
    "a later version": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "GGUF version 4 is not supported"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_gguf_file_is_named(case: str, tmp_path: Path) -> None:
    data, message = OTHERS[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    result = inspect(path)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    with pytest.raises(CheckpointError, match=message):
        open_gguf(path)


def test_a_zip_file_is_named(tmp_path: Path) -> None:
    archive(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="a zip file"):
        open_gguf(tmp_path / "x.gguf")


def test_text_that_utf8_cannot_hold_is_written_with_its_mark() -> None:
    name = os.fsdecode(b"caf\xe9-model")
    assert encode_string(name)[8:] == "caf\ufffd-model".encode()
    assert encode_value("array:string", ["\ud83d", "ok"]) == encode_value("array:string", ["\ufffd", "ok"])


@pytest.mark.parametrize("folder", [b"caf\xe9-model", b"\xff\xfe", "\u6a21\u578b".encode()])
def test_a_folder_whose_name_is_no_utf8_converts(folder: bytes, tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(folder)
    shutil.copytree(locate("sample:"), source)
    out = tmp_path / "x.gguf"
    result = CliRunner().invoke(cli, ["gguf", os.fsdecode(source), "-o", str(out), "--quant", "q8_0"])
    assert result.exit_code == 0, ascii(result.output)
    name = folder.decode("utf-8", "replace").replace("-", " ")
    assert open_gguf(out).keys["general.name"] == name
    assert gguf.GGUFReader(out).get_field("general.name").contents() == name


ODD: list[tuple[str, Any]] = [
    ("tokenizer.ggml.tokens", [["a"], "b"]),
    ("tokenizer.ggml.tokens", [1, 2]),
    ("tokenizer.ggml.merges", [["a", "b"]]),
    ("tokenizer.ggml.token_type", ["1"]),
    ("tokenizer.ggml.tokens", "text"),
]


@pytest.mark.parametrize(("key", "value"), ODD)
def test_a_vocabulary_of_another_kind_is_refused(key: str, value: Any) -> None:
    data = load_tokenizer(locate("sample:"), 2048)
    keys = {name: typed[1] for name, typed in gguf_keys(data, "deepseek-llm").items()}
    with pytest.raises(TokenizerError, match=key):
        rebuild({**keys, key: value})
    assert rebuild({**keys, "dsconvert.tokenizer.added.lstrip": [[1], 2000]}).token_to_id("!") == 0


@pytest.mark.parametrize("name", ["type", "regex", "behavior", "invert"])
def test_a_spec_that_is_no_list_is_not_shown(name: str) -> None:
    prefix = "dsconvert.pre_tokenizer."
    keys: dict[str, Any] = {
        prefix + "type": ["digits"],
        prefix + "regex": [""],
        prefix + "behavior": ["isolated"],
        prefix + "invert": [False],
    }
    assert pre_tokenizer(keys) is not None
    assert pre_tokenizer({**keys, prefix + name: 7}) is None
