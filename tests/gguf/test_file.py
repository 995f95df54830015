"""Layout, parser and part files: what we write is read by the gguf library and by ourselves alike."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.gguf.layout import Tensor, lay_out, lay_out_split, padded
from converters.gguf.parse import open_gguf
from converters.gguf.qtypes import QTYPES
from dsconvert.checkpoints.output_files import part_files
from dsconvert.checkpoints.output_plan import UNFINISHED
from dsconvert.errors import CheckpointError, OutputError

KEYS: dict[str, tuple[str, Any]] = {
    "general.architecture": ("string", "llama"),
    "a.uint32": ("uint32", 7),
    "a.float32": ("float32", 0.5),
    "a.bool": ("bool", True),
    "a.int64": ("int64", -(1 << 40)),
    "a.strings": ("array:string", ["", "a b", "\u4e2d\U0001f600"]),
    "a.int32s": ("array:int32", [1, -1, 3]),
    "a.bools": ("array:bool", [True, False]),
    "a.floats": ("array:float32", [0.5, 0.25]),
}
TENSORS = [
    Tensor("token_embd.weight", (5, 64), QTYPES["q8_0"]),
    Tensor("output_norm.weight", (3,), QTYPES["f32"]),
    Tensor("blk.0.attn_q.weight", (4, 32), QTYPES["bf16"]),
    Tensor("blk.0.ffn_up.weight", (2, 256), QTYPES["q6_k"]),
]


def write(folder: Path, max_size: int | None = None) -> list[Path]:
    rng = np.random.default_rng(1)
    layouts = lay_out_split("m.gguf", KEYS, TENSORS, max_size)
    paths = [folder / layout.name for layout in layouts]
    with part_files(paths, [layout.nbytes for layout in layouts], force=False) as parts:
        for layout, part in zip(layouts, parts, strict=True):
            part.write(layout.head, 0)
            for tensor in TENSORS:
                if tensor.name in layout.offsets:
                    data = rng.integers(0, 256, tensor.nbytes, dtype=np.uint8)
                    part.write(data.data, layout.offsets[tensor.name])
    return paths


def test_the_gguf_library_reads_what_we_write(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    theirs = gguf.GGUFReader(path)
    for key, (_, value) in KEYS.items():
        assert theirs.get_field(key).contents() == value
    assert [tensor.name for tensor in theirs.tensors] == [tensor.name for tensor in TENSORS]
    rng = np.random.default_rng(1)
    for their, ours in zip(theirs.tensors, TENSORS, strict=True):
        assert tuple(reversed(their.shape.tolist())) == ours.shape
        assert int(their.tensor_type) == ours.qtype.ggml
        assert their.data_offset % 32 == 0
        raw = np.ascontiguousarray(their.data).view(np.uint8).ravel()
        assert np.array_equal(raw, rng.integers(0, 256, ours.nbytes, dtype=np.uint8))


def test_we_read_what_the_gguf_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("x.u32", 9)
    writer.add_array("x.list", ["one", "two"])
    values = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("w", values)
    quantized = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.keys["x.u32"] == 9
    assert file.keys["x.list"] == ["one", "two"]
    assert np.array_equal(file.tensors["w"].float32(), values)
    assert np.array_equal(file.tensors["q"].blocks(), quantized)


def test_exact_size_is_known_before_writing(tmp_path: Path) -> None:
    layout = lay_out("m.gguf", KEYS, TENSORS)
    (path,) = write(tmp_path)
    assert path.stat().st_size == layout.nbytes


def test_split_set_has_llama_cpps_names_and_keys(tmp_path: Path) -> None:
    paths = write(tmp_path, max_size=padded(TENSORS[0].nbytes) + 1)
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        assert reader.get_field("split.no").contents() == number
        assert reader.get_field("split.no").types == [gguf.GGUFValueType.UINT16]
        assert reader.get_field("split.count").contents() == len(paths)
        assert reader.get_field("split.tensors.count").contents() == len(TENSORS)
        assert ("a.uint32" in reader.fields) == (number == 0)
    file = open_gguf(paths[0])
    assert list(file.tensors) == [tensor.name for tensor in TENSORS]
    with pytest.raises(CheckpointError, match="not the first"):
        open_gguf(paths[1])
    paths[2].unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_gguf(paths[0])


def test_damaged_files_are_refused_in_one_paragraph(tmp_path: Path) -> None:
    (path,) = write(tmp_path)
    good = path.read_bytes()
    head = len(lay_out("m.gguf", KEYS, TENSORS).head)
    rng = random.Random(3)
    bad = tmp_path / "bad.gguf"
    refused = 0
    cases = [good[:cut] for cut in (0, 1, 4, 20, 100, head - 1, head, len(good) - 300)]
    for _ in range(400):
        at, size = rng.randrange(head), rng.choice((1, 4, 8))
        cases.append(good[:at] + rng.randbytes(size) + good[at + size :])
    for case in cases:
        bad.write_bytes(case)
        try:
            open_gguf(bad)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(bad) in str(error)
    assert refused > 100
    for case in cases[:8]:
        bad.write_bytes(case)
        with pytest.raises(CheckpointError):
            open_gguf(bad)


def test_a_huge_count_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(64))
    with pytest.raises(CheckpointError):
        open_gguf(path)


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with pytest.raises(RuntimeError, match="midway"), part_files([path], [100], force=False) as parts:
        parts[0].write(b"half", 0)
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="--force"), part_files([path], [4], force=False):
        pass
    with pytest.raises(RuntimeError), part_files([path], [4], force=True) as parts:
        parts[0].write(b"new!", 0)
        raise RuntimeError
    assert path.read_bytes() == b"precious"
    with part_files([path], [4], force=True) as parts:
        parts[0].write(b"new!", 0)
    assert path.read_bytes() == b"new!"


def test_a_second_writer_is_refused_and_a_dead_ones_part_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    stale = tmp_path / "out.gguf.part"
    stale.write_bytes(b"left by a killed process, and longer than the new file" + UNFINISHED)
    with part_files([path], [4], force=False) as parts:
        with pytest.raises(OutputError, match="another process"), part_files([path], [4], force=False):
            pass
        parts[0].write(b"done", 0)
    assert path.read_bytes() == b"done"
    assert not stale.exists()


def test_a_lock_on_a_renamed_file_is_not_a_lock_on_the_part(tmp_path: Path) -> None:
    """A writer that opened the part just before its owner published it must not truncate the result."""
    path, part = tmp_path / "out.gguf", tmp_path / "out.gguf.part"
    with part_files([path], [4], force=False) as parts:
        late = os.open(part, os.O_RDWR)
        parts[0].write(b"done", 0)
    fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(late)
    with part_files([path], [4], force=True) as parts:
        assert path.read_bytes() == b"done"
        parts[0].write(b"next", 0)
    assert path.read_bytes() == b"next"


def test_no_room_is_said_before_the_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with pytest.raises(OutputError, match="are free"), part_files([path], [1 << 60], force=False):
        pass
    assert list(tmp_path.iterdir()) == []


FULL = """
import sys
from pathlib import Path
from dsconvert.errors import OutputError
from dsconvert.checkpoints.output_files import part_files
try:
    with part_files([Path(sys.argv[1])], [1000], force=False) as parts:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        parts[0].write(bytes(10_000), 0)
except OutputError as error:
    sys.exit(str(error))
"""


def test_a_file_too_large_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    assert resource.RLIMIT_FSIZE
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=False)
    assert "too large for its file system or for this process" in done.stderr
    assert "--split-max-size" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="mkdir"),
        part_files([tmp_path / "no" / "out.gguf"], [4], force=False),
    ):
        pass
