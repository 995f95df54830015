"""Importance matrices: both formats read, misfits named, and whole conversions against ggml's bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import ggml_oracle
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from click.testing import CliRunner

from converters.gguf import importance
from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.gguf.plan import prepare
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, UsageError
from dsconvert.events import Warn

gguf = pytest.importorskip("gguf", reason="needs the gguf library")

Floats = npt.NDArray[np.float32]
D, FF, LAYERS = 256, 512, 2
COLUMNS = {
    "attn_q": D,
    "attn_k": D,
    "attn_v": D,
    "attn_output": D,
    "ffn_gate": D,
    "ffn_up": D,
    "ffn_down": FF,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"), d=D, ff=FF, heads=4, kv_heads=2)


def sums_of_a_model(layers: int = LAYERS) -> dict[str, Floats]:
    rng = np.random.default_rng(31)
    names = {f"blk.{i}.{key}.weight": size for i in range(layers) for key, size in COLUMNS.items()}
    return {key: rng.lognormal(sigma=2, size=size).astype(np.float32) * 999 for key, size in names.items()}


def write_gguf(path: Path, sums: dict[str, Floats], counts: dict[str, Any], kind: str = "imatrix") -> Path:
    """As llama-imatrix writes it, by the gguf library; an entry's count is 1000 unless told."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.txt", "code.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in sums.items():
        writer.add_tensor(name + ".in_sum2", values)
        writer.add_tensor(name + ".counts", np.atleast_1d(np.array(counts.get(name, 1000), np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat(sums: dict[str, Floats], calls: int = 10, trailer: bytes = b"") -> bytes:
    """The older format, as the imatrix tool of early 2024 wrote it."""
    data = struct.pack("<i", len(sums))
    for name, values in sums.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    return data + trailer


def test_a_gguf_matrix_is_sums_over_counts(tmp_path: Path) -> None:
    sums = sums_of_a_model()
    matrix = importance.read(write_gguf(tmp_path / "m.gguf", sums, {"blk.0.attn_q.weight": 3}))
    assert matrix.values.keys() == sums.keys()
    for name, values in sums.items():
        count = np.float32(3 if name == "blk.0.attn_q.weight" else 1000)
        assert matrix.values[name].dtype == np.float32
        assert (matrix.values[name] == values / count).all()
    assert matrix.unusable == {}
    assert matrix.keys == {
        "quantize.imatrix.file": ("string", "m.gguf"),
        "quantize.imatrix.dataset": ("string", "wiki.txt"),
        "quantize.imatrix.entries_count": ("uint32", len(sums)),
        "quantize.imatrix.chunks_count": ("uint32", 7),
    }


@pytest.mark.parametrize("trailer", [b"", struct.pack("<i", 9), struct.pack("<ii", 9, 4) + b"wiki"])
def test_the_older_format_with_and_without_its_trailer(tmp_path: Path, trailer: bytes) -> None:
    sums = sums_of_a_model()
    path = tmp_path / "imatrix.dat"
    path.write_bytes(dat(sums, 10, trailer))
    matrix = importance.read(path)
    assert matrix.values.keys() == sums.keys()
    assert all((matrix.values[name] == values / np.float32(10)).all() for name, values in sums.items())
    assert matrix.chunks == (9 if trailer else 0)
    assert matrix.datasets == (("wiki",) if len(trailer) > 4 else ())


def test_entries_that_say_nothing_are_left_out_and_named(tmp_path: Path) -> None:
    sums = {
        name: np.ones(32, np.float32) for name in ("good", "unseen", "nan", "infinite", "negative", "two")
    }
    sums["nan"][3], sums["infinite"][3], sums["negative"][3] = np.nan, np.inf, -1
    matrix = importance.read(write_gguf(tmp_path / "m.gguf", sums, {"unseen": 0, "two": [5, 5, 5]}))
    assert list(matrix.values) == ["good"]
    assert "32 values for 3 matrices" in matrix.unusable["two"]
    assert matrix.unusable.keys() == {"unseen", "nan", "infinite", "negative", "two"}
    assert "count of 0" in matrix.unusable["unseen"]
    assert "NaN" in matrix.unusable["nan"] == matrix.unusable["infinite"] == matrix.unusable["negative"]
    assert matrix.keys["quantize.imatrix.entries_count"] == ("uint32", 6)


def test_a_stack_has_a_row_for_each_matrix(tmp_path: Path) -> None:
    sums = {"a": np.arange(32, dtype=np.float32)}
    matrix = importance.read(write_gguf(tmp_path / "m.gguf", sums, {"a": [4, 0]}))
    assert matrix.values["a"].tolist() == [[i / 4 for i in range(16)], [1.0] * 16]
    assert matrix.untouched == {"a": (1,)}


def test_a_zero_among_the_values_is_data(tmp_path: Path) -> None:
    sums = {"a": np.array([0, 2] * 16, np.float32)}
    assert (
        importance.read(write_gguf(tmp_path / "m.gguf", sums, {"a": 4})).values["a"] == [0, 0.5] * 16
    ).all()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short"),
        (struct.pack("<i", 0), "0 entries"),
        (struct.pack("<i", -5), "-5 entries"),
        (struct.pack("<ii", 1, 1 << 30), "does not fit"),
        (struct.pack("<ii", 1, -1), "does not fit"),
        (dat({"a": np.ones(8, np.float32)})[:-1], "does not fit"),
        (dat({"a": np.ones(8, np.float32)}, trailer=b"\1\0\0\0\4\0\0\0wi"), "does not fit"),
        (b"GGUF\3\0\0\0", "header"),
        (b"no matrix at all, just text", "does not fit|entries"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        importance.read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        importance.read(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="not an importance matrix"):
        importance.read(write_gguf(tmp_path / "model.gguf", sums_of_a_model(), {}, kind="model"))
    writer = gguf.GGUFWriter(tmp_path / "half.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("a.in_sum2", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="missing"):
        importance.read(tmp_path / "half.gguf")


@pytest.mark.skipif(not ggml_oracle.available(), reason=ggml_oracle.MISSING)
@pytest.mark.parametrize(
    "quant",
    ["q4_0", "q5_1", "q2_k_s", "q3_k_m", "q4_k_m", "q5_k_s", "q6_k", "iq4_nl", "iq4_xs", "iq3_xxs", "iq2_m"],
)
def test_every_tensor_has_the_bytes_that_ggml_gives_it(tmp_path: Path, checkpoint: Path, quant: str) -> None:
    """q and k as well, whose rows are reordered: importance belongs to columns."""
    sums = sums_of_a_model()
    matrix = write_gguf(tmp_path / "m.gguf", sums, {})
    outs = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    for out, kind, used in ((outs[0], "f32", None), (outs[1], quant, matrix)):
        list(convert(Options(str(checkpoint), (kind,), out, effort="off", imatrix=used)))
    plain, made = (open_gguf(out) for out in outs)
    assert made.keys["quantize.imatrix.file"] == "m.gguf"
    weighted = 0
    for name, tensor in made.tensors.items():
        values = plain.tensors[name].float32()
        kind = tensor.qtype.name
        if kind == "f32":
            assert (tensor.float32() == values).all()
            continue
        used = sums[name] / np.float32(1000) if name in sums else None
        want = ggml_oracle.quantize(kind, values, used)
        assert (tensor.blocks() == want).all(), name
        weighted += used is not None and bool((want != ggml_oracle.quantize(kind, values)).any())
    assert weighted == LAYERS * len(COLUMNS), "the matrix changed too few tensors: this test tests nothing"


def test_what_goes_without_is_named(tmp_path: Path, checkpoint: Path) -> None:
    sums = sums_of_a_model()
    del sums["blk.1.ffn_up.weight"]
    sums["blk.0.attn_q.weight"] = np.ones(D + 1, np.float32)
    matrix = write_gguf(tmp_path / "m.gguf", sums, {"blk.0.ffn_down.weight": 0})
    options = Options(str(checkpoint), ("q4_0",), tmp_path / "o.gguf", effort="off", imatrix=matrix)
    events = list(convert(options))
    notes = [event.text for event in events if isinstance(event, Warn) and "importance" in event.text]
    text = "\n".join(notes)
    assert len(notes) == 3
    assert "has no data: token_embd.weight" in text
    assert "blk.1.ffn_up.weight" in text
    assert f"has {D + 1} values for {D} columns: blk.0.attn_q.weight" in text
    assert "count of 0: its input was never seen: blk.0.ffn_down.weight" in text
    used = prepare(replace(options, force=True)).importance
    assert used.keys() == sums.keys() - {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"}


def test_the_command_takes_a_matrix_and_proves_the_result(tmp_path: Path) -> None:
    outputs = prepare(Options("sample:", ("q4_k_m",), tmp_path / "o.gguf", dry_run=True)).outputs
    rng = np.random.default_rng(32)
    sums = {
        tensor.name: rng.lognormal(sigma=0.5, size=tensor.shape[-1]).astype(np.float32)
        for tensor in outputs[0].tensors.values()
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }
    write_gguf(tmp_path / "m.gguf", sums, {})
    command = ["gguf", "sample:", "-q", "q4_k_m", "-o", str(tmp_path / "o.gguf"), "--json"]
    done = CliRunner().invoke(cli, [*command, "--imatrix", str(tmp_path / "m.gguf")])
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.output.splitlines()]
    assert sum("without importance" in event.get("text", "") for event in events) == 1
    checks = [event for event in events if event["event"] == "check"]
    assert len(checks) > 5
    assert all(check["passed"] for check in checks), checks
    again = CliRunner().invoke(cli, [*command, "--force", "--imatrix", str(tmp_path / "none.gguf")])
    assert again.exit_code == 2
    assert "cannot be read" in again.output


def test_a_matrix_of_another_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    other = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_qkv.weight": np.ones(64, np.float32)}, {})
    with pytest.raises(UsageError, match="nothing for this model"):
        prepare(Options(str(checkpoint), ("q4_0",), tmp_path / "o.gguf", imatrix=other))


def test_a_matrix_of_this_model_is_no_fault_where_its_layers_take_none(tmp_path: Path) -> None:
    """Of a ternary file the embedding alone takes importance, of which no matrix has data."""
    options = Options("sample:", ("tq1_0",), tmp_path / "o.gguf", dry_run=True)
    layers = [t for t in prepare(options).outputs[0].tensors.values() if t.name.startswith("blk.")]
    sums = {t.name: np.ones(t.shape[-1], np.float32) for t in layers if len(t.shape) == 2}
    job = prepare(replace(options, imatrix=write_gguf(tmp_path / "m.gguf", sums, {})))
    assert job.importance == {}
    assert {t.qtype.name for t in job.outputs[0].tensors.values()} >= {"tq1_0", "q6_k"}


def test_q2_k_s_is_refused_without_its_data(tmp_path: Path, checkpoint: Path) -> None:
    sums = sums_of_a_model()
    del sums["blk.1.ffn_up.weight"]
    partial = write_gguf(tmp_path / "m.gguf", sums, {})
    for imatrix, said in ((None, "--imatrix FILE"), (partial, r"none that fits blk\.1\.ffn_up")):
        with pytest.raises(ConversionError, match=said):
            prepare(Options(str(checkpoint), ("q2_k_s",), tmp_path / "o.gguf", imatrix=imatrix))


def test_types_that_take_none_are_told_apart(tmp_path: Path, checkpoint: Path) -> None:
    matrix = write_gguf(tmp_path / "m.gguf", sums_of_a_model(), {})
    job = prepare(Options(str(checkpoint), ("q8_0",), tmp_path / "o.gguf", imatrix=matrix))
    assert any("changes nothing" in note for note in job.notes)
    assert job.importance == {}
