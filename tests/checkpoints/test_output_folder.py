"""The model folder: a GPTQ model through solver, packer and writer, read back; its configs; its atomicity."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Tiny, decode, tiny_checkpoint, tiny_config, tiny_tensors, write_json

from converters.gptq.pack import pack
from converters.gptq.reader import open_model
from converters.gptq.settings import quantization_settings
from converters.gptq.shapes import Layout
from dsconvert.checkpoints import marked_folders as folder_module
from dsconvert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsconvert.checkpoints.output_folder import quantized_config, with_both_ropes, write_folder
from dsconvert.checkpoints.safetensors_reader import read_safetensors
from dsconvert.checkpoints.safetensors_writer import Piece, from_array, from_stored, write_safetensors
from dsconvert.checkpoints.source_files import companions
from dsconvert.errors import OutputError
from dsconvert.models.config import load_config, load_json
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import Solved, SolverOptions, solve

LAYOUT = Layout(Scheme(4, 32))


def quantized(checkpoint: Checkpoint, options: SolverOptions) -> tuple[dict[str, Piece], dict[str, Solved]]:
    """Every linear of the blocks solved for random inputs; the output's pieces, and the solutions."""
    generator = torch.Generator().manual_seed(0)
    pieces: dict[str, Piece] = {}
    solutions = {}
    for name, stored in checkpoint.tensors.items():
        if not name.endswith("_proj.weight"):
            pieces[name] = from_stored(stored)
            continue
        weight = torch.from_numpy(checkpoint.float32(name))
        x = torch.randn(400, weight.shape[1], generator=generator)
        solved = solve(weight, 2 / 400 * x.T @ x, options)
        arrays = (part.numpy() for part in (solved.codes, solved.scales, solved.zeros, solved.g_idx))
        packed = pack(*arrays, options.scheme.bits)
        pieces |= {n: from_array(array) for n, array in packed.tensors(name.removesuffix(".weight")).items()}
        solutions[name] = solved
    return pieces, solutions


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", bias=True)


def written(out: Path, source: Path, pieces: Mapping[str, Piece] | None = None, **options: Any) -> Path:
    """Write `pieces` (by default the source's own tensors) as a GPTQ folder."""
    stored = open_checkpoint(source).tensors
    pieces = pieces or {name: from_stored(tensor) for name, tensor in stored.items()}
    settings = quantization_settings(LAYOUT, 0.01)
    extra = {"quantize_config.json": settings}
    write_folder(out, source, load_json(source / "config.json"), pieces, settings, extra=extra, **options)
    return out


@pytest.mark.parametrize(
    "options",
    [
        SolverOptions(Scheme(4, 32)),
        SolverOptions(Scheme(3, 128), act_order=True),
        SolverOptions(Scheme(2, 64, False), act_order=True, dynamic_groups=True),
        SolverOptions(Scheme(8, -1), mse=False),
    ],
    ids=["4bit", "3bit-act", "2bit-dynamic", "8bit"],
)
def test_a_model_is_read_back_as_it_was_solved(tmp_path: Path, source: Path, options: SolverOptions) -> None:
    checkpoint = open_checkpoint(source)
    pieces, solutions = quantized(checkpoint, options)
    out = tmp_path / "out"
    settings = quantization_settings(Layout(options.scheme, options.desc_act), options.damp)
    told: list[str] = []
    nbytes = write_folder(
        out, source, checkpoint_config(source), pieces, settings, shard_bytes=50_000,
        done=lambda name, piece: told.append(name),
    )  # fmt: skip
    model = open_model(out)
    assert model.shapes() == checkpoint.shapes()
    assert len(solutions) == 14
    for name in model.shapes():
        expected = solutions[name].dequantized().numpy() if name in solutions else checkpoint.float32(name)
        np.testing.assert_array_equal(model.float32(name), expected)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    index = load_json(out / "model.safetensors.index.json")
    for path in shards:
        sizes = [pieces[name].nbytes for name, file in index["weight_map"].items() if file == path.name]
        assert sum(sizes) <= 50_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == nbytes == sum(piece.nbytes for piece in pieces.values())
    assert set(told) == set(pieces) == set(index["weight_map"])
    assert not list(tmp_path.glob("*.part*"))


