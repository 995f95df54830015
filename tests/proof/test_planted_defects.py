"""Each defect that a converter can leave in a file is caught by `dsconvert verify` and named; exit code 3.

The files are the embedded sample's, a trained model, so that what is wrong shows in its logits too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.cli import cli
from tokenizer_tools.steps import from_gguf

pytest.importorskip("torch")
QUANTS = ("q8_0", "q4_0")
FEW_BITS = (
    "iq4_nl",
    "iq4_xs",
    "iq3_s",
    "iq3_xxs",
    "iq2_m",
    "iq2_s",
    "iq2_xxs",
    "tq1_0",
    "tq2_0",
    "mxfp4_moe",
)
CHANGED = (r"\s?[A-Za-z", r"\S?[A-Za-z")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def verify(path: Path, *options: object) -> Result:
    return command("verify", path, "--against", "sample:", "--windows", 2, "--json", "-", "--debug", *options)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample as GGUF files, unharmed."""
    out = tmp_path_factory.mktemp("good") / "sample.gguf"
    made = command("gguf", "sample:", "-q", ",".join(QUANTS), "-o", out, "--verify", "off", "--threads", 2)
    assert made.exit_code == 0, made.output
    return {quant: out.with_name(f"sample-{quant}.gguf") for quant in QUANTS}


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same of the types on grids and their like, with a small importance matrix."""
    out = tmp_path_factory.mktemp("few") / "sample.gguf"
    options = ("--calib", "builtin", "--calib-samples", 4, "--calib-len", 128, "--verify", "off")
    made = command("gguf", "sample:", "-q", ",".join(FEW_BITS), "-o", out, "--threads", 2, *options)
    assert made.exit_code == 0, made.output
    return {quant: out.with_name(f"sample-{quant}.gguf") for quant in FEW_BITS}


def span(file: GGUFFile, name: str) -> slice:
    tensor = file.tensors[name]
    return slice(tensor.offset, tensor.offset + tensor.nbytes)


def not_interleaved(data: bytearray, file: GGUFFile) -> None:
    """q and k with their rows in Hugging Face's order, as a converter that forgot would write them."""
    for layer in range(file.keys["llama.block_count"]):
        for part, key in (("q", "llama.attention.head_count"), ("k", "llama.attention.head_count_kv")):
            name, heads = f"blk.{layer}.attn_{part}.weight", file.keys[key]
            half = file.tensors[name].shape[0] // heads // 2
            where = span(file, name)
            rows = np.frombuffer(bytes(data[where]), np.uint8).reshape(heads, half, 2, -1)
            data[where] = rows.swapaxes(1, 2).tobytes()


def swap_blocks(data: bytearray, file: GGUFFile) -> None:
    for name in file.tensors:
        if name.startswith("blk.0."):
            a, b = span(file, name), span(file, name.replace("blk.0.", "blk.1."))
            data[a], data[b] = data[b], data[a]


def zero_tensor(data: bytearray, file: GGUFFile) -> None:
    where = span(file, "blk.1.ffn_up.weight")
    data[where] = bytes(where.stop - where.start)


def rope_base(data: bytearray, file: GGUFFile) -> None:
    at = data.index(b"llama.rope.freq_base") + len("llama.rope.freq_base")
    assert struct.unpack_from("<If", data, at) == (6, 10000.0)  # 6: float32
    struct.pack_into("<f", data, at + 4, 500000.0)


def damaged_regex(data: bytearray, file: GGUFFile) -> None:
    """Words no longer take the white space before them; the digest of the regexes is the old one's."""
    letters = next(r for r in file.keys["dsconvert.pre_tokenizer.regex"] if r.startswith(CHANGED[0]))
    old = letters.encode()
    at = data.index(struct.pack("<Q", len(old)) + old, data.index(b"dsconvert.pre_tokenizer.regex"))
    data[at + 8 : at + 8 + len(old)] = letters.replace(*CHANGED, 1).encode()


def other_regex(data: bytearray, file: GGUFFile) -> None:
    """The same, with the digest that belongs to it: a converter that took the wrong regex."""
    spec = from_gguf(file.keys)
    assert spec is not None
    steps = [
        replace(step, regex=step.regex.replace(*CHANGED, 1)) if "A-Za-z" in step.regex else step
        for step in spec.steps
    ]
    damaged_regex(data, file)
    at = data.index(spec.sha256.encode())
    data[at : at + 64] = replace(spec, steps=tuple(steps)).sha256.encode()


def other_name(data: bytearray, file: GGUFFile) -> None:
    """The name by which llama.cpp chooses its regexes; what else the file carries stays right."""
    old, new = b"deepseek-llm", b"jina-v5-nano"  # of the same length; Llama 3's regex
    at = data.index(b"tokenizer.ggml.pre") + len("tokenizer.ggml.pre")
    assert data[at : at + 12 + len(old)] == struct.pack("<IQ", 8, len(old)) + old
    data[at + 12 : at + 12 + len(old)] = new


