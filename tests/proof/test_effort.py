"""How much is run, that it is said, and that a sample of blocks still finds defects."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from defects import L, interleaved, noisy, zeroed
from random_llama import Memory, make, stored, tokens

from dsconvert.decoder import experts, torch_decoder
from dsconvert.errors import ConversionError
from dsconvert.models.config import ModelConfig, normalise
from dsconvert.proof import checks, compare, effort
from dsconvert.proof.block_sample import compare_blocks, sample_tensors
from dsconvert.proof.thresholds import thresholds_for
from dsconvert.texts import windows

pytest.importorskip("torch")
SEVEN_B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "vocab_size": 102400,
}
SMALL = {**SEVEN_B, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}


def many(count: int, length: int = 512) -> windows.Windows:
    return windows.consecutive(np.arange(count * length) % 1000, length)


def test_a_big_model_gets_a_sample_of_blocks() -> None:
    config = normalise(SEVEN_B, "test")
    assert effort.weights(config) == 6_910_115_840  # deepseek-llm-7b without its norms
    chosen = effort.choose(config, many(8), "quick")
    assert chosen.blocks == (0,)
    assert chosen.windows.tokens.shape == (1, 32)
    assert chosen.windows.first.tolist() == [0]
    assert chosen.text.startswith("block 0 of 30 on 32 tokens")
    assert "--effort full" in chosen.text
    assert not chosen.small
    deep = normalise({**SEVEN_B, "num_hidden_layers": 95}, "test")
    assert effort.choose(deep, many(8), "quick").blocks == (0, 47, 94, 23, 71)


def test_no_block_is_run_where_two_do_not_fit() -> None:
    config = normalise(SEVEN_B, "test")
    chosen = effort.choose(config, many(8), "quick", 3e9)
    assert chosen.blocks == ()
    assert "two decoder blocks need 1.6 GB, 3.0 GB are free" in chosen.text
    assert effort.choose(config, many(8), "full", 4e9).blocks is None


def test_of_a_large_mlp_one_matrix_is_held() -> None:
    wide = {**SEVEN_B, "hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64}
    grouped = normalise({**wide, "num_key_value_heads": 8}, "test")
    assert effort.block_weights(grouped) == 8192 * (8192 + 2 * 1024 + 8192 + 22016)


def test_full_runs_everything_whatever_it_costs() -> None:
    chosen = effort.choose(normalise(SEVEN_B, "test"), many(20), "full")
    assert chosen.blocks is None
    assert len(chosen.windows.tokens) == 20
    assert not chosen.small
    assert chosen.text == "all 30 blocks over 20 windows of 512 tokens"


def test_a_middle_model_gets_a_short_window_and_a_small_one_all() -> None:
    middle = normalise({**SEVEN_B, **SMALL}, "test")
    assert 200e6 < effort.weights(middle) < 250e6
    chosen = effort.choose(middle, many(8), "quick")
    assert (chosen.blocks, chosen.windows.tokens.shape, chosen.small) == (None, (1, 128), True)
    small = normalise({**SEVEN_B, **SMALL, "num_hidden_layers": 1, "vocab_size": 4096}, "test")
    for mode in ("quick", "full"):
        chosen = effort.choose(small, many(8), mode)
        assert (chosen.blocks, chosen.windows.tokens.shape, chosen.small) == (None, (8, 512), True)
    assert not effort.choose(small, many(80), "full").small


def test_blocks_are_spread() -> None:
    assert effort.spread(1) == (0,)
    assert effort.spread(24)[:7] == (0, 12, 23, 6, 18, 3, 9)
    for layers in (2, 3, 24, 95):
        assert sorted(effort.spread(layers)) == list(range(layers))


def checked(source: Memory, candidate: Memory, config: ModelConfig, limits: str, **keys: Any) -> Any:
    text = windows.whole(tokens(config, 1, 64))
    run = compare_blocks(source, candidate, config, text, (0, 1), device="cpu", **keys)
    comparison = compare.result(run)
    return comparison, checks.judge(comparison, thresholds_for(limits))


def test_a_sample_says_what_it_ran_and_passes_a_fair_candidate() -> None:
    _, source, config = make()
    comparison, verdict = checked(source, noisy(source, 0.005), config, "q8_0")
    assert verdict.passed
    assert [block.index for block in comparison.blocks] == [0, 1]
    assert all(0 < block.update < 0.04 for block in comparison.blocks)
    assert comparison.figures is None


def test_a_large_mlp_is_run_matrix_by_matrix_to_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source, config = make()
    candidate, text = noisy(zeroed(source), 0.01), windows.whole(tokens(config, 2, 40))

    def found(large: int, whole: int) -> list[compare.Comparison]:
        monkeypatch.setattr(experts, "LARGE", large)
        monkeypatch.setattr(experts, "TOKENS_AT_ONCE", 32)
        monkeypatch.setattr(torch_decoder, "READ_WHOLE", whole)
        runs = (
            compare.compare(source, candidate, config, text, device="cpu"),
            compare_blocks(source, candidate, config, text, (0, 1), device="cpu"),
        )
        return [compare.result(run) for run in runs]

    for one, other in zip(found(1 << 28, 1 << 26), found(0, 0), strict=True):
        losses = [{tensor.name: tensor.loss or 0.0 for tensor in run.tensors} for run in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        kept = [{t.name: dataclasses.replace(t, loss=None) for t in run.tensors} for run in (one, other)]
        assert kept[0] == kept[1]
        errors = [[(block.relative, block.foretold) for block in run.blocks] for run in (one, other)]
        np.testing.assert_allclose(np.array(errors[1], float), np.array(errors[0], float), rtol=1e-4)


@pytest.mark.parametrize("plant", [interleaved, zeroed])
def test_a_sample_finds_planted_defects(plant: Any) -> None:
    _, source, config = make()
    comparison, verdict = checked(source, plant(source), config, "q8_0")
    assert not verdict.passed
    assert any(L in reason for reason in verdict.reasons)
    assert any(reason.startswith("block 1: error of its output") for reason in verdict.reasons)
    assert comparison.blocks[1].update > 0.1


def test_a_sample_finds_a_wrong_rope_base() -> None:
    _, source, config = make()
    other = stored(config, rope_theta=100.0)
    _, verdict = checked(source, source, config, "q8_0", candidate_config=other)
    assert any("rope_theta" in reason for reason in verdict.reasons)
    assert any("block 0: error" in reason for reason in verdict.reasons)


def test_a_sample_names_a_block_that_breaks() -> None:
    _, source, config = make()
    bad = source.tensors[L + "mlp.up_proj.weight"].copy()
    bad[:] = np.inf
    comparison, verdict = checked(
        source, Memory({**source.tensors, L + "mlp.up_proj.weight": bad}), config, "q8_0"
    )
    assert comparison.broken == "the candidate gives non-finite values after block 1"
    assert comparison.broken in verdict.reasons


def test_models_of_other_sizes_are_refused() -> None:
    _, source, config = make()
    with pytest.raises(ConversionError, match="not the same model"):
        checked(source, source, config, "q8_0", candidate_config=dataclasses.replace(config, vocab_size=5))


def test_tensors_outside_the_sample_are_compared_by_some_rows() -> None:
    _, source, _ = make()
    known = L + "mlp.up_proj.weight"
    fair = sample_tensors((source, noisy(source, 0.01)), {known}, 16)
    assert {t.name for t in fair} == source.tensors.keys() - {known}
    assert all(30 < t.snr < 50 for t in fair if len(t.shape) > 1), fair
    name = "model.layers.2.mlp.down_proj.weight"
    bad = source.tensors[name].copy()
    bad[-3:] = 0
    every = sample_tensors((source, Memory({**source.tensors, name: bad})), (), 16)
    found = {t.name: t for t in every}
    assert found[name].snr < 15
    last = [source.tensors[name].shape[0] - i for i in (3, 2, 1)]
    assert [fault.where for fault in found[name].faults] == [f"row {row}" for row in last]
    assert all(t.snr == math.inf and not t.faults for other, t in found.items() if other != name)
