"""What is predicted of llama.cpp is near enough to show what its own rounding would hide."""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from random_llama import make, tokens

from dsconvert.cli import cli
from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Check
from dsconvert.proof import compare
from dsconvert.proof.figures import Estimate
from dsconvert.proof.scores import hidden_states
from dsconvert.proof.thresholds import EngineLimits, thresholds_for
from dsconvert.texts import builtin, windows

torch = pytest.importorskip("torch")
from dsconvert.proof import runtime  # noqa: E402
from dsconvert.proof.runtime_rounding import ROUNDINGS, rounded_inputs  # noqa: E402

KEY = b"llama.rope.freq_base"
QUANTS = ("bf16", "q8_0", "q4_k_m")
FEW_BITS = ("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_m", "iq2_xs", "iq2_xxs", "tq1_0", "tq2_0", "nvfp4")


def test_rounded_inputs_are_what_each_linear_sees() -> None:
    """The run with hooks is the run of linears that round their inputs themselves."""
    _, source, config = make(num_key_value_heads=2)
    source = replace(source, type="q8_0")
    decoder = st.open_decoder(source, config, torch.device("cpu"), torch.float32)
    text = windows.whole(tokens(config, 2, 24))
    found = compare.result(hidden_states(decoder, text, lambda block: rounded_inputs(decoder, block)))
    expected = st.embed(st.read(decoder, st.EMBED), text.tokens, decoder.dtype)
    for index in range(config.layers):
        block = st.load_block(decoder, index)
        for name, linear in block.linears.items():
            weight = linear.weight
            linear.forward = lambda x, w=weight: ROUNDINGS["q8_0"](x) @ w.T
            assert name in rounded_inputs(decoder, block)
        expected = st.run_block(decoder, block, expected)
    assert torch.allclose(found, expected, atol=1e-5)
    plain = compare.result(hidden_states(decoder, text))
    assert not torch.allclose(found, plain, atol=1e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    out = tmp_path_factory.mktemp("parity") / "sample.gguf"
    arguments = ["gguf", "sample:", "-q", ",".join(QUANTS), "-o", str(out), "--verify", "off"]
    made = CliRunner().invoke(cli, arguments)
    assert made.exit_code == 0, made.output
    return {quant: out.with_name(f"sample-{quant}.gguf") for quant in QUANTS}


@pytest.fixture(scope="module")
def few_bits(files: dict[str, Path]) -> dict[str, Path]:
    """Files that llama.cpp reads by tables of its own; mxfp4 for every matrix."""
    out = files["q8_0"].with_name("few.gguf")
    options = ["-o", str(out), "--calib", "builtin", "--calib-samples", "4", "--calib-len", "128"]
    made = CliRunner().invoke(cli, ["gguf", "sample:", "-q", ",".join(FEW_BITS), *options, "--verify", "off"])
    assert made.exit_code == 0, made.output
    pure = out.with_name("pure.gguf")
    options = ["--pure", "-o", str(pure), "--verify", "off"]
    made = CliRunner().invoke(cli, ["gguf", "sample:", "-q", "mxfp4_moe", *options])
    assert made.exit_code == 0, made.output
    return {quant: out.with_name(f"few-{quant}.gguf") for quant in FEW_BITS} | {"mxfp4_moe": pure}


def run(path: Path, believed: Path) -> runtime.EngineFigures:
    """llama.cpp's run of `path`, with the prediction for `believed`."""
    from converters.gguf.as_model import open_model
    from converters.gguf.parse import open_gguf
    from converters.outputs import open_reference
    from dsconvert.runtimes.llamacpp import Engine
    from tokenizer_tools.library import ids as encode

    reference, model = open_reference("sample:"), open_model(open_gguf(believed))
    ids = np.array(encode(reference.tokenizer.tokenizer, [builtin.evaluation_page(12_000)])[0][:1024])
    sides = ((reference.source, reference.config), (model, model.config))
    first, second = (st.open_decoder(*side, torch.device("cpu"), torch.float32) for side in sides)
    with Engine(path, n_ctx=512) as engine:
        return compare.result(runtime.engine_figures(engine, (first, second), windows.consecutive(ids, 512)))


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("quant", QUANTS)
def test_the_runtime_is_as_near_as_chance_lets_it(quant: str, files: dict[str, Path]) -> None:
    found = run(files[quant], files[quant])
    assert failed(runtime.judge_engine(found, thresholds_for(quant))) == set()
    assert abs(found.parity.ppl_ratio.value - 1) < 1e-3
    assert 0 < found.parity.kld.value < 2 * found.rounding.kld.value
    # Where rounding is no accident, the runtime's divergence is the predicted one.
    assert found.figures.kld.value == pytest.approx(found.predicted.kld.value, rel=0.05)
    assert found.ppl_to_weights.value == pytest.approx(
        found.parity.ppl_ratio.value * found.rounding.ppl_ratio.value, rel=1e-9
    )


@pytest.mark.parametrize("quant", [*FEW_BITS, "mxfp4_moe"])
def test_the_runtime_reads_types_of_few_bits_as_we_do(quant: str, few_bits: dict[str, Path]) -> None:
    found = run(few_bits[quant], few_bits[quant])
    assert failed(runtime.judge_engine(found, thresholds_for(quant))) == set()
    assert 0 < found.parity.kld.value < 2 * found.rounding.kld.value
    assert found.figures.kld.value == pytest.approx(found.predicted.kld.value, rel=0.05)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_fault_of_the_runtime_smaller_than_its_floor_is_seen(
    quant: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """RoPE angles some percent off, as by a rule for scaling that a runtime reads otherwise."""
    data = bytearray(files[quant].read_bytes())
    at = data.index(KEY) + len(KEY) + 4
    assert struct.unpack_from("<f", data, at) == (10000.0,)
    struct.pack_into("<f", data, at, 11000.0)
    (tmp_path / "bad.gguf").write_bytes(data)
    found = run(tmp_path / "bad.gguf", files[quant])
    assert "engine parity" in failed(runtime.judge_engine(found, thresholds_for(quant)))
    assert abs(found.ppl_to_weights.value - 1) < 0.01  # too little to be seen beside the rounding of a model
    assert found.figures.kld.value < 0.01


def test_each_limit_can_fail(files: dict[str, Path]) -> None:
    found, limits = run(files["q8_0"], files["q8_0"]), thresholds_for("q8_0")
    tight = EngineLimits(ppl=0.0, spread=1e-3, least=0.0)
    assert failed(runtime.judge_engine(found, limits, tight)) == {"engine parity"}
    off = replace(found.parity, ppl_ratio=Estimate(0.99, 1e-4))
    assert failed(runtime.judge_engine(replace(found, parity=off), limits)) == {"engine PPL"}
    assert failed(runtime.judge_engine(found, replace(limits, max_kld=0.0), tight)) == {
        "engine KLD",
        "engine parity",
    }