def drop_template(data: bytearray, file: GGUFFile) -> None:
    """The key under another name, as if it were not there."""
    at = data.index(b"tokenizer.chat_template")
    data[at : at + len("tokenizer.chat_template")] = b"tokenizer.chat_nothing_"


def change_template(data: bytearray, file: GGUFFile) -> None:
    template = file.keys["tokenizer.chat_template"].encode()
    at = data.index(template)
    data[at : at + len(template)] = template.replace(b"User", b"Uzer", 1)


def drop_bos(data: bytearray, file: GGUFFile) -> None:
    at = data.index(b"tokenizer.ggml.add_bos_token") + len("tokenizer.ggml.add_bos_token")
    assert struct.unpack_from("<IB", data, at) == (7, 1)  # 7: bool
    data[at + 4] = 0


def other_eos(data: bytearray, file: GGUFFile) -> None:
    at = data.index(b"tokenizer.ggml.eos_token_id") + len("tokenizer.ggml.eos_token_id")
    struct.pack_into("<I", data, at + 4, file.keys["tokenizer.ggml.eos_token_id"] - 1)


def context(data: bytearray, file: GGUFFile) -> None:
    at = data.index(b"llama.context_length") + len("llama.context_length")
    struct.pack_into("<I", data, at + 4, file.keys["llama.context_length"] // 2)


Plant = Callable[[bytearray, GGUFFile], None]
# What is planted, and what the failed check is called and says.
DEFECTS: dict[str, tuple[Plant, str, str]] = {
    "q and k not interleaved": (not_interleaved, "weights", "self_attn.k_proj.weight: signal to noise"),
    "blocks swapped": (swap_blocks, "weights", "model.layers.1.mlp.down_proj.weight: signal to noise"),
    "wrong rope base": (rope_base, "config", "rope_theta is 500000.0, the reference has 10000.0"),
    "one regex changed": (other_regex, "token ids", "token ids differ on"),
    "one regex damaged": (damaged_regex, "token ids", "sha256 is not the digest of the steps"),
    "another pre-tokenizer named": (other_name, "pre-tokenizer", "under the name 'jina-v5-nano' llama.cpp's"),
    "chat template dropped": (drop_template, "chat template", "the chat template is missing"),
    "chat template changed": (change_template, "chat template", "differs from the checkpoint's"),
    "one tensor zeroed": (
        zero_tensor,
        "weights",
        "model.layers.1.mlp.up_proj.weight: signal to noise 0.0 dB",
    ),
    "BOS not added": (drop_bos, "special tokens", "BOS is not added"),
    "another EOS": (other_eos, "special tokens", "EOS is"),
    "another context length": (context, "config", "context_length is"),
}


def plant(defect: str, source: Path, target: Path) -> Path:
    data = bytearray(source.read_bytes())
    DEFECTS[defect][0](data, open_gguf(source))
    assert data != source.read_bytes()
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("quant", QUANTS)
def test_the_unharmed_file_passes(good: dict[str, Path], quant: str) -> None:
    result = verify(good[quant])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is True
    names = {check["name"] for check in found["checks"]}
    assert {"token ids", "special tokens", "chat template", "pre-tokenizer", "weights", "mean KLD"} <= names
    assert found["figures"]["kld"]["value"] > 0


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught_and_named(good: dict[str, Path], tmp_path: Path, defect: str, quant: str) -> None:
    result = verify(plant(defect, good[quant], tmp_path / "bad.gguf"))
    assert result.exit_code == 3, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["passed"] is False
    _, name, said = DEFECTS[defect]
    failed = [check["detail"] for check in found["checks"] if check["name"] == name and not check["passed"]]
    assert any(said in detail for detail in failed), found["reasons"]
    assert said in result.stderr  # a person reads it too
    if name not in ("weights", "config"):  # and nothing else is blamed
        assert all(check["passed"] for check in found["checks"] if check["name"] != name)


@pytest.mark.parametrize("quant", FEW_BITS)
def test_an_unharmed_file_of_few_bits_passes(few_bits: dict[str, Path], quant: str) -> None:
    result = verify(few_bits[quant])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "quant", [quant for quant in FEW_BITS if quant not in ("iq2_m", "tq1_0", "mxfp4_moe")]
)
@pytest.mark.parametrize("defect", [key for key, (_, name, _) in DEFECTS.items() if name == "weights"])
def test_wrong_weights_of_few_bits_are_caught(
    few_bits: dict[str, Path], tmp_path: Path, defect: str, quant: str
) -> None:
    result = verify(plant(defect, few_bits[quant], tmp_path / "bad.gguf"))
    assert result.exit_code == 3, result.output
    assert DEFECTS[defect][2] in result.stderr
