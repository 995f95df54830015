"""Malformed checkpoints: always one of our errors, in one paragraph, before any weight is read.

Each case changes one thing in a good checkpoint and goes through open, config and plan. `MUST_FAIL` cases
are certainly wrong; a random flip may leave a file that is still right, and then the plan must stand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.errors import ConversionError
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.config import load_config
from dsconvert.models.tensor_table import Spec, plan

SMALL = tiny.Tiny(layers=1, d=16, ff=32, heads=2, kv_heads=1, vocab=48, tokenizer=False)
SHARDED = tiny.Tiny(**{**vars(SMALL), "shards": 3})
NORM = "model.norm.weight"
Json = dict[str, Any]
Change = Callable[[Json], object]


def run(folder: Path) -> list[Spec]:
    """The stages that come before any work."""
    checkpoint = open_checkpoint(folder)
    specs = plan(LLAMA.table, load_config(folder), checkpoint.shapes())
    checkpoint.check_readable(spec.hf for spec in specs)
    return specs


def refused(folder: Path) -> str:
    """The message of the refusal; fails when the folder is accepted."""
    with pytest.raises(ConversionError) as caught:
        run(folder)
    return paragraph(caught.value)


def paragraph(error: ConversionError) -> str:
    text = str(error)
    assert text.encode()
    assert text.endswith(".")
    assert text.isprintable()  # so no newline, no escape sequence, no lone surrogate
    assert len(text) < 2500
    return text


def header_of(data: bytes) -> tuple[Json, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_the_unchanged_checkpoints_pass(tmp_path: Path) -> None:
    assert len(run(tiny.tiny_checkpoint(tmp_path / "one", SMALL))) == 12
    assert len(run(tiny.tiny_checkpoint(tmp_path / "three", SHARDED))) == 12


# --- safetensors: bytes ------------------------------------------------------------------------------------


def safetensors(folder: Path) -> tuple[Path, bytes]:
    path = tiny.tiny_checkpoint(folder, SMALL) / "model.safetensors"
    return path, path.read_bytes()


@pytest.mark.parametrize("place", range(70))
def test_a_truncated_safetensors(tmp_path: Path, place: int) -> None:
    """The first 10 lengths, 40 inside the header, 20 inside the data."""
    path, data = safetensors(tmp_path)
    start = 8 + int.from_bytes(data[:8], "little")
    places = [
        *range(10),
        *np.linspace(10, start, 40, dtype=int),
        *np.linspace(start + 1, len(data) - 1, 20, dtype=int),
    ]
    path.write_bytes(data[: places[place]])
    assert path.name in refused(tmp_path)


@pytest.mark.parametrize("seed", range(120))
def test_a_flipped_bit_in_the_header(tmp_path: Path, seed: int) -> None:
    path, data = safetensors(tmp_path)
    start = 8 + int.from_bytes(data[:8], "little")
    bit = int(np.random.default_rng(seed).integers(start * 8))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        specs = run(tmp_path)
    except ConversionError as error:
        paragraph(error)
    else:  # a bit of the metadata's value, or one that JSON does not tell apart
        assert {spec.hf: spec.shape for spec in specs} == tiny.tiny_shapes(SMALL)


LENGTHS = [0, 1, 2, 7, 100, 10**6, 10**8 - 1, 10**8, 10**8 + 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_wrong_header_length(tmp_path: Path, length: int) -> None:
    path, data = safetensors(tmp_path)
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(tmp_path)


HEADERS = {
    "no JSON": b"{]",
    "spaces first": b' {"a": 1}',
    "not UTF-8": b'{"\xff": 1}',
    "a list": b"[1, 2]",
    "a number": b"17",
    "null": b"null",
    "NaN for an entry": b'{"a": NaN}',
    "deep": b'{"a":' * 60000,
    "deep lists": b'{"a":' + b"[" * 100000,
    "a huge number": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    "a long number": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 4]}}',
    "a float": b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    "infinity": b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}',
    "the same key twice": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}',
    "the same field twice": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "empty": b"",
    "an empty object": b"{}",
    "zeros": bytes(64),
    "a lone surrogate": b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "an escape sequence": b'{"\\u001b[2J\\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "a long name": b'{"' + b"n" * 300000 + b'": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "many names": b"{"
    + b",".join(b'"n%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' % i for i in range(3000))
    + b"}",
    "metadata is a list": b'{"__metadata__": []}',
    "metadata is null": b'{"__metadata__": null}',
    "metadata holds a number": b'{"__metadata__": {"format": 1}}',
    "metadata is nested": b'{"__metadata__": {"a": {"b": "c"}}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_header_text(tmp_path: Path, case: str) -> None:
    path, _ = safetensors(tmp_path)
    path.write_bytes(tiny.with_header(HEADERS[case], bytes(4)))
    refused(tmp_path)


# --- safetensors: fields of the header ---------------------------------------------------------------------

WRONG_VALUES: list[object] = [None, True, 1.5, "x", {}, -1, 1 << 63, 1 << 200]
FIELDS: dict[str, Change] = {
    f"{field} = {value!r:.24}": lambda header, field=field, value=value: header[NORM].update({field: value})
    for field in ("dtype", "shape", "data_offsets")
    for value in [*WRONG_VALUES, []]
}
FIELDS |= {
    f"{field}[0] = {value!r:.24}": lambda header, field=field, value=value: header[NORM][field].__setitem__(
        0, value
    )
    for field in ("shape", "data_offsets")
    for value in [*WRONG_VALUES, [], 0]
}
FIELDS |= {f"no {f}": lambda header, f=f: header[NORM].pop(f) for f in ("dtype", "shape", "data_offsets")}
FIELDS |= {
    f"entry = {value!r:.24}": lambda header, value=value: header.update({NORM: value})
    for value in [*WRONG_VALUES, [], {"dtype": "BF16"}]
}
FIELDS |= {
    f"dtype {dtype!r}": lambda header, dtype=dtype: header[NORM].update(dtype=dtype)
    for dtype in (
        "bf16",
        "BF17",
        "F32",
        "F64",
        "U8",
        "I16",
        "F8_E4M3",
        "F4",
        "C64",
        "",
        "BF16\n",
        "BF16" * 99,
    )
}


def shift(header: Json, name: str, begin: int, end: int) -> None:
    offsets = header[name]["data_offsets"]
    header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]


FIELDS |= {
    f"offsets moved by {begin}, {end}": lambda header, begin=begin, end=end: shift(header, NORM, begin, end)
    for begin, end in [
        (2, 2),
        (-2, -2),
        (0, 2),
        (0, -2),
        (2, 0),
        (-2, 0),
        (10**6, 10**6),
        (10**9, 10**9),
        (64, -64),
    ]
}
FIELDS |= {
    "two tensors share bytes": lambda h: h[NORM].update(data_offsets=h["lm_head.weight"]["data_offsets"]),
    "two tensors of one place": lambda h: h.update(again=h[NORM]),
    "a tensor is left out": lambda h: h.pop(NORM),
    "the last tensor is left out": lambda h: h.pop("lm_head.weight"),
    "a tensor is renamed": lambda h: h.update({"model.normal.weight": h.pop(NORM)}),
    "a newline in a name": lambda h: h.update({"model.\nnorm.weight": h.pop(NORM)}),
    "an empty name": lambda h: h.update({"": h.pop(NORM)}),
    "a transposed shape": lambda h: h["model.layers.0.mlp.up_proj.weight"].update(shape=[16, 32]),
    "a flat shape": lambda h: h["model.layers.0.mlp.up_proj.weight"].update(shape=[512]),
    "a shape of many ones": lambda h: h[NORM].update(shape=[16] + [1] * 40),
    "a shape of some ones": lambda h: h[NORM].update(shape=[16, 1]),
    "a product that overflows": lambda h: h[NORM].update(shape=[1 << 62, 1 << 62, 16]),
    "a product that wraps to the size": lambda h: h[NORM].update(shape=[(1 << 62) + 4, 4]),
    "an empty extra tensor": lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "an empty tensor outside": lambda h: h.update(
        extra={"dtype": "F32", "shape": [0], "data_offsets": [1 << 40, 1 << 40]}
    ),
    "a quantized tensor": lambda h: h.update({"model.norm.qweight": h.pop(NORM)}),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_wrong_field_in_the_header(tmp_path: Path, case: str) -> None:
    path, data = safetensors(tmp_path)
    header, rest = header_of(data)
    FIELDS[case](header)
    path.write_bytes(tiny.with_header(header, rest))
    refused(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path, data = safetensors(tmp_path)
    path.write_bytes(data + b"\0")
    assert "1 bytes after the last tensor" in refused(tmp_path)


# --- the index ---------------------------------------------------------------------------------------------

SHARD_NAMES = [
    "../model-00001-of-00003.safetensors",
    "/etc/passwd",
    "/absolute/model.safetensors",
    "sub/model-00001-of-00003.safetensors",
    "sub\\model-00001-of-00003.safetensors",
    "C:model.safetensors",
    "..",
    ".",
    "",
    ".hidden.safetensors",
    "config.json",
    "model-00001-of-00003.safetensors\n",
    "model\0.safetensors",
    "\ud800.safetensors",
    "\x1b[2J.safetensors",
    "m" * 300 + ".safetensors",
    "\u00e9" * 130 + ".safetensors",
    "absent.safetensors",
    "model-00002-of-00003.safetensors",
    None,
    17,
    [],
    {},
    True,
]
INDEX: dict[str, Change] = {
    f"the shard {name!r:.40}": lambda index, name=name: index["weight_map"].update(
        {"model.embed_tokens.weight": name}
    )
    for name in SHARD_NAMES
}
INDEX |= {
    f"weight_map = {value!r:.20}": lambda index, value=value: index.update(weight_map=value)
    for value in (None, [], {}, "model.safetensors", 3)
}
INDEX |= {
    "no weight_map": lambda index: index.pop("weight_map"),
    "a tensor left out": lambda index: index["weight_map"].pop(NORM),
    "a tensor too many": lambda index: index["weight_map"].update(extra="model-00001-of-00003.safetensors"),
    "all in one shard": lambda index: index.update(
        weight_map=dict.fromkeys(index["weight_map"], "model-00001-of-00003.safetensors")
    ),
    "one shard unused": lambda index: index.update(
        weight_map={k: v for k, v in index["weight_map"].items() if "00002" not in v}
    ),
    "a surrogate for a name": lambda index: index["weight_map"].update(
        {"\udc80": "model-00001-of-00003.safetensors"}
    ),
}


@pytest.mark.parametrize("case", INDEX)
def test_a_wrong_index(tmp_path: Path, case: str) -> None:
    path = tiny.tiny_checkpoint(tmp_path, SHARDED) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    INDEX[case](index)
    path.write_text(json.dumps(index))
    refused(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "17", '"x"', "\xff", '{"weight_map": {"a": "b", "a": "b"}}', "[" * 99999]
)
def test_an_index_that_is_no_index(tmp_path: Path, text: str) -> None:
    path = tiny.tiny_checkpoint(tmp_path, SHARDED) / "model.safetensors.index.json"
    path.write_text(text, "latin-1")
    refused(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tiny.tiny_checkpoint(tmp_path, SHARDED)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    assert "is in both" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "is in both" in refused(tmp_path)


@pytest.mark.parametrize("shard", range(3))
def test_a_damaged_shard_is_named(tmp_path: Path, shard: int) -> None:
    tiny.tiny_checkpoint(tmp_path, SHARDED)
    path = sorted(tmp_path.glob("*.safetensors"))[shard]
    path.write_bytes(path.read_bytes()[:-7])
    assert path.name in refused(tmp_path)


# --- config.json -------------------------------------------------------------------------------------------

SIZES = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
]
WRONG_SIZES: list[object] = [
    0,
    -1,
    1.5,
    1e400,
    float("nan"),
    True,
    "16",
    [],
    [16],
    {},
    1 << 31,
    10**4000,
    2_000_000_000,
]
CONFIG: dict[str, Json] = {f"{key} = {value!r:.20}": {key: value} for key in SIZES for value in WRONG_SIZES}
CONFIG |= {f"{key} = {value}": {key: value} for key in SIZES for value in (3, 24, 65)}
CONFIG |= {
    f"{key} = {value!r:.20}": {key: value}
    for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings")
    for value in (0, -1, float("inf"), float("nan"), "1e-6", True, [], {}, 10**4000)
}
CONFIG |= {
    f"architectures = {value!r:.30}": {"architectures": value, "model_type": "x"}
    for value in (None, [], {}, "LlamaForCausalLM", [None], [["LlamaForCausalLM"]], ["a", "b"], 3)
}
CONFIG |= {
    f"{key} = {value!r:.30}": {key: value}
    for key in ("rope_scaling", "rope_parameters")
    for value in (
        [],
        "linear",
        4.0,
        True,
        {"type": "linear"},
        {"type": "linear", "factor": "4"},
        {"type": "linear", "factor": float("nan")},
        {"type": "linear", "factor": -1},
        {"type": ["linear"], "factor": 4.0},
        {"type": "longrope", "factor": 4.0},
        {"type": "dynamic", "factor": "4"},
        {"rope_type": "llama3\n", "factor": 8.0},
        {"rope_type": {}, "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": -1},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": "1"},
    )
}
CONFIG |= {
    f"{key} = {value!r:.20}": {key: value}
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")
    for value in ("false", 0, 1, [], {})
}
CONFIG |= {
    f"head_dim = {value!r:.20}": {"head_dim": value} for value in (0, -2, 7, 4, 1 << 40, "8", [8], 8.0, True)
}
CONFIG |= {f"hidden_act = {v!r:.20}": {"hidden_act": v} for v in ("gelu", 3, [], {}, "silu\n", "x" * 5000)}
CONFIG |= {"attention_bias asks for biases": {"attention_bias": True}, "mlp_bias too": {"mlp_bias": True}}


@pytest.mark.parametrize("case", CONFIG)
def test_a_wrong_config(tmp_path: Path, case: str) -> None:
    path = tiny.tiny_checkpoint(tmp_path, tiny.Tiny(**{**vars(SMALL), "rope": "old"})) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CONFIG[case]}))
    refused(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"])
def test_a_config_without_a_size_takes_the_library_default_and_does_not_fit(tmp_path: Path, key: str) -> None:
    path = tiny.tiny_checkpoint(tmp_path, SMALL) / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    refused(tmp_path)


CONFIG_TEXTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b"\xff\xfe{}",
    b"{} {}",
    b'{"a":' * 60000,
    b"[" * 99999,
    b"\0",
    b"9" * 5000,
]
# Nested just less deeply than the parser's own limit: printing the value must not fail where parsing did not.
CONFIG_TEXTS += [b'{"architectures": %s%s}' % (b"[" * n, b"]" * n) for n in (100, 900, 960, 975, 985)]
CONFIG_TEXTS += [
    b'{"architectures": ["LlamaForCausalLM"], "hidden_size": %s%s}' % (b"[" * n, b"]" * n)
    for n in (900, 960, 985)
]


@pytest.mark.parametrize("case", range(len(CONFIG_TEXTS)))
def test_a_config_that_is_no_config(tmp_path: Path, case: int) -> None:
    (tiny.tiny_checkpoint(tmp_path, SMALL) / "config.json").write_bytes(CONFIG_TEXTS[case])
    assert "config.json" in refused(tmp_path)


@pytest.mark.parametrize("place", range(25))
def test_a_truncated_config(tmp_path: Path, place: int) -> None:
    path = tiny.tiny_checkpoint(tmp_path, SMALL) / "config.json"
    text = path.read_bytes()
    path.write_bytes(text[: len(text) * place // 25])
    assert "config.json" in refused(tmp_path)


# --- the bin's zip and pickle ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_byte_in_a_bins_structure(tmp_path: Path, seed: int) -> None:
    """In the pickle or the zip directory: refused, or the same names and shapes."""
    path = tiny.tiny_checkpoint(tmp_path, tiny.Tiny(**{**vars(SMALL), "format": "bin"})) / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"data.pkl"), data.index(b"/data/0")
    structure = [*range(begin, end), *range(data.index(b"PK\x01\x02"), len(data))]
    rng = np.random.default_rng(seed)
    data[structure[int(rng.integers(len(structure)))]] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    try:
        specs = run(tmp_path)
    except ConversionError as error:
        paragraph(error)
    else:
        assert {spec.hf: spec.shape for spec in specs} == tiny.tiny_shapes(SMALL)
