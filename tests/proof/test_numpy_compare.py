"""The quick comparison in numpy finds what the one with torch finds, and what is planted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from defects import L, interleaved, noisy, zeroed
from random_llama import Memory, make, stored, tokens

from dsconvert.cli import cli
from dsconvert.errors import ConversionError, UsageError
from dsconvert.proof import checks, compare, figures, numpy_compare
from dsconvert.proof import effort as effort_module
from dsconvert.proof.block_sample import compare_blocks
from dsconvert.proof.effort import Effort
from dsconvert.proof.thresholds import thresholds_for
from dsconvert.texts import windows

torch = pytest.importorskip("torch")
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def effort(text: windows.Windows, blocks: tuple[int, ...] | None = None) -> Effort:
    return Effort(text, blocks, "")


def same_errors(found: compare.Comparison, expected: compare.Comparison) -> None:
    assert found.config == expected.config
    assert found.broken == expected.broken
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        for name, value in dataclasses.asdict(theirs).items():
            close = 0.1 if name == "foretold" else 1e-3  # of a sample numpy judges a matrix by its weights
            assert getattr(ours, name) == (value if value is None else pytest.approx(value, rel=close))
    snrs = [{tensor.name: tensor.snr for tensor in side.tensors} for side in (found, expected)]
    assert snrs[0] == pytest.approx(snrs[1], rel=1e-4)
    types = [{(t.name, t.type) for t in side.tensors} for side in (found, expected)]
    assert types[0] == types[1]


@pytest.mark.parametrize("keys", CONFIGS)
def test_all_of_a_model_is_what_torch_finds(keys: str) -> None:
    _, source, config = make(**CONFIGS[keys])
    candidate, text = noisy(source, 0.02), windows.strided(tokens(config, 1, 96)[0], 32, 16)
    found = compare.result(numpy_compare.compare_in_numpy(source, candidate, config, effort(text)))
    expected = compare.result(compare.compare(source, candidate, config, text, device="cpu"))
    same_errors(found, expected)
    assert found.tokens is not None
    assert expected.tokens is not None
    for field in dataclasses.fields(figures.TokenFigures):
        ours, theirs = (getattr(side.tokens, field.name) for side in (found, expected))
        assert np.mean(np.isclose(ours, theirs, rtol=1e-3, atol=1e-5)) > 0.99, field.name
    assert found.figures.kld.value == pytest.approx(expected.figures.kld.value, rel=1e-3)
    assert found.figures.tokens == text.scored


@pytest.mark.parametrize("keys", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 1 << 18], ids=["head by head", "at once"])
def test_a_sample_is_what_torch_finds(keys: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_compare, "CHUNK", chunk)
    _, source, config = make(**CONFIGS[keys])
    candidate, text = noisy(source, 0.02), windows.whole(tokens(config, 1, 64))
    for blocks in ((0, 1), (0, 1, 2)):
        found = compare.result(
            numpy_compare.compare_in_numpy(source, candidate, config, effort(text, blocks))
        )
        expected = compare.result(compare_blocks(source, candidate, config, text, blocks, device="cpu"))
        same_errors(found, expected)
        assert found.figures is None


@pytest.mark.parametrize("plant", [interleaved, zeroed])
@pytest.mark.parametrize("blocks", [None, (0, 1)])
def test_planted_defects_are_found(plant: Any, blocks: tuple[int, ...] | None) -> None:
    _, source, config = make()
    text = windows.whole(tokens(config, 2, 64))
    comparison = compare.result(
        numpy_compare.compare_in_numpy(source, plant(source), config, effort(text, blocks))
    )
    reasons = checks.judge(comparison, thresholds_for("q8_0")).reasons
    assert any(L in reason for reason in reasons)
    assert any("mean KLD" in r or "error of its output" in r for r in reasons)


def test_a_wrong_rope_base_and_a_broken_block_are_named() -> None:
    _, source, config = make()
    text = windows.whole(tokens(config, 1, 64))
    other = stored(config, rope_theta=100.0)
    found = compare.result(numpy_compare.compare_in_numpy(source, source, config, effort(text), other))
    assert found.config == ("rope_theta is 100.0, the reference has 10000.0",)
    assert found.figures is not None
    assert found.figures.kld.value > 1e-3
    bad = source.tensors[L + "mlp.up_proj.weight"].copy()
    bad[:] = np.inf
    broken = Memory({**source.tensors, L + "mlp.up_proj.weight": bad})
    for blocks in (None, (0, 1)):
        found = compare.result(numpy_compare.compare_in_numpy(source, broken, config, effort(text, blocks)))
        assert found.broken == "the candidate gives non-finite values after block 1"
    with pytest.raises(ConversionError, match="not the same model"):
        smaller = dataclasses.replace(config, vocab_size=5)
        compare.result(numpy_compare.compare_in_numpy(source, source, config, effort(text), smaller))
    with pytest.raises(UsageError, match="tokenizer is not this model's"):
        compare.result(
            numpy_compare.compare_in_numpy(source, source, config, effort(windows.whole(text.tokens + 97)))
        )


def test_blocks_of_a_conversion_are_proven_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample as if it were too big to be run whole, its file's RoPE order undone head by head."""
    monkeypatch.setattr(effort_module, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(numpy_compare, "CHUNK", 1)
    ask = ["gguf", "sample:", "-q", "q8_0", "-o", str(tmp_path / "a.gguf"), "--json"]
    result = CliRunner().invoke(cli, ask)
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    said = "verifying block 0 of 2 on 32 tokens, on the reference's input, and no logits"
    assert any(str(event.get("text")).startswith(said) for event in events)
    checks = {event["name"]: event for event in events if event["event"] == "check"}
    assert checks["blocks"]["detail"].startswith("1 block; largest error of its output 0.0")
    assert {"structure", "token ids", "chat template", "weights"} <= set(checks)


def test_a_conversion_is_proven_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dsconvert.cli import main; sys.argv[0] = 'dsconvert'\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "gguf", "sample:", "-q", "q8_0", "-o", str(tmp_path / "a.gguf")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env={**os.environ})
    assert "mean KLD" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def test_a_conversions_proof_finds_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's fault, not the file's: a transform that forgets RoPE's order, on the way in only."""
    from converters.gguf import opened as opening

    made = CliRunner().invoke(cli, ["gguf", "sample:", "-q", "q8_0", "-o", str(tmp_path / "good.gguf")])
    assert made.exit_code == 0, made.output
    opened = opening.open_parts

    def damaged(file: Any) -> Any:
        model, misfits = opened(file)
        return dataclasses.replace(model, config=stored(model.config, rope_theta=500000.0)), misfits

    monkeypatch.setattr(opening, "open_parts", damaged)
    result = CliRunner().invoke(cli, ["gguf", "sample:", "-q", "q8_0", "-o", str(tmp_path / "bad.gguf")])
    assert result.exit_code == 3, result.output
    assert "rope_theta is 500000.0" in result.stderr
