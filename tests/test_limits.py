"""What a stranger's file may ask for is bounded, and what it says wrongly gives the ordinary error."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_tokenizer
from click.testing import CliRunner

from converters.exl2 import measure
from converters.gguf import inspect, metadata, parse
from dsconvert import compile as kernels
from dsconvert.checkpoints import safetensors_header, safetensors_reader
from dsconvert.checkpoints.safetensors_writer import from_array
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, OutputError, TokenizerError
from dsconvert.models.config import load_config
from dsconvert.proof.config_differences import check_sizes
from dsconvert.quantization.blocks import collected
from dsconvert.quantization.costs import kept_blocks
from dsconvert.quantization.run_state import State
from dsconvert.report import charts, scatter
from dsconvert.report.scatter import Point
from dsconvert.texts import files
from tokenizer_tools import library
from tokenizer_tools.identity import of_metadata
from tokenizer_tools.load import load_tokenizer
from tokenizer_tools.rebuild import gguf_keys


def gguf_with(path: Path, **arrays: Any) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for key, values in arrays.items():
        writer.add_array(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_long_array_of_numbers_takes_no_more_memory_than_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse, "BIG", 8)
    path = gguf_with(
        tmp_path / "x.gguf", long=[*range(-20, 0)], short=[1, 2], real=[0.5] * 9, flag=[True] * 9
    )
    keys = parse.open_gguf(path).keys
    assert keys["long"] == array("i", range(-20, 0))
    assert (keys["short"], keys["real"], list(keys["flag"])) == ([1, 2], array("f", [0.5] * 9), [1] * 9)
    assert inspect.shorten(keys["long"]) == {"count": 20, "first": list(range(-20, -20 + inspect.LONG))}


def test_more_strings_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_with(tmp_path / "x.gguf", a=["x"] * 30, b=["y"] * 30)
    assert len(parse.open_gguf(path).keys["a"]) == 30
    monkeypatch.setattr(parse, "MAX_ITEMS", 50)
    with pytest.raises(CheckpointError, match="more than any model has"):
        parse.open_gguf(path)


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.tiny_checkpoint(tmp_path)
    monkeypatch.setattr(safetensors_header, "TENSORS_LIMIT", 5)
    with pytest.raises(CheckpointError, match="more than any model has"):
        safetensors_reader.read_safetensors(folder / "model.safetensors")


@pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [0, 1 << 62], [1 << 62, 0, 2]])
def test_a_shape_that_no_array_can_have_is_refused(shape: list[int], tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    (tmp_path / "x.safetensors").write_bytes(tiny.with_header(header, b""))
    with pytest.raises(CheckpointError, match="impossible shape"):
        safetensors_reader.read_safetensors(tmp_path / "x.safetensors")


LONG = "<" + "x" * library.LONGEST + ">"


def long_in_tokenizer(raw: dict[str, Any]) -> dict[str, Any]:
    raw["added_tokens"].append(tiny_tokenizer.added(tiny_tokenizer.rows(raw), LONG))
    return {}


def long_beside(raw: dict[str, Any]) -> dict[str, Any]:
    entry = {"content": LONG, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    return {"added_tokens_decoder": {str(tiny_tokenizer.rows(raw)): entry | {"single_word": False}}}


@pytest.mark.parametrize("place", [long_in_tokenizer, long_beside], ids=["tokenizer.json", "decoder"])
def test_an_added_token_longer_than_any_is_refused(place: Any, tmp_path: Path) -> None:
    raw = tiny_tokenizer.tokenizer_json()
    rows = tiny_tokenizer.rows(raw) + 1
    tiny_tokenizer.write(tmp_path, raw, place(raw))
    with pytest.raises(TokenizerError, match=r"has 4,098 characters.*No tokenizer has one of over 4,096"):
        load_tokenizer(tmp_path, rows)


def test_more_tokens_than_any_tokenizer_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MOST", 100)
    with pytest.raises(TokenizerError, match="No tokenizer has over 100"):
        library.open_json(json.dumps(tiny_tokenizer.tokenizer_json()), "tokenizer.json")


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer.ggml.bos_token_id": [1, 2]},
        {"tokenizer.ggml.bos_token_id": "1"},
        {"dsconvert.tokenizer.added.normalized": 7},
        {"dsconvert.tokenizer.added.lstrip": "x"},
        {"dsconvert.tokenizer.normalizer": [1]},
        {"tokenizer.ggml.token_type": ["x"] * 5},
        {"tokenizer.ggml.tokens": [LONG, "a"], "tokenizer.ggml.token_type": [3, 1]},
        {"tokenizer.ggml.merges": [1, 2]},
        {"tokenizer.ggml.tokens": 5},
        {"tokenizer.ggml.tokens": [[1], "a"]},
        {"tokenizer.ggml.pre": [1, 2]},
    ],
    ids=str,
)
def test_odd_tokenizer_keys_give_a_tokenizer_or_the_ordinary_error(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    raw = tiny_tokenizer.tokenizer_json()
    data = load_tokenizer(tiny_tokenizer.write(tmp_path, raw), tiny_tokenizer.rows(raw))
    keys = {key: value for key, (_, value) in gguf_keys(data, "gpt-2").items()} | changed
    try:
        made = of_metadata(keys, "x.gguf")
    except TokenizerError:
        return
    assert made.tokenizer.encode("a").ids


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_packed_bomb_is_refused_and_a_packed_text_is_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "UNPACKED", 1 << 16)
    (tmp_path / name).write_bytes(gzip.compress(b"[" + b'"a", ' * (1 << 20)))
    with pytest.raises(CheckpointError, match="unpacks to more than 50 times its size"):
        list(files.read_documents(tmp_path / name))
    (tmp_path / name).write_bytes(gzip.compress(b'["naive", "text"]\n'))
    assert list(files.read_documents(tmp_path / name))


def card(folder: Path, text: str | bytes) -> dict[str, Any]:
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return metadata.model_card(folder)


@pytest.mark.parametrize(
    "front",
    [
        "[" * 5000,
        "&a [*a",
        "- a",
        "\t",
    ],
    ids=lambda text: text[:30],
)
def test_a_card_that_cannot_be_read_is_no_card(front: str, tmp_path: Path) -> None:
    assert card(tmp_path, f"---\n{front}\n---\n") == {}


@pytest.mark.parametrize("kind", ["bool", "int", "timestamp", "binary", "python/object/apply:os.system"])
def test_a_cards_types_of_its_own_are_text_or_nothing(kind: str, tmp_path: Path) -> None:
    assert card(tmp_path, f"---\nx: !!{kind} maybe\n---\n").get("x", "maybe") == "maybe"


def test_only_the_head_of_a_card_is_read(tmp_path: Path) -> None:
    good = "---\nlicense: mit\n---\n"
    assert card(tmp_path, good + "x" * (3 << 20)) == {"license": "mit"}
    assert card(tmp_path, "---\n" + "a: 1\n" * (1 << 20) + "---\n") == {}
    assert card(tmp_path, b"\xef\xbb\xbf" + good.encode()) == {"license": "mit"}
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert metadata.model_card(tmp_path) == {}


def test_values_without_end_are_drawn_at_the_edge_or_told() -> None:
    inf, nan = math.inf, math.nan
    for drawn in (
        charts.line([1.0, inf, nan, 2.0], "x", "y", inf),
        scatter.log_scatter(
            [Point("a", 1.0, inf), Point("b", 2.0, nan), Point("c", 3.0, 0.5), Point("d", 1.0, 0.0)], "x", "y"
        ),
        charts.log_histogram(np.array([1.0, inf, nan, 0.0, 2.0]), "x", {"mean": inf, "median": 1.0}),
    ):
        assert "<svg" in drawn
        assert "nan" not in drawn.replace("nan</title>", "").replace("nan, ", "")
    assert "2 of 5 values are not finite" in charts.log_histogram(
        np.array([1.0, inf, nan, 0.0, 2.0]), "x", {}
    )
    assert "none can be drawn" in charts.log_histogram(np.array([inf, nan]), "x", {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exl2", "x", "--bpw", "nan"], "not a finite number"),
        (["exl2", "x", "--damp", "nan"], "not a finite number"),
        (["gptq", "x", "--damp", "nan"], "not a finite number"),
        (["verify", "x", "--max-kld", "nan"], "not a finite number"),
        (["verify", "x", "--min-top1", "inf"], "not in the range 0<=x<=1"),
        (["verify", "x", "--min-top1", "nan"], "not a finite number"),
        (["gguf", "x", "--split-max-size", "²"], "is not a size"),
        (["gguf", "x", "--split-max-size", "9" * 5000], "is not a size"),
        (["gguf", "x", "--split-max-size", "0G"], "is not a size"),
        (["gguf", "x", "--split-max-size", "-1"], "is not a size"),
    ],
)
def test_numbers_that_no_command_can_use_are_refused(words: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize("linears", [None, 5, [5], [{}], [{"name": []}], {"a": 1}])
def test_a_record_that_was_changed_is_named(linears: Any, tmp_path: Path) -> None:
    state = State(tmp_path)
    state.save(0, {"a": from_array(np.zeros(4, np.float32))}, {} if linears is None else {"linears": linears})
    with pytest.raises(OutputError, match=r"block-00000\.json: is not as it was written"):
        collected(state)


@pytest.mark.parametrize("kept", [{"a": 5}, {"a": [[1]]}, {"a": [["4b", 4, float("nan")]]}, {"a": []}])
def test_a_measured_block_that_was_changed_is_named(kept: dict[str, Any], tmp_path: Path) -> None:
    state = State(tmp_path)
    state.keep("measured-00000", kept)
    with pytest.raises(OutputError, match=r"measured-00000\.json: is not as it was written"):
        kept_blocks(state, 1, measure.parsed)


def test_a_compiler_that_cannot_be_loaded_is_told() -> None:
    with (
        pytest.raises(ConversionError, match=r"compiler of the kernels cannot be loaded.*ulimit -v"),
        kernels._loading(),
    ):
        raise OSError("libllvmlite.so: failed to map segment from shared object")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space, which Linux has")
def test_little_address_space_is_no_fault_of_ours(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model")
    words = f"-m dsconvert gguf {model} -o {tmp_path / 'x.gguf'} --quant q4_k_m --effort off"
    for kilobytes in (250_000, 300_000, 350_000, 400_000):
        command = f"ulimit -v {kilobytes}; exec {sys.executable} {words} --force"
        done = subprocess.run(
            ["bash", "-c", command], check=False, capture_output=True, text=True, timeout=300
        )
        assert done.returncode in (0, 2), done.stderr
        assert "unexpected" not in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "changed",
    [
        {"heads": 8, "head_dim": 16},
        {"kv_heads": 4},
        {"head_dim": 8},
        {"intermediate_size": 1},
        {"layers": 3},
        {"hidden_size": 32},
        {"vocab_size": 7},
    ],
    ids=str,
)
def test_sizes_that_no_tensor_of_the_reference_has_are_another_model(
    changed: dict[str, int], tmp_path: Path
) -> None:
    config = load_config(tiny.tiny_checkpoint(tmp_path))
    check_sizes(config, replace(config, rope_theta=2.0, context_length=7))
    same = replace(
        config, heads=config.heads * 2, kv_heads=config.kv_heads * 2, head_dim=config.head_dim // 2
    )
    check_sizes(config, same)  # what differs without changing a shape is a failed check, no error
    with pytest.raises(CheckpointError, match="not the same model"):
        check_sizes(config, replace(config, **changed))
