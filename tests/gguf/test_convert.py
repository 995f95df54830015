"""`dsconvert gguf` end to end on tiny models and the sample: every tensor, key, fault and option."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ggml_oracle
import gguf
import numpy as np
import numpy.typing as npt
import pytest
import tiny

from converters.gguf.as_model import open_model
from converters.gguf.convert import convert
from converters.gguf.file_types import FILE_TYPES
from converters.gguf.output import Options
from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.errors import CheckpointError, ConversionError, OutputError, QuantizationError, UsageError
from dsconvert.events import Check, Event, Finished, Planned, TensorDone, Warn

SIMPLE = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"), d=256, ff=512, heads=4, kv_heads=2)


def run(model: Path | str, out: Path, **asked: Any) -> list[Event]:
    asked.setdefault("effort", "off")
    return list(convert(Options(str(model), outfile=out, **asked)))


def pairs(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """The interleave of q and k written the slow way: row 2i of a head is its row i, 2i + 1 its i + half."""
    dim = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = rows[head * dim + i]
            out[head * dim + 2 * i + 1] = rows[head * dim + dim // 2 + i]
    return out


def expected_bytes(
    model: Path | str, file: GGUFFile, heads: int, kv_heads: int
) -> dict[str, npt.NDArray[np.uint8]]:
    """Each tensor's bytes as ggml makes them of the source's float32 values."""
    source = open_checkpoint(model)
    expected = {}
    for (spec,) in open_model(file).specs.values():
        tensor = file.tensors[spec.gguf]
        values = source.float32(spec.hf)
        if spec.gguf.endswith("attn_q.weight"):
            values = pairs(values, heads)
        if spec.gguf.endswith("attn_k.weight"):
            values = pairs(values, kv_heads)
        rows = values.reshape(-1, tensor.shape[-1])
        if tensor.qtype.name == "f32":
            expected[spec.gguf] = rows.view(np.uint8)
        else:
            expected[spec.gguf] = ggml_oracle.quantize(tensor.qtype.name, rows)
    return expected


@pytest.mark.parametrize("quant", SIMPLE)
@pytest.mark.parametrize("model", ["tiny", "sample:"])
def test_every_tensor_has_ggmls_bytes(model: str, quant: str, checkpoint: Path, tmp_path: Path) -> None:
    source = checkpoint if model == "tiny" else model
    out = tmp_path / "out.gguf"
    run(source, out, quants=(quant,))
    file = open_gguf(out)
    heads, kv = (file.keys[f"llama.attention.head_count{suffix}"] for suffix in ("", "_kv"))
    expected = expected_bytes(source, file, heads, kv)
    assert set(expected) == set(file.tensors)
    for name, tensor in file.tensors.items():
        assert np.array_equal(tensor.blocks(), expected[name].reshape(tensor.blocks().shape)), name


def test_types_are_the_recipes(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "out.gguf", quants=("q4_0",))
    types = {name: tensor.qtype.name for name, tensor in open_gguf(tmp_path / "out.gguf").tensors.items()}
    assert types["output.weight"] == "q6_k"
    assert types["token_embd.weight"] == types["blk.1.ffn_down.weight"] == "q4_0"
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "f32"


def test_keys(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    run(checkpoint, out, quants=("q4_0",))
    reader = gguf.GGUFReader(out)
    config = json.loads((checkpoint / "config.json").read_text())
    for key, value in {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.vocab_size": config["vocab_size"],
        "llama.rope.dimension_count": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.add_bos_token": True,
    }.items():
        assert reader.get_field(key).contents() == value, key
    assert reader.get_field("llama.rope.freq_base").contents() == pytest.approx(1e4)
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == config["vocab_size"]
    assert len(reader.get_field("dsconvert.pairing_id").contents()) == 32


def test_linear_rope_scaling(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "m", rope="linear")
    run(model, tmp_path / "out.gguf", quants=("f32",))
    keys = open_gguf(tmp_path / "out.gguf").keys
    assert keys["llama.rope.scaling.type"] == "linear"
    assert keys["llama.rope.scaling.factor"] == 4.0
    assert keys["llama.rope.freq_base"] == 100000.0


def test_llama3_rope_scaling_travels_as_a_tensor(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = tiny.tiny_checkpoint(tmp_path / "m")
    raw = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    raw.pop("rope_scaling", None)
    raw["rope_parameters"] = rope
    tiny.write_json(model / "config.json", raw)
    run(model, tmp_path / "out.gguf", quants=("q8_0",))
    factors = open_gguf(tmp_path / "out.gguf").tensors["rope_freqs.weight"].float32()
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    assert plain / factors == pytest.approx(wanted.numpy(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_source_types_and_forms(dtype: str, form: str, tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "m", dtype=dtype, format=form, shards=2, bias=True, tied=True)
    run(model, tmp_path / "out.gguf", quants=("f32",))
    file = open_gguf(tmp_path / "out.gguf")
    assert "output.weight" not in file.tensors
    source, back = open_checkpoint(model), open_model(file)
    assert set(back.shapes()) == set(source.shapes())
    for name in source.shapes():
        assert np.array_equal(back.float32(name), source.float32(name)), name


def test_several_types_from_one_read_equal_single_ones(checkpoint: Path, tmp_path: Path) -> None:
    events = run(checkpoint, tmp_path / "m.gguf", quants=("q4_0", "q8_0"))
    finished = [Path(event.path).name for event in events if isinstance(event, Finished)]
    assert finished == ["m-q4_0.gguf", "m-q8_0.gguf"]
    for quant in ("q4_0", "q8_0"):
        run(checkpoint, tmp_path / f"single-{quant}.gguf", quants=(quant,))
        assert (tmp_path / f"single-{quant}.gguf").read_bytes() == (tmp_path / f"m-{quant}.gguf").read_bytes()


def test_threads_do_not_change_a_byte(checkpoint: Path, tmp_path: Path) -> None:
    for threads in (1, 4):
        run(checkpoint, tmp_path / f"{threads}.gguf", quants=("q4_0",), threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "4.gguf").read_bytes()


def test_split_files_hold_the_same_tensors(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "one.gguf", quants=("q8_0",))
    run(checkpoint, tmp_path / "many.gguf", quants=("q8_0",), split_max_size=300_000)
    first = sorted(tmp_path.glob("many-*.gguf"))[0]
    one, many = open_gguf(tmp_path / "one.gguf"), open_gguf(first)
    assert len(many.paths) > 2
    for name, tensor in one.tensors.items():
        assert np.array_equal(tensor.blocks(), many.tensors[name].blocks())


def test_overrides_and_pure(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "a.gguf", quants=("q4_0",), overrides=(("attn_v", "q8_0"), ("^output", "f16")))
    types = {name: tensor.qtype.name for name, tensor in open_gguf(tmp_path / "a.gguf").tensors.items()}
    assert types["blk.0.attn_v.weight"] == "q8_0"
    assert types["output.weight"] == "f16"
    assert types["output_norm.weight"] == "f32"
    run(checkpoint, tmp_path / "b.gguf", quants=("q4_0",), pure=True)
    assert open_gguf(tmp_path / "b.gguf").tensors["output.weight"].qtype.name == "q4_0"
    with pytest.raises(UsageError, match="nothing_of_this"):
        run(checkpoint, tmp_path / "c.gguf", quants=("q4_0",), overrides=(("nothing_of_this", "q8_0"),))


def test_dry_run_writes_nothing_and_states_the_exact_size(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    (planned,) = [e for e in run(checkpoint, out, dry_run=True) if isinstance(e, Planned)]
    assert list(tmp_path.iterdir()) == []
    run(checkpoint, out)
    assert planned.nbytes == (out.stat().st_size,)
    assert sum(t.nbytes for t in planned.tensors) < planned.nbytes[0]


def test_progress_reaches_the_end(checkpoint: Path, tmp_path: Path) -> None:
    done = [e for e in run(checkpoint, tmp_path / "out.gguf") if isinstance(e, TensorDone)]
    assert [e.done for e in done] == sorted(e.done for e in done)
    assert done[-1].done == done[-1].total == open_checkpoint(checkpoint).nbytes


def damaged(checkpoint: Path, folder: Path, name: str, value: float, dtype: str = "f32") -> Path:
    """A copy with one value of one tensor replaced."""
    shutil.copytree(checkpoint, folder)
    source = open_checkpoint(checkpoint)
    tensors = {n: source.float32(n) for n in source.shapes()}
    tensors[name].flat[5] = value
    encoded = {n: tiny.encode(values, dtype) for n, values in tensors.items()}
    (folder / "model.safetensors").write_bytes(tiny.safetensors_bytes(encoded))
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_nonfinite_weights_are_named(
    checkpoint: Path, tmp_path: Path, name: str, value: float, dtype: str
) -> None:
    model = damaged(checkpoint, tmp_path / "m", name, value, dtype)
    for quant in ("q4_0", "f16"):
        with pytest.raises(QuantizationError, match=name):
            run(model, tmp_path / "out.gguf", quants=(quant,))
    assert not list(tmp_path.glob("out*"))
    events = run(model, tmp_path / "out.gguf", quants=("q8_0",), allow_nonfinite=True)
    assert any(isinstance(event, Warn) and name in event.text for event in events)


def test_float16_overflow_is_named(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    model = damaged(checkpoint, tmp_path / "m", name, 1e6)
    with pytest.raises(QuantizationError, match=r"--tensor-type 'blk\.0\.ffn_down"):
        run(model, tmp_path / "out.gguf", quants=("f16",))
    run(model, tmp_path / "out.gguf", quants=("f16",), overrides=((r"blk\.0\.ffn_down", "bf16"),))


def test_output_faults(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        run(checkpoint, out)
    assert out.read_bytes() == b"precious"
    run(checkpoint, out, force=True)
    with pytest.raises(UsageError, match=r"\.gguf"):
        run(checkpoint, tmp_path / "out.bin")
    with pytest.raises(OutputError, match="mkdir"):
        run(checkpoint, tmp_path / "no" / "out.gguf")


def test_awkward_rows_fall_back_with_a_warning(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "m", d=64, ff=160)
    events = run(model, tmp_path / "out.gguf", quants=("q6_k",))
    assert any(isinstance(event, Warn) and "multiple" in event.text for event in events)
    assert open_gguf(tmp_path / "out.gguf").tensors["blk.0.ffn_up.weight"].qtype.name == "q8_0"


def test_wrong_architecture_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "m")
    raw = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    tiny.write_json(tmp_path / "m" / "config.json", raw)
    with pytest.raises(CheckpointError, match="MambaForCausalLM"):
        run(tmp_path / "m", tmp_path / "out.gguf")


def test_proof_of_the_sample(tmp_path: Path) -> None:
    events = run("sample:", tmp_path / "out.gguf", quants=("q4_0",), effort="full")
    checks = {event.name: event for event in events if isinstance(event, Check)}
    assert {"structure", "token ids", "chat template", "weights", "mean KLD"} <= set(checks)
    assert all(check.passed for check in checks.values())
    kld = checks["mean KLD"].value
    assert kld is not None
    assert 1e-5 < kld < 0.05


def test_proof_fails_on_another_models_weights(checkpoint: Path, tmp_path: Path) -> None:
    """The proof compares with the checkpoint: hold a good file against other weights and it must fail."""
    from converters.gguf.plan import prepare
    from converters.gguf.proof import prove

    other = tiny.tiny_checkpoint(tmp_path / "other", d=256, ff=512, heads=4, kv_heads=2, seed=1)
    out = tmp_path / "out.gguf"
    run(checkpoint, out)
    job = prepare(Options(str(other), outfile=out, force=True, effort="quick"))
    failed = {event.name for event in prove(job) if isinstance(event, Check) and not event.passed}
    assert "weights" in failed


def test_every_quant_has_a_file_type() -> None:
    assert set(SIMPLE) <= set(FILE_TYPES)
    assert dataclasses.is_dataclass(Options)


def test_errors_are_conversion_errors(tmp_path: Path) -> None:
    with pytest.raises(ConversionError):
        run(tmp_path / "nothing", tmp_path / "out.gguf")
