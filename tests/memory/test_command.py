"""`dsconvert memory` as it is typed: every kind of model, what fits, and what was measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gptq.pack import stored_shapes
from converters.sizes import sizes_of
from dsconvert.cli import cli
from dsconvert.memory.runtimes import GIB
from tests.support import tiny, tiny_vl
from tests.support.published_memory import CONFIG_7B, CONFIG_V2_LITE, LENGTHS, PUBLISHED_7B


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["memory", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def found(*words: object) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(*words, "--json").splitlines()[-1])
    return value


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder that holds a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_7B), encoding="utf-8")
    return tmp_path


def test_a_config_alone_gives_the_published_table(alone: Path) -> None:
    for place in (alone, alone / "config.json"):
        rows = found(place, "--batch", "1,2,4,8,16", "--types", "bf16", "--runtime", "eager")["rows"]
        for row, figures in zip(rows, PUBLISHED_7B.values(), strict=True):
            assert [peak["length"] for peak in row["peaks"]] == list(LENGTHS)
            for peak, figure in zip(row["peaks"], figures, strict=True):
                parts = [peak[part] for part in ("weights", "cache", "activations", "runtime")]
                assert sum(parts) == peak["bytes"]
                assert figure is None or peak["bytes"] / GIB == pytest.approx(figure, rel=0.1)


def test_what_fits_a_card_is_said_with_the_command_that_makes_it(alone: Path) -> None:
    text = run(alone, "--vram", "24GB", "--batch", "1,16")
    assert "best for 24.00 GiB: bf16 in transformers, up to 4096 tokens at batch 1\n    it is there" in text
    assert "OOM" in text  # of 16 sequences
    small = found(alone, "--vram", "8GiB")
    assert small["vram"] == 8 * GIB
    assert small["best"]["type"] == "q6_k"
    assert small["best"]["command"] == f"dsconvert gguf {shlex.quote(str(alone))} --quant q6_k"
    assert {row["longest"] for row in small["rows"] if row["type"] == "bf16"} == {0}
    assert "nothing fits 1.00 GiB" in run(alone, "--vram", "1G")
    assert found(alone, "--vram", "3.2G", "--seq", "4096")["best"]["longest"] < 4096  # the most that fits


@pytest.mark.parametrize("quant", ["bf16", "q4_k_m"])
def test_weights_are_those_of_the_files_that_are_made(quant: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    list(convert(Options("sample:", (quant,), out, effort="off")))
    sizes = {made.type: made.weights for made in sizes_of("sample:").types if "llama.cpp" in made.runtimes}
    (made,) = sizes_of(str(out)).types
    assert made.type == quant
    assert made.weights == sizes[quant]
    assert made.weights.total < out.stat().st_size


@pytest.mark.parametrize(
    "words", ["mlx --bits 5", "compressed --scheme nvfp4a16", "compressed --scheme fp8-block"]
)
def test_weights_are_those_of_the_folders_that_are_made(words: str, tmp_path: Path) -> None:
    """By their own command, which the table names; and of them weights and cache alone are counted."""
    command, option, value = words.split()
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, [command, "sample:", option, value, "--effort", "off", "-o", str(out)])
    assert done.exit_code == 0, done.output
    (made,) = sizes_of(str(out)).types
    name = f"mlx {value}" if command == "mlx" else value
    (foretold,) = (one for one in sizes_of("sample:").types if one.type == name)
    assert made.weights == foretold.weights
    assert foretold.command.startswith(f"dsconvert {command} sample: {option} {value}")
    (row,) = found("sample:", "--types", name, "--seq", "1024", "--vram", "24GB")["rows"]
    assert row["peaks"][0]["bytes"] == made.weights.total + 2 * 2 * 128 * 1024 * 2
    told = run("sample:", "--types", f"{name},bf16", "--vram", "24GB")
    assert "weights and cache alone" in told
    assert "best for 24.00 GiB: bf16" in told


def test_weights_of_a_gptq_folder_are_those_of_its_type(tmp_path: Path) -> None:
    """A folder with the tensors of one, all zeros."""
    options = tiny.Tiny(d=128, ff=256)
    folder = tmp_path / "out"
    tensors: dict[str, npt.NDArray[Any]] = {}
    config = tiny.tiny_config(options) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    for name, shape in tiny.tiny_shapes(options).items():
        parts: Mapping[str, tuple[str, tuple[int, ...]]] = {name: ("F16", shape)}
        if "proj" in name:
            outputs, inputs = shape
            parts = stored_shapes(name.removesuffix(".weight"), outputs, inputs, inputs // 128, 4)
        kinds = {"I32": np.int32, "F16": np.float16}
        tensors |= {part: np.zeros(size, kinds[kind]) for part, (kind, size) in parts.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    (made,) = sizes_of(str(folder)).types
    source = tiny.tiny_checkpoint(tmp_path / "source", options)
    sizes = {made.type: made.weights for made in sizes_of(str(source)).types}
    assert made.weights == sizes["gptq 4"]
    assert made.runtimes == ("transformers",)


@pytest.mark.parametrize("hybrid", [False, True])
def test_towers_count_with_weights_and_without(hybrid: bool, tmp_path: Path) -> None:
    options = tiny_vl.VL(hybrid=hybrid)
    folder = tiny_vl.vl_checkpoint(tmp_path / "whole", options, "transformers")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole, alone = sizes_of(str(folder)), sizes_of(str(bare))
    assert whole.types[0].weights == alone.types[0].weights
    assert whole.types[0].weights.beside > 0
    assert whole.parameters == alone.parameters


def test_types_that_cannot_be_made_of_experts_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_V2_LITE), encoding="utf-8")
    types = {made.type for made in sizes_of(str(tmp_path)).types}
    assert {"bf16", "q8_0", "q4_k_m", "q2_k", "iq4_xs"} <= types
    assert not {kind for kind in types if kind.startswith(("gptq", "exl2", "iq2"))}


def test_a_tied_head_costs_a_card_of_its_own_once(tmp_path: Path) -> None:
    """llama.cpp leaves the embedding in host memory and puts a copy of it on the card as the head."""
    folder = tiny.tiny_checkpoint(tmp_path / "tied", tied=True)
    (row,) = found(folder, "--types", "f16", "--seq", "32")["rows"]
    (other,) = found(folder, "--types", "f16", "--seq", "32", "--runtime", "llama.cpp-cpu")["rows"]
    assert row["weights"] == other["weights"]
    assert row["peaks"][0]["weights"] == other["peaks"][0]["weights"]
    two = found(folder, "--types", "bf16", "--seq", "32", "--gpus", "2", "--runtime", "transformers")["rows"]
    assert two[0]["peaks"][0]["weights"] > two[0]["weights"] / 2


def test_a_cache_of_fewer_bits_is_smaller_and_only_where_there_is_one() -> None:
    half = found("sample:", "--types", "q4_0,bf16")["rows"]
    small = found("sample:", "--types", "q4_0,bf16", "--cache", "q4_0")["rows"]
    assert {row["runtime"] for row in half} == {"eager", "transformers", "llama.cpp"}
    assert {row["runtime"] for row in small} == {"llama.cpp"}
    for before, after in zip([row for row in half if row["runtime"] == "llama.cpp"], small, strict=True):
        for one, other in zip(before["peaks"], after["peaks"], strict=True):
            assert other["cache"] == one["cache"] * 4.5 / 16


def test_options_that_make_no_sense_are_said() -> None:
    assert "no type is left" in run("sample:", "--types", "q4_9", code=2)
    assert "'q9' is no type of a cache" in run("sample:", "--cache", "q9", code=2)
    assert "runtime 'sglang' is unknown" in run("sample:", "--runtime", "sglang", code=2)
    assert "not a list of whole numbers" in run("sample:", "--batch", "0", code=2)
    assert "not a size" in run("sample:", "--vram", "big", code=2)
    assert "5 cards cannot share" in run("sample:", "--gpus", "5", code=2)
    assert "--device has no effect" in run("sample:", "--device", "cpu", code=2)
    assert "cannot be measured" in run(
        "sample:", "--measure", "--types", "q4_0", "--runtime", "llama.cpp", code=2
    )


def test_measured_in_llama_cpp_is_what_was_computed(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is needed: pip install xllamacpp")
    folder = tiny.tiny_checkpoint(tmp_path / "wide", d=256, ff=1024, vocab=4096, layers=2)
    list(convert(Options(str(folder), ("f16",), out := tmp_path / "out.gguf", effort="off")))
    cells = found(out, "--measure", "--batch", "2", "--seq", "256,1024")["measured"]
    assert len(cells) == 2
    for cell in cells:
        assert cell["bytes"] == pytest.approx(cell["computed"], rel=0.05), cell
        assert cell["process"] > 0


def test_measured_in_torch_is_beside_the_computed() -> None:
    pytest.importorskip("torch", reason="torch is needed")
    (cell,) = found("sample:", "--measure", "--types", "bf16", "--runtime", "eager", "--seq", "9")["measured"]
    assert cell["bytes"] > sizes_of("sample:").types[0].weights.total
    assert (cell["runtime"], cell["batch"], cell["length"]) == ("eager", 1, 9)
