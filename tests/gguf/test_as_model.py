"""Defects planted in the bytes of real GGUF files are caught and named; the untouched file passes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from converters.gguf.as_model import open_model
from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsconvert.models.config import load_config
from dsconvert.proof import checks, compare
from dsconvert.proof.checks import Verdict
from dsconvert.proof.thresholds import thresholds_for
from dsconvert.texts import windows

pytest.importorskip("torch")
HEADS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every type of interest beside it, as q8_0.gguf and so on."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.tiny_checkpoint(path, layers=3, d=256, ff=512, heads=HEADS, kv_heads=KV_HEADS)
    for quant in ("f32", "bf16", "q8_0", "q4_0"):
        for _ in convert(
            Options(str(path), outfile=path / f"{quant}.gguf", quants=(quant,), pure=True, effort="off")
        ):
            pass
    return path


def judged(folder: Path, file: Path, quant: str) -> tuple[compare.Comparison, Verdict]:
    source: Checkpoint = open_checkpoint(folder)
    config = load_config(folder)
    model = open_model(open_gguf(file))
    ids = np.random.default_rng(5).integers(0, config.vocab_size, 256)
    text = windows.consecutive(ids, 64)
    found = compare.result(
        compare.compare(source, model, config, text, candidate_config=model.config, device="cpu")
    )
    return found, checks.judge(found, thresholds_for(quant))


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8_0", "q4_0"])
def test_faithful_files_pass(folder: Path, quant: str) -> None:
    found, verdict = judged(folder, folder / f"{quant}.gguf", quant)
    assert verdict.passed, verdict.reasons
    assert found.figures is not None
    if quant in ("f32", "bf16"):  # both hold bf16 weights exactly
        assert found.figures.kld_max == 0.0
    else:
        assert found.figures.kld.value > 0.0


def span(file: GGUFFile, name: str) -> slice:
    tensor = file.tensors[name]
    return slice(tensor.offset, tensor.offset + tensor.nbytes)


def not_interleaved(data: bytearray, file: GGUFFile) -> None:
    """q and k with their rows in Hugging Face's order, as a converter that forgot would write them."""
    for layer in range(3):
        for part, heads in (("q", HEADS), ("k", KV_HEADS)):
            where = span(file, f"blk.{layer}.attn_{part}.weight")
            rows = np.frombuffer(bytes(data[where]), np.uint8).reshape(heads, 32, 2, -1)
            data[where] = rows.swapaxes(1, 2).tobytes()


def swap_blocks(data: bytearray, file: GGUFFile) -> None:
    for name in file.tensors:
        if name.startswith("blk.0."):
            a, b = span(file, name), span(file, name.replace("blk.0.", "blk.2."))
            data[a], data[b] = data[b], data[a]


def zero_tensor(data: bytearray, file: GGUFFile) -> None:
    where = span(file, "blk.1.ffn_up.weight")
    data[where] = bytes(where.stop - where.start)


def rope_base(data: bytearray, file: GGUFFile) -> None:
    at = data.index(b"llama.rope.freq_base") + len("llama.rope.freq_base")
    assert struct.unpack_from("<If", data, at) == (6, 10000.0)  # 6: float32
    struct.pack_into("<f", data, at + 4, 500000.0)


def flip_scales(data: bytearray, file: GGUFFile) -> None:
    """The sign of the scale of every block of one row, in q4_0 and q8_0 the first two bytes of a block."""
    tensor = file.tensors["output.weight"]
    for start in range(tensor.offset, tensor.offset + tensor.nbytes, tensor.qtype.size):
        data[start + 1] ^= 0x80


DEFECTS: dict[str, tuple[Callable[[bytearray, GGUFFile], None], str]] = {
    "not interleaved": (not_interleaved, "self_attn.k_proj.weight: signal to noise"),
    "blocks swapped": (swap_blocks, "model.layers.2.mlp.down_proj.weight: signal to noise"),
    "tensor zeroed": (zero_tensor, "model.layers.1.mlp.up_proj.weight: signal to noise 0.0 dB"),
    "rope base": (rope_base, "rope_theta is 500000.0, the reference has 10000.0"),
    "signs of a tensor": (flip_scales, "lm_head.weight: signal to noise -6.0 dB"),
}


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_in_a_file_are_caught_and_named(
    folder: Path, tmp_path: Path, quant: str, defect: str
) -> None:
    good = folder / f"{quant}.gguf"
    data = bytearray(good.read_bytes())
    plant, said = DEFECTS[defect]
    plant(data, open_gguf(good))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    before, _ = judged(folder, good, quant)
    after, verdict = judged(folder, bad, quant)
    assert not verdict.passed
    assert any(said in reason for reason in verdict.reasons), verdict.reasons
    assert after.figures is not None
    assert before.figures is not None
    # In random weights attention is almost even, so that RoPE and its pairs matter little to the logits.
    assert after.figures.kld.value > (1.5 if "rope" in defect else 3) * before.figures.kld.value
