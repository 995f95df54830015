"""CPU and CUDA run the same code: every path that depends on the device, against what a CPU finds.

On a machine without CUDA each test runs on the CPU, so that all of them are known to run, and says that it
needs a CUDA device for the other half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from defects import L, noisy, zeroed
from devices import DEVICES
from random_llama import make, tokens

from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.proof import checks, compare, logprob_file
from dsconvert.proof.block_sample import compare_blocks
from dsconvert.proof.runtime_rounding import ROUNDINGS, rounded_inputs
from dsconvert.proof.scores import hidden_states
from dsconvert.proof.thresholds import thresholds_for
from dsconvert.texts import windows

CPU, FLOAT32 = torch.device("cpu"), torch.float32
NEAR: dict[str, Any] = {"rel": 2e-3, "abs": 1e-6}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_transformers(device: str, dtype: str) -> None:
    model, source, config = make(num_key_value_heads=2)
    ids = tokens(config, 3, 100)
    decoder = st.open_decoder(source, config, torch.device(device), getattr(torch, dtype))
    hidden = compare.result(hidden_states(decoder, windows.whole(ids)))
    found = st.logits(decoder, *st.head_weights(decoder), hidden)
    assert found.device.type == device
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits
    limit = 1e-3 if dtype == "float32" else 0.05 * float(expected.std())
    assert float((found.cpu() - expected).square().mean().sqrt()) < limit


@pytest.mark.parametrize("device", DEVICES)
def test_a_comparison_finds_what_a_cpu_finds(device: str) -> None:
    _, source, config = make(num_key_value_heads=2)
    candidate, text = noisy(source, 0.02), windows.strided(tokens(config, 1, 128)[0], 64, 32)
    found, expected = (
        compare.result(compare.compare(source, candidate, config, text, device=name, dtype="float32"))
        for name in (device, "cpu")
    )
    assert found.figures is not None
    assert expected.figures is not None
    assert found.figures.kld.value == pytest.approx(expected.figures.kld.value, **NEAR)
    assert found.figures.ppl.value == pytest.approx(expected.figures.ppl.value, **NEAR)
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert ours.relative == pytest.approx(theirs.relative, **NEAR)
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert one.snr == pytest.approx(other.snr, rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_of_blocks_finds_a_defect(device: str) -> None:
    _, source, config = make()
    text = windows.whole(tokens(config, 1, 64))
    limits = thresholds_for("q8_0")
    run = compare_blocks(source, zeroed(source), config, text, (0, 1), device=device)
    said = checks.judge(compare.result(run), limits)
    assert any(L in reason for reason in said.reasons)
    assert any(reason.startswith("block 1: error of its output") for reason in said.reasons)


@pytest.mark.parametrize("device", DEVICES)
def test_a_file_of_base_log_probabilities_is_written_and_read(device: str, tmp_path: Path) -> None:
    _, source, config = make()
    text, where = windows.consecutive(tokens(config, 1, 128)[0], 64), {"device": device, "dtype": "float32"}
    compare.result(logprob_file.write_base(tmp_path / "base", source, config, text, **where))
    base = logprob_file.open_base(tmp_path / "base")
    found = compare.result(logprob_file.compare_base(base, noisy(source, 0.02), config, **where))
    expected = compare.result(compare.compare(source, noisy(source, 0.02), config, text, device="cpu"))
    assert found.figures is not None
    assert expected.figures is not None
    assert found.figures.kld.value == pytest.approx(expected.figures.kld.value, rel=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_are_those_of_a_cpu(device: str, diagonal: bool) -> None:
    _, source, config = make(num_key_value_heads=2)
    moments: list[list[torch.Tensor]] = []
    for name in (device, "cpu"):
        decoder = st.open_decoder(source, config, torch.device(name), FLOAT32)
        hidden = linear_inputs.embed(decoder, tokens(config, 5, 48))
        groups = block_walk.walk(decoder, st.load_block(decoder, 0), hidden, diagonal)
        moments.append([group.moment for group in groups])
        assert all(moment.device.type == name for moment in moments[-1])
        assert hidden.device == CPU  # states wait in host memory
    for ours, theirs in zip(*moments, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ROUNDINGS)
def test_activations_are_rounded_alike(device: str, kind: str) -> None:
    rows = np.random.default_rng(4).standard_normal((16, 512), np.float32)
    x = torch.from_numpy(rows)
    torch.testing.assert_close(ROUNDINGS[kind](x.to(device)).cpu(), ROUNDINGS[kind](x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prediction_runs_on_the_device(device: str) -> None:
    _, source, config = make(num_key_value_heads=2)
    source, text = noisy(source, 0.0), windows.whole(tokens(config, 2, 40))
    decoder = st.open_decoder(source, config, torch.device(device), FLOAT32)
    plain = compare.result(hidden_states(decoder, text))
    rounded = compare.result(hidden_states(decoder, text, lambda block: rounded_inputs(decoder, block)))
    error = float((rounded - plain).norm() / plain.norm())
    assert rounded.device.type == device
    assert 1e-4 < error < 0.05