def checkpoint_config(source: Path) -> dict[str, Any]:
    return load_json(source / "config.json")


def test_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    from safetensors import safe_open

    arrays = {
        "odd": np.arange(7, dtype=np.float16),
        "words": np.arange(-6, 6, dtype=np.int32).reshape(3, 4),
        "short": np.arange(-3, 2, dtype=np.int16),
        "strided": np.arange(24, dtype=np.float32).reshape(4, 6).T[::2],
        "bf16": np.array([[0x3F80, 0xC000, 0x7F80]], np.uint16),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    path = tmp_path / "x.safetensors"
    size = write_safetensors(path, {name: from_array(array) for name, array in arrays.items()})
    assert size == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            expected = decode(array) if array.dtype == np.uint16 else array
            tensor = file.get_tensor(name)
            assert tensor.shape == array.shape
            np.testing.assert_array_equal(tensor.float().numpy(), expected.astype(np.float32))
    for stored in read_safetensors(path).values():  # aligned to their types
        assert stored.offset is not None
        assert stored.offset % (stored.nbytes // max(math.prod(stored.shape), 1) or 1) == 0


def test_large_tensors_go_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsconvert.checkpoints.safetensors_writer.CHUNK", 1000)
    array = np.random.default_rng(0).standard_normal((97, 33)).astype(np.float32)
    assert max(len(bytes(chunk)) for chunk in from_array(array).chunks()) <= 1000
    write_safetensors(tmp_path / "a.safetensors", {"x": from_array(array), "v": from_array(array.T)})
    from safetensors.numpy import load_file

    loaded = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded["x"], array)
    np.testing.assert_array_equal(loaded["v"], array.T)


def test_the_settings_block(tmp_path: Path, source: Path) -> None:
    out = written(tmp_path / "out", source)
    block = load_json(out / "config.json")["quantization_config"]
    version = block.pop("meta")["quantizer"]
    assert block == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "true_sequential": True,
        "damp_percent": 0.01,
    }
    assert [text.split(":")[0] for text in version] == ["dsconvert"]
    assert load_json(out / "quantize_config.json") == {**block, "meta": {"quantizer": version}}


