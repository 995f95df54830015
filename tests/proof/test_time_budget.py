"""How much is run, that it is said, and that a sample of blocks still finds defects."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from defects import L, interleaved, noisy, zeroed
from random_llama import Memory, make, stored, tokens

from dsconvert.errors import ConversionError
from dsconvert.events import Check, Step
from dsconvert.models.config import ModelConfig, normalise
from dsconvert.proof import compare, time_budget
from dsconvert.proof.figures import TensorError
from dsconvert.proof.thresholds import thresholds_for
from dsconvert.proof.time_budget import Effort
from dsconvert.texts import windows

torch = pytest.importorskip("torch")
SEVEN_B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "vocab_size": 102400,
}
SMALL = {**SEVEN_B, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def many(count: int, length: int = 512) -> windows.Windows:
    return windows.consecutive(np.arange(count * length) % 1000, length)


def test_a_big_model_on_a_cpu_gets_a_sample_of_blocks() -> None:
    config = normalise(SEVEN_B, "test")
    assert time_budget.weights(config) == 6_910_115_840  # deepseek-llm-7b without its norms
    chosen = time_budget.choose(config, many(20), "quick", "cpu")
    assert chosen.blocks == (0, 9, 19, 29)
    assert chosen.windows.tokens.shape == (1, 256)
    assert chosen.seconds < 30
    assert "of 30 on 256 tokens" in chosen.text
    assert "--effort full" in chosen.text
    assert time_budget.choose(config, many(20), "quick", "cpu", seconds=5).blocks == (0, 15)


def test_full_runs_everything_whatever_it_costs() -> None:
    chosen = time_budget.choose(normalise(SEVEN_B, "test"), many(20), "full", "cpu")
    assert chosen.blocks is None
    assert len(chosen.windows.tokens) == 20
    assert chosen.seconds > 1000
    assert "all 30 blocks over 20 of 20 windows" in chosen.text


def test_a_small_model_gets_the_windows_that_fit() -> None:
    chosen = time_budget.choose(normalise(SMALL, "test"), many(1000), "quick", "cpu")
    assert chosen.blocks is None
    assert 2 <= len(chosen.windows.tokens) < 100
    assert len(chosen.windows.first) == len(chosen.windows.tokens)
    assert chosen.seconds <= 20
    longer = time_budget.choose(normalise(SMALL, "test"), many(1000), "quick", "cpu", seconds=200)
    assert len(longer.windows.tokens) > 5 * len(chosen.windows.tokens)


def checked(source: Memory, candidate: Memory, config: ModelConfig, limits: str, **keys: Any) -> Any:
    text = windows.whole(tokens(config, 1, 64))
    run = time_budget.check(
        source,
        candidate,
        config,
        Effort(text, (0, 1), 1.0, "two blocks"),
        thresholds_for(limits),
        device="cpu",
        **keys,
    )
    events = []
    while True:
        try:
            events.append(next(run))
        except StopIteration as end:
            return events, *end.value


def test_a_sample_says_what_it_ran_and_passes_a_fair_candidate() -> None:
    _, source, config = make()
    events, comparison, verdict = checked(source, noisy(source, 0.005), config, "q8_0")
    assert events[0] == Step("verifying two blocks")
    assert [e for e in events if isinstance(e, Check)] == list(verdict.checks)
    assert verdict.passed
    assert [block.index for block in comparison.blocks] == [0, 1]
    assert all(0 < block.update < 0.04 for block in comparison.blocks)
    assert comparison.figures is None


@pytest.mark.parametrize("plant", [interleaved, zeroed])
def test_a_sample_finds_planted_defects(plant: Any) -> None:
    _, source, config = make()
    _, comparison, verdict = checked(source, plant(source), config, "q8_0")
    assert not verdict.passed
    assert any(L in reason for reason in verdict.reasons)
    assert any(reason.startswith("block 1: error of its output") for reason in verdict.reasons)
    assert comparison.blocks[1].update > 0.1


def test_a_sample_finds_a_wrong_rope_base() -> None:
    _, source, config = make()
    other = stored(config, rope_theta=100.0)
    _, _, verdict = checked(source, source, config, "q8_0", candidate_config=other)
    assert any("rope_theta" in reason for reason in verdict.reasons)
    assert any("block 0: error" in reason for reason in verdict.reasons)


def test_a_sample_names_a_block_that_breaks() -> None:
    _, source, config = make()
    bad = source.tensors[L + "mlp.up_proj.weight"].copy()
    bad[:] = np.inf
    _, comparison, verdict = checked(
        source, Memory({**source.tensors, L + "mlp.up_proj.weight": bad}), config, "q8_0"
    )
    assert comparison.broken == "the candidate gives non-finite values after block 1"
    assert comparison.broken in verdict.reasons


def test_all_blocks_through_check_are_what_compare_finds() -> None:
    _, source, config = make()
    candidate = noisy(source, 0.002)
    chosen = time_budget.choose(config, windows.whole(tokens(config, 4, 32)), "quick", "cpu")
    assert chosen.blocks is None
    run = time_budget.check(source, candidate, config, chosen, thresholds_for("q8_0"), device="cpu")
    comparison, verdict = compare.result(run)
    direct = compare.result(compare.compare(source, candidate, config, chosen.windows, device="cpu"))
    assert comparison.figures == direct.figures
    assert verdict.passed


def test_models_of_other_sizes_are_refused() -> None:
    _, source, config = make()
    with pytest.raises(ConversionError, match="not the same model"):
        checked(source, source, config, "q8_0", candidate_config=dataclasses.replace(config, vocab_size=5))


def test_tensors_outside_the_sample_are_compared_by_some_rows() -> None:
    _, source, _ = make()
    known = (TensorError(L + "mlp.up_proj.weight", "f32", (160, 64), 1.0),)
    fair = time_budget.sample_tensors(source, noisy(source, 0.01), known, 16)
    assert {t.name for t in fair} == source.tensors.keys() - {known[0].name}
    assert all(30 < t.snr < 50 for t in fair if len(t.shape) > 1), fair
    name = "model.layers.2.mlp.down_proj.weight"
    bad = source.tensors[name].copy()
    bad[-3:] = 0
    every = time_budget.sample_tensors(source, Memory({**source.tensors, name: bad}), (), 16)
    found = {t.name: t for t in every}
    assert found[name].snr < 15
    last = [source.tensors[name].shape[0] - i for i in (3, 2, 1)]
    assert [fault.where for fault in found[name].faults] == [f"row {row}" for row in last]
    assert all(t.snr == math.inf and not t.faults for other, t in found.items() if other != name)