ROPES: dict[str, dict[str, Any]] = {
    "old": {"rope_theta": 50000.0, "rope_scaling": None},
    "old linear": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "new": {"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}},
    "new linear": {"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "both": {
        "rope_theta": 1e5,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_both_rope_spellings_say_the_same(tmp_path: Path, name: str) -> None:
    import transformers

    plain = {k: v for k, v in tiny_config(Tiny()).items() if not k.startswith("rope")} | ROPES[name]
    config = quantized_config(plain, quantization_settings(LAYOUT, 0.01))
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    read = []
    for label, raw in (("plain", plain), ("both", config), ("old", old), ("new", new)):
        folder = tmp_path / label
        folder.mkdir()
        write_json(folder / "config.json", raw)
        ours, theirs = load_config(folder), transformers.AutoConfig.from_pretrained(folder)
        rope = dict(theirs.rope_parameters)
        assert rope.pop("type", rope["rope_type"]) == rope["rope_type"]  # transformers keeps the old key
        read.append((ours.rope_theta, ours.rope_scaling, rope))
    assert all(item == read[0] for item in read)
    assert isinstance(config["rope_theta"], float)
    if config["rope_scaling"] is not None:  # one key only: old readers refuse two
        assert len({"type", "rope_type"} & set(config["rope_scaling"])) == 1
        assert ("type" in config["rope_scaling"]) == ("linear" in name or name == "both")


def test_nested_and_foreign_parts_of_a_config() -> None:
    config = {
        "architectures": ["DeepseekVLForConditionalGeneration"],
        "_name_or_path": "somewhere",
        "text_config": {"rope_theta": 10000.0, "hidden_size": 64},
        "vision_config": {"hidden_size": 32},
    }
    out = quantized_config(config, {"bits": 4})
    assert "_name_or_path" not in out
    assert "rope_theta" not in out
    assert out["vision_config"] == {"hidden_size": 32}
    assert out["text_config"]["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert out["text_config"]["rope_scaling"] is None
    assert config["text_config"] == {"rope_theta": 10000.0, "hidden_size": 64}
    assert with_both_ropes({"hidden_size": 1}) == {"hidden_size": 1}


def test_companions_travel_and_nothing_else(tmp_path: Path, source: Path) -> None:
    copy = tiny_checkpoint(tmp_path / "copy")
    for name in ("LICENSE", "chat_template.jinja", "modeling_evil.py", "notes.txt", "training_args.bin"):
        (copy / name).write_text(name)
    out = written(tmp_path / "out", copy)
    expected = {
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in companions(copy)} == expected
    made = {"config.json", "quantize_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == expected | made
    for name in expected:
        assert (out / name).read_bytes() == (copy / name).read_bytes()


def test_a_failure_leaves_nothing(tmp_path: Path, source: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"1234"
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space"):
        written(tmp_path / "out", source, {"x": Piece("F32", (2,), chunks)})
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="announced"):
        written(tmp_path / "out", source, {"x": Piece("F32", (2,), lambda: iter([b"1234"]))})
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_unless_forced(tmp_path: Path, source: Path) -> None:
    out = written(tmp_path / "out", source)
    (out / "LICENSE-mark").touch()
    with pytest.raises(OutputError, match="--force"):
        written(out, source)
    assert (out / "LICENSE-mark").exists()
    written(out, source, force=True)
    assert not (out / "LICENSE-mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    photos = tmp_path / "photos"
    photos.mkdir()
    written(photos, source)  # an empty folder is taken
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").touch()
    (tmp_path / "file").touch()
    for name in ("other", "file"):
        with pytest.raises(OutputError, match="is not a model folder"):
            written(tmp_path / name, source, force=True)
    assert (tmp_path / "other" / "holiday.jpg").exists()


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path, source: Path, monkeypatch: Any) -> None:
    out = written(tmp_path / "out", source)
    (out / "LICENSE-mark").touch()
    real = os.replace

    def refuse(a: Any, b: Any) -> None:
        if str(a).endswith(".part"):
            raise OSError(5, "Input/output error")
        real(a, b)

    monkeypatch.setattr(folder_module.os, "replace", refuse)
    with pytest.raises(OutputError, match="Input/output"):
        written(out, source, force=True)
    assert (out / "LICENSE-mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_rest_of_a_killed_run_is_cleared(tmp_path: Path, source: Path) -> None:
    part = tmp_path / "out.part"
    part.mkdir()
    folder_module.mark(part, "part")
    (part / "vision").mkdir()
    (part / "vision" / "model.safetensors").write_bytes(b"half")
    (part / "model-00001-of-00009.safetensors").write_bytes(b"half")
    out = written(tmp_path / "out", source)
    assert not part.exists()
    assert not (out / "model-00001-of-00009.safetensors").exists()


def test_another_process_at_the_same_output_is_seen(tmp_path: Path, source: Path) -> None:
    part = tmp_path / "out.part"
    part.mkdir()
    folder_module.mark(part, "part")
    (part / "theirs").touch()
    descriptor = os.open(part, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match="another process"):
            written(tmp_path / "out", source)
        assert (part / "theirs").exists()
    finally:
        os.close(descriptor)


def test_no_room_and_no_parent_are_said_before_work(tmp_path: Path, source: Path) -> None:
    huge = Piece("F32", (1 << 50,), lambda: iter(()))
    with pytest.raises(OutputError, match="are free"):
        written(tmp_path / "out", source, {"x": huge})
    with pytest.raises(OutputError, match="mkdir"):
        written(tmp_path / "missing" / "out", source)
    assert not list(tmp_path.iterdir())


def test_what_is_not_quantized_keeps_its_type(tmp_path: Path) -> None:
    for dtype in ("bf16", "f16", "f32"):
        for form in ("safetensors", "bin"):
            options = Tiny(layers=1, dtype=dtype, format=form, tokenizer=False)  # type: ignore[arg-type]
            base = tiny_checkpoint(tmp_path / f"{dtype}-{form}", options)
            out = written(tmp_path / f"{dtype}-{form}-out", base)
            config = load_json(out / "config.json")
            del config["quantization_config"]
            write_json(out / "config.json", config)
            back = open_checkpoint(out)
            for name in tiny_tensors(options):
                assert back.dtype(name) == dtype
                assert back.tensors[name].data.tobytes() == open_checkpoint(base).tensors[name].data.tobytes()
